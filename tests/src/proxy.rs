//! A small HTTP proxy that knows CONNECT and nothing else: enough for the one method that the daemon uses.

use std::io::{BufRead, BufReader, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// The proxy. It serves until the test program ends.
pub struct ConnectProxy {
    address: SocketAddr,
    tunnels: Arc<AtomicU64>,
}

impl ConnectProxy {
    /// Listens on a port of that address; `authorization`: the value of Proxy-Authorization that it wants.
    pub fn start(ip: IpAddr, authorization: Option<&str>) -> Self {
        let listener = TcpListener::bind((ip, 0)).expect("a port for the proxy");
        let address = listener.local_addr().expect("a bound listener has an address");
        let tunnels = Arc::new(AtomicU64::new(0));
        let (counted, wanted) = (tunnels.clone(), authorization.map(str::to_owned));
        std::thread::spawn(move || {
            for client in listener.incoming().flatten() {
                let (counted, wanted) = (counted.clone(), wanted.clone());
                std::thread::spawn(move || serve(client, wanted.as_deref(), &counted));
            }
        });
        Self { address, tunnels }
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Tunnels opened so far.
    pub fn tunnels(&self) -> u64 {
        self.tunnels.load(Ordering::Relaxed)
    }
}

fn serve(client: TcpStream, wanted: Option<&str>, tunnels: &AtomicU64) -> Option<()> {
    let mut reader = BufReader::new(client.try_clone().ok()?);
    let mut answer = client;
    let mut line = String::new();
    reader.read_line(&mut line).ok()?;
    let target = line.strip_prefix("CONNECT ")?.split(' ').next()?.to_owned();
    let mut authorized = wanted.is_none();
    loop {
        line.clear();
        reader.read_line(&mut line).ok()?;
        match line.trim_end().split_once(": ") {
            Some(("Proxy-Authorization", value)) => authorized |= Some(value) == wanted,
            Some(_) => {}
            None => break,
        }
    }
    if !authorized {
        answer
            .write_all(b"HTTP/1.1 407 Proxy Authentication Required\r\n\r\n")
            .ok()?;
        return None;
    }
    let Ok(mut server) = TcpStream::connect(target) else {
        answer.write_all(b"HTTP/1.1 502 Bad Gateway\r\n\r\n").ok()?;
        return None;
    };
    answer
        .write_all(b"HTTP/1.1 200 Connection established\r\n\r\n")
        .ok()?;
    tunnels.fetch_add(1, Ordering::Relaxed);
    let mut back = server.try_clone().ok()?;
    let backwards = std::thread::spawn(move || {
        let _ = std::io::copy(&mut back, &mut answer);
        let _ = answer.shutdown(std::net::Shutdown::Both);
    });
    let _ = std::io::copy(&mut reader, &mut server);
    let _ = server.shutdown(std::net::Shutdown::Both);
    backwards.join().ok()
}
