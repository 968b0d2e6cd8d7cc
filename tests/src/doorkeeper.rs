//! A doorkeeper before a registry: holds the requests for manifests back, counts whose pulls wait at the same time, or
//! turns all away.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{BufRead, BufReader, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Condvar, Mutex, PoisonError};

/// What becomes of a request for a manifest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Door {
    /// It goes through.
    Open,
    /// It waits.
    Closed,
    /// It is answered with 429, Too Many Requests.
    Busy,
}

/// The doorkeeper. It serves until the test program ends.
pub struct Doorkeeper {
    address: SocketAddr,
    shared: Arc<Shared>,
}

struct Shared {
    registry: SocketAddr,
    state: Mutex<State>,
    changed: Condvar,
}

struct State {
    door: Door,
    /// Requests that wait, by repository.
    waiting: BTreeMap<String, usize>,
    /// Repositories that may pass although the door is closed.
    let_in: BTreeSet<String>,
    turned_away: usize,
}

impl Doorkeeper {
    /// Stands before the registry at that address, its door open.
    pub fn before(registry: SocketAddr) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port for the doorkeeper");
        let address = listener.local_addr().expect("a bound listener has an address");
        let shared = Arc::new(Shared {
            registry,
            state: Mutex::new(State {
                door: Door::Open,
                waiting: BTreeMap::new(),
                let_in: BTreeSet::new(),
                turned_away: 0,
            }),
            changed: Condvar::new(),
        });
        let serving = Arc::clone(&shared);
        std::thread::spawn(move || {
            for client in listener.incoming().flatten() {
                let shared = Arc::clone(&serving);
                std::thread::spawn(move || shared.serve(client));
            }
        });
        Self { address, shared }
    }

    /// Its name in references: `127.0.0.1:PORT`.
    pub fn host(&self) -> String {
        self.address.to_string()
    }

    /// What becomes of requests for manifests from now on; those that wait go on when the door opens.
    pub fn set(&self, door: Door) {
        self.shared.lock().door = door;
        self.shared.changed.notify_all();
    }

    /// The repositories whose manifests are waited for now.
    pub fn waiting(&self) -> BTreeSet<String> {
        self.shared.lock().waiting.keys().cloned().collect()
    }

    /// Lets the requests of one repository through.
    pub fn let_in(&self, repository: &str) {
        self.shared.lock().let_in.insert(repository.to_owned());
        self.shared.changed.notify_all();
    }

    /// How many requests were answered with 429.
    pub fn turned_away(&self) -> usize {
        self.shared.lock().turned_away
    }
}

impl Shared {
    fn lock(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// One request; clients are told that there is no second on the same connection.
    fn serve(&self, client: TcpStream) -> Option<()> {
        let mut reader = BufReader::new(client.try_clone().ok()?);
        let mut answer = client;
        let (mut head, mut line) = (String::new(), String::new());
        loop {
            line.clear();
            if reader.read_line(&mut line).ok()? == 0 {
                return None;
            }
            match line.as_str() {
                "\r\n" => break,
                // The registry closes the connection after its answer, and so the copy below ends.
                _ if line.to_ascii_lowercase().starts_with("connection:") => {}
                _ => head.push_str(&line),
            }
        }
        head.push_str("Connection: close\r\n\r\n");
        let path = head.split(' ').nth(1)?;
        let repository = path
            .strip_prefix("/v2/")
            .and_then(|rest| rest.split_once("/manifests/"));
        if let Some((repository, _)) = repository
            && !self.enter(repository)
        {
            answer
                .write_all(
                    b"HTTP/1.1 429 Too Many Requests\r\nContent-Length: 0\r\nConnection: close\r\n\r\n",
                )
                .ok()?;
            return None;
        }
        let mut registry = TcpStream::connect(self.registry).ok()?;
        registry.write_all(head.as_bytes()).ok()?;
        std::io::copy(&mut registry, &mut answer).ok()?;
        answer.shutdown(Shutdown::Both).ok()
    }

    /// Waits while the door is closed; whether the request may pass.
    fn enter(&self, repository: &str) -> bool {
        let mut state = self.lock();
        *state.waiting.entry(repository.to_owned()).or_default() += 1;
        let mut state = self
            .changed
            .wait_while(state, |s| {
                s.door == Door::Closed && !s.let_in.contains(repository)
            })
            .unwrap_or_else(PoisonError::into_inner);
        if let Some(count) = state.waiting.get_mut(repository) {
            *count -= 1;
            if *count == 0 {
                state.waiting.remove(repository);
            }
        }
        let passes = state.door != Door::Busy;
        state.turned_away += usize::from(!passes);
        passes
    }
}
