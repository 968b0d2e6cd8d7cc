//! A TCP relay between a site and its provider: the line that the scenarios cut.

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Condvar, Mutex};

/// What the line does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Line {
    /// Carries bytes.
    Up,
    /// Swallows bytes without a word, as a dead modem does. What was on its way arrives once the line is up again,
    /// as TCP would send it again.
    Silent,
    /// Carries what the site says; the answers wait as on a silent line.
    Upwards,
    /// Closes every connection, and every new one at once.
    Closed,
}

/// From the site to the provider, or back.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Direction {
    Up,
    Down,
}

/// The relay. Dropping it closes everything.
pub struct Relay {
    shared: Arc<Shared>,
    address: SocketAddr,
}

struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

struct State {
    line: Line,
    ended: bool,
    open: Vec<TcpStream>,
    bytes: u64,
}

impl Relay {
    /// Listens on a port of its own and relays to `target`.
    pub fn to(target: SocketAddr) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port for the relay");
        let address = listener.local_addr().expect("a bound listener has an address");
        let state = State {
            line: Line::Up,
            ended: false,
            open: Vec::new(),
            bytes: 0,
        };
        let shared = Arc::new(Shared {
            state: Mutex::new(state),
            changed: Condvar::new(),
        });
        let accepting = shared.clone();
        std::thread::spawn(move || {
            for client in listener.incoming().flatten() {
                let line = {
                    let state = accepting.state.lock().unwrap();
                    if state.ended {
                        return;
                    }
                    state.line
                };
                if line != Line::Closed {
                    let shared = accepting.clone();
                    std::thread::spawn(move || shared.connect(client, target));
                }
            }
        });
        Self { shared, address }
    }

    /// Where the site dials.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Changes what the line does from now on.
    pub fn set(&self, line: Line) {
        let mut state = self.shared.state.lock().unwrap();
        state.line = line;
        if line == Line::Closed {
            for stream in state.open.drain(..) {
                let _ = stream.shutdown(Shutdown::Both);
            }
        }
        self.shared.changed.notify_all();
    }

    /// Bytes relayed so far, both ways.
    pub fn bytes(&self) -> u64 {
        self.shared.state.lock().unwrap().bytes
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        self.set(Line::Closed);
        self.shared.state.lock().unwrap().ended = true;
        self.shared.changed.notify_all();
        let _ = TcpStream::connect(self.address);
    }
}

impl Shared {
    fn connect(self: Arc<Self>, client: TcpStream, target: SocketAddr) {
        // A handshake that begins on a silent line waits for the line.
        if !self.pass(0, Direction::Up) {
            return;
        }
        let Ok(server) = TcpStream::connect(target) else {
            return;
        };
        let (Ok(client2), Ok(server2)) = (client.try_clone(), server.try_clone()) else {
            return;
        };
        {
            let mut state = self.state.lock().unwrap();
            state
                .open
                .extend([client.try_clone(), server.try_clone()].into_iter().flatten());
        }
        let back = self.clone();
        let backwards = std::thread::spawn(move || back.copy(server2, client2, Direction::Down));
        self.copy(client, server, Direction::Up);
        let _ = backwards.join();
    }

    fn copy(&self, mut from: TcpStream, mut to: TcpStream, direction: Direction) {
        let mut buffer = [0; 16 * 1024];
        loop {
            let read = from.read(&mut buffer).unwrap_or(0);
            // The end of a connection does not pass a silent line either.
            if !self.pass(read, direction) || read == 0 || to.write_all(&buffer[..read]).is_err() {
                let _ = to.shutdown(Shutdown::Both);
                return;
            }
        }
    }

    /// Waits while the line is silent; whether the bytes may pass then.
    fn pass(&self, bytes: usize, direction: Direction) -> bool {
        let holds = |line| line == Line::Silent || (line == Line::Upwards && direction == Direction::Down);
        let state = self.state.lock().unwrap();
        let mut state = self
            .changed
            .wait_while(state, |s| holds(s.line) && !s.ended)
            .unwrap();
        state.bytes += bytes as u64;
        state.line != Line::Closed && !state.ended
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn echo() -> SocketAddr {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        std::thread::spawn(move || {
            for mut stream in listener.incoming().flatten() {
                std::thread::spawn(move || std::io::copy(&mut stream.try_clone().unwrap(), &mut stream));
            }
        });
        address
    }

    fn read(stream: &mut TcpStream) -> std::io::Result<usize> {
        stream.set_read_timeout(Some(Duration::from_millis(200))).unwrap();
        stream.read(&mut [0; 16])
    }

    #[test]
    fn a_silent_line_carries_nothing_until_it_is_up_again() {
        let relay = Relay::to(echo());
        let mut stream = TcpStream::connect(relay.address()).unwrap();
        stream.write_all(b"a").unwrap();
        assert_eq!(read(&mut stream).unwrap(), 1);
        relay.set(Line::Silent);
        stream.write_all(b"b").unwrap();
        assert!(read(&mut stream).is_err());
        relay.set(Line::Up);
        assert_eq!(read(&mut stream).unwrap(), 1);
        assert_eq!(relay.bytes(), 4);
    }

    #[test]
    fn a_line_that_only_carries_upwards_holds_back_the_answer_until_it_is_up_again() {
        let relay = Relay::to(echo());
        let mut stream = TcpStream::connect(relay.address()).unwrap();
        stream.write_all(b"a").unwrap();
        assert_eq!(read(&mut stream).unwrap(), 1);
        relay.set(Line::Upwards);
        stream.write_all(b"b").unwrap();
        assert!(read(&mut stream).is_err());
        assert_eq!(relay.bytes(), 3, "what the site said has not passed");
        relay.set(Line::Up);
        assert_eq!(read(&mut stream).unwrap(), 1);
    }

    #[test]
    fn a_closed_line_ends_connections_and_refuses_new_ones() {
        let relay = Relay::to(echo());
        let mut old = TcpStream::connect(relay.address()).unwrap();
        old.write_all(b"a").unwrap();
        assert_eq!(read(&mut old).unwrap(), 1);
        relay.set(Line::Closed);
        assert!(matches!(read(&mut old), Ok(0)));
        let mut new = TcpStream::connect(relay.address()).unwrap();
        assert!(matches!(read(&mut new), Ok(0) | Err(_)));
    }
}
