//! CRI v1 over a unix socket.
