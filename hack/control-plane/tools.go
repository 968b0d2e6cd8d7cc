//go:build tools

// Package tools requires what go.mod's tool lines cannot name: a test program.
package tools

import _ "k8s.io/kubernetes/test/e2e" // hack/conformance
