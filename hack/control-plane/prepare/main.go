// Command prepare writes what the control plane needs before it starts: `prepare DIR [NODE]`.
//
// It makes one certificate authority, a certificate per component, the key pair for ServiceAccount tokens, a
// kubeconfig per component, and DIR/ports, a file of shell assignments that names free TCP ports. With NODE it also
// makes DIR/node-NODE.kubeconfig, by which a kubelet is the node of that name. What is already there stays, so that a
// second run changes nothing.
package main

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"log"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"strings"
	"time"
)

const validity = 10 * 365 * 24 * time.Hour

func main() {
	if len(os.Args) != 2 && len(os.Args) != 3 {
		log.Fatal("usage: prepare DIR [NODE]")
	}
	dir, err := filepath.Abs(os.Args[1])
	check(err)
	check(os.MkdirAll(dir, 0o700))
	if !exists(filepath.Join(dir, "ports")) {
		prepareControlPlane(dir)
	}
	if len(os.Args) == 3 && !exists(filepath.Join(dir, "node-"+os.Args[2]+".kubeconfig")) {
		prepareNode(dir, os.Args[2])
	}
}

func prepareNode(dir, node string) {
	ca := loadAuthority(dir)
	name := "node-" + node
	ca.issue(name, pkix.Name{CommonName: "system:node:" + node, Organization: []string{"system:nodes"}}, false)
	ports, err := os.ReadFile(filepath.Join(dir, "ports"))
	check(err)
	for _, line := range strings.Split(string(ports), "\n") {
		if port, found := strings.CutPrefix(line, "APISERVER_PORT="); found {
			writeKubeconfig(dir, name, "https://127.0.0.1:"+port)
		}
	}
}

func prepareControlPlane(dir string) {
	ca := newAuthority(dir)
	ca.issue("apiserver", pkix.Name{CommonName: "kube-apiserver"}, true)
	ca.issue("etcd", pkix.Name{CommonName: "etcd"}, true)
	ca.issue("etcd-client", pkix.Name{CommonName: "kube-apiserver"}, false)
	ca.issue("kubelet-client", pkix.Name{CommonName: "kube-apiserver-kubelet-client", Organization: []string{"system:masters"}}, false)
	writeKey(filepath.Join(dir, "service-account.key"), newKey())

	ports := freePorts("ETCD_PORT", "ETCD_PEER_PORT", "APISERVER_PORT", "CONTROLLER_MANAGER_PORT", "SCHEDULER_PORT")
	server := "https://127.0.0.1:" + ports["APISERVER_PORT"]
	for name, subject := range map[string]pkix.Name{
		"admin":              {CommonName: "admin", Organization: []string{"system:masters"}},
		"controller-manager": {CommonName: "system:kube-controller-manager"},
		"scheduler":          {CommonName: "system:kube-scheduler"},
	} {
		ca.issue(name, subject, false)
		writeKubeconfig(dir, name, server)
	}

	// Last: its presence says that the rest is complete.
	var text strings.Builder
	for name, port := range ports {
		fmt.Fprintf(&text, "%s=%s\n", name, port)
	}
	write(filepath.Join(dir, "ports"), []byte(text.String()), 0o644)
}

type authority struct {
	dir         string
	key         *ecdsa.PrivateKey
	certificate *x509.Certificate
}

func newAuthority(dir string) authority {
	ca := authority{dir: dir, key: newKey()}
	template := &x509.Certificate{
		SerialNumber: serial(), Subject: pkix.Name{CommonName: "skerry-sandbox"},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(validity),
		IsCA: true, BasicConstraintsValid: true,
		KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageDigitalSignature,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, ca.key.Public(), ca.key)
	check(err)
	ca.certificate, err = x509.ParseCertificate(der)
	check(err)
	writePEM(filepath.Join(dir, "ca.crt"), "CERTIFICATE", der, 0o644)
	writeKey(filepath.Join(dir, "ca.key"), ca.key)
	return ca
}

func loadAuthority(dir string) authority {
	der := func(name string) []byte {
		text, err := os.ReadFile(filepath.Join(dir, name))
		check(err)
		block, _ := pem.Decode(text)
		if block == nil {
			log.Fatalf("%s holds no PEM block", filepath.Join(dir, name))
		}
		return block.Bytes
	}
	ca := authority{dir: dir}
	var err error
	ca.certificate, err = x509.ParseCertificate(der("ca.crt"))
	check(err)
	ca.key, err = x509.ParseECPrivateKey(der("ca.key"))
	check(err)
	return ca
}

// issue writes NAME.crt and NAME.key; a server's certificate is good for the local machine.
func (ca authority) issue(name string, subject pkix.Name, server bool) {
	template := &x509.Certificate{
		SerialNumber: serial(), Subject: subject,
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(validity),
		KeyUsage:    x509.KeyUsageDigitalSignature,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
	}
	if server {
		template.ExtKeyUsage = append(template.ExtKeyUsage, x509.ExtKeyUsageServerAuth)
		template.DNSNames = []string{"localhost", "kubernetes", "kubernetes.default", "kubernetes.default.svc"}
		template.IPAddresses = []net.IP{net.IPv4(127, 0, 0, 1), net.IPv4(10, 96, 0, 1)}
	}
	key := newKey()
	der, err := x509.CreateCertificate(rand.Reader, template, ca.certificate, key.Public(), ca.key)
	check(err)
	writePEM(filepath.Join(ca.dir, name+".crt"), "CERTIFICATE", der, 0o644)
	writeKey(filepath.Join(ca.dir, name+".key"), key)
}

func writeKubeconfig(dir, name, server string) {
	file := func(name string) string { return filepath.Join(dir, name) }
	write(file(name+".kubeconfig"), []byte(fmt.Sprintf(`apiVersion: v1
kind: Config
current-context: default
contexts:
- name: default
  context: {cluster: default, user: default}
clusters:
- name: default
  cluster: {server: %q, certificate-authority: %q}
users:
- name: default
  user: {client-certificate: %q, client-key: %q}
`, server, file("ca.crt"), file(name+".crt"), file(name+".key"))), 0o600)
}

// freePorts holds every port until all are found, so that none is given twice.
func freePorts(names ...string) map[string]string {
	ports := map[string]string{}
	for _, name := range names {
		listener, err := net.Listen("tcp", "127.0.0.1:0")
		check(err)
		defer listener.Close()
		_, ports[name], err = net.SplitHostPort(listener.Addr().String())
		check(err)
	}
	return ports
}

func newKey() *ecdsa.PrivateKey {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	check(err)
	return key
}

func serial() *big.Int {
	number, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 127))
	check(err)
	return number
}

func writeKey(path string, key *ecdsa.PrivateKey) {
	der, err := x509.MarshalECPrivateKey(key)
	check(err)
	writePEM(path, "EC PRIVATE KEY", der, 0o600)
}

func writePEM(path, kind string, der []byte, mode os.FileMode) {
	write(path, pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}), mode)
}

func write(path string, data []byte, mode os.FileMode) { check(os.WriteFile(path, data, mode)) }

func exists(path string) bool {
	_, err := os.Stat(path)
	return err == nil
}

func check(err error) {
	if err != nil {
		log.Fatal(err)
	}
}
