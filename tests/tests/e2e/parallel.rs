//! Hundreds of streams through one site at the same time, and what is left of them: nothing.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::process::{Child, Stdio};
use std::time::Duration;

use serde_json::json;
use skerry_tests::cluster::http_get;
use skerry_tests::pods::ready;
use skerry_tests::relay::Line;
use skerry_tests::runner::{Scenario, Test};
use skerry_tests::site::Site;
use skerry_tests::wait::{SOON, eventually, same};

/// Streams at the same time.
const STREAMS: usize = 300;
/// Every so many of them, one is an exec; the others follow a log.
const EXEC_EVERY: usize = 5;

pub(crate) fn scenarios() -> Vec<Scenario> {
    [
        Scenario::once(
            "three hundred streams through one site carry their bytes and leave nothing behind",
            three_hundred,
        ),
        Scenario::each(
            "streams end on both sides when the line is cut or the daemon is killed",
            either_side,
        ),
    ]
    .into_iter()
    .flatten()
    .collect()
}

/// `kubectl proxy`: the API in plain HTTP, for clients that are a socket each.
struct Proxy {
    child: Child,
    address: SocketAddr,
}

impl Proxy {
    fn start(t: &Test<'_>) -> Self {
        // exec is refused by default.
        let mut command = t.kubectl.command(&["proxy", "--port=0", "--reject-paths=^$"]);
        let mut child = command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut line = String::new();
        let mut out = BufReader::new(child.stdout.take().unwrap());
        out.read_line(&mut line).unwrap();
        let address = line.trim().rsplit(' ').next().unwrap().parse().unwrap();
        Self { child, address }
    }

    fn ask(&self, path: &str, headers: &str) -> Stream {
        let mut socket = TcpStream::connect(self.address).unwrap();
        socket.set_read_timeout(Some(SOON)).unwrap();
        write!(socket, "GET {path} HTTP/1.1\r\nHost: localhost\r\n{headers}\r\n").unwrap();
        Stream(BufReader::new(socket))
    }

    fn follow(&self, namespace: &str) -> Stream {
        self.ask(
            &format!("/api/v1/namespaces/{namespace}/pods/pod/log?follow=true"),
            "Connection: close\r\n",
        )
    }

    /// `cat MARK -`.
    fn exec(&self, namespace: &str, mark: &str) -> Stream {
        let path = format!(
            "/api/v1/namespaces/{namespace}/pods/pod/exec?command=cat&command={mark}&command=-&stdin=true&stdout=true"
        );
        let upgrade = "Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n\
                       Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Protocol: v4.channel.k8s.io\r\n";
        self.ask(&path, upgrade)
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

struct Stream(BufReader<TcpStream>);

impl Stream {
    /// Reads until `text` has come.
    fn wait_for(&mut self, text: &str) {
        let mut seen = Vec::new();
        while !seen.windows(text.len()).any(|part| part == text.as_bytes()) {
            let mut byte = [0];
            let read = self.0.read(&mut byte);
            assert!(
                matches!(read, Ok(1)),
                "{read:?} before {text:?}, after {:?}",
                String::from_utf8_lossy(&seen)
            );
            seen.push(byte[0]);
        }
    }

    /// Sends a message on the channel of stdin; a client masks what it sends, with zeros here.
    fn type_in(&mut self, text: &str) {
        let length = u8::try_from(text.len() + 1).unwrap();
        assert!(length < 126);
        let head = [0x82, 0x80 | length, 0, 0, 0, 0, 0];
        let message = [&head[..], text.as_bytes()].concat();
        self.0.get_mut().write_all(&message).unwrap();
    }

    /// Reads to the end, whatever that is.
    fn ends(mut self, within: Duration) -> bool {
        self.0.get_ref().set_read_timeout(Some(within)).unwrap();
        let mut rest = Vec::new();
        let read = self.0.read_to_end(&mut rest);
        !matches!(read, Err(error) if matches!(error.kind(), std::io::ErrorKind::WouldBlock | std::io::ErrorKind::TimedOut))
    }
}

fn talker(t: &Test<'_>, site: &Site) -> String {
    let script = "echo ready to be followed; sleep 10000";
    t.kubectl
        .apply(&site.pod("pod", json!({"containers": [{"command": ["sh", "-c", script]}]})));
    let pod = ready(&t.kubectl, "pod");
    pod["metadata"]["namespace"].as_str().unwrap().to_owned()
}

/// Streams that a daemon counts as open; 0 when it names none.
fn gauge(text: &str, line: &str) -> u64 {
    let found = text.lines().find_map(|l| l.strip_prefix(line)?.strip_prefix(' '));
    found.map_or(0, |value| value.parse().unwrap())
}

fn open_at_the_edge(site: &Site) -> Result<u64, String> {
    Ok(gauge(&site.http("/metrics")?.1, "skerry_tunnels"))
}

fn open_at_the_provider(t: &Test<'_>, site: &Site) -> Result<u64, String> {
    let text = http_get(t.cluster.metrics(), "/metrics")?.1;
    Ok(gauge(
        &text,
        &format!("skerry_tunnels{{node=\"{}\"}}", site.name()),
    ))
}

fn descriptors(site: &Site) -> usize {
    let dir = format!("/proc/{}/fd", site.pid());
    std::fs::read_dir(dir).unwrap().count()
}

/// Processes on this machine that run the command of [`Proxy::exec`] with that argument.
fn commands(mark: &str) -> usize {
    let wanted = format!("cat\0{mark}\0-\0");
    std::fs::read_dir("/proc")
        .unwrap()
        .flatten()
        .filter_map(|entry| std::fs::read(entry.path().join("cmdline")).ok())
        .filter(|line| line.as_slice() == wanted.as_bytes())
        .count()
}

fn nothing_left(t: &Test<'_>, site: &Site, before: usize) {
    eventually(SOON, "no stream is left on either side", || {
        same(open_at_the_edge(site)?, 0)?;
        same(open_at_the_provider(t, site)?, 0)?;
        let now = descriptors(site);
        // A connection to the daemon's own metrics, or a timer of the allocator's: not one for each stream.
        same(now <= before + 10, true).map_err(|_| format!("{now} descriptors, {before} before"))
    });
}

fn three_hundred(t: &Test<'_>) {
    /// Unbuffered, which both kinds of cat take and do anyway.
    const MARK: &str = "-u";
    let site = t.own_site();
    let namespace = talker(t, &site);
    let proxy = Proxy::start(t);
    // One of each, so that everything that is made once is made.
    proxy.follow(&namespace).wait_for("ready to be followed");
    eventually(SOON, "the first stream is gone", || {
        same(open_at_the_edge(&site)?, 0)
    });
    let before = descriptors(&site);
    let mut streams: Vec<(usize, Stream)> = (0..STREAMS)
        .map(|i| match i % EXEC_EVERY {
            0 => (i, proxy.exec(&namespace, MARK)),
            _ => (i, proxy.follow(&namespace)),
        })
        .collect();
    for (i, stream) in &mut streams {
        match *i % EXEC_EVERY {
            0 => {
                stream.wait_for("\r\n\r\n");
                stream.type_in(&format!("this is stream {i}."));
                stream.wait_for(&format!("this is stream {i}."));
            }
            _ => stream.wait_for("ready to be followed"),
        }
    }
    let wanted = u64::try_from(STREAMS).unwrap();
    assert_eq!(open_at_the_edge(&site).unwrap(), wanted);
    assert_eq!(open_at_the_provider(t, &site).unwrap(), wanted);
    // A heartbeat and a status pass beside them.
    t.kubectl
        .run(&["delete", "pod", "pod", "--grace-period=1", "--wait=true"]);
    for (i, stream) in streams {
        assert!(stream.ends(SOON), "stream {i} goes on after its container");
    }
    nothing_left(t, &site, before);
    eventually(SOON, "no command is left", || same(commands(MARK), 0));

    // And when the clients go first.
    let namespace = talker(t, &site);
    let mut streams: Vec<Stream> = (0..40).map(|_| proxy.exec(&namespace, MARK)).collect();
    for stream in &mut streams {
        stream.wait_for("\r\n\r\n");
    }
    drop(streams);
    nothing_left(t, &site, before);
    eventually(SOON, "no command is left", || same(commands(MARK), 0));
    t.kubectl
        .run(&["delete", "pod", "pod", "--grace-period=1", "--wait=true"]);
}

fn either_side(t: &Test<'_>) {
    let mut site = t.own_site();
    let namespace = talker(t, &site);
    let proxy = Proxy::start(t);
    let open = || {
        let mut streams = vec![proxy.follow(&namespace), proxy.exec(&namespace, "--")];
        streams[0].wait_for("ready to be followed");
        streams[1].wait_for("\r\n\r\n");
        streams[1].type_in("echo me");
        streams[1].wait_for("echo me");
        streams
    };
    let streams = open();
    let before = descriptors(&site);
    site.line().set(Line::Closed);
    for stream in streams {
        assert!(stream.ends(SOON), "a stream goes on after the line was cut");
    }
    eventually(SOON, "the daemon has given its streams up", || {
        same(open_at_the_edge(&site)?, 0)
    });
    site.line().set(Line::Up);
    site.wait_ready();
    let again = eventually(SOON, "the site streams again", || {
        t.kubectl.attempt(&["exec", "pod", "--", "echo", "back"])
    });
    assert_eq!(again, "back\n");
    nothing_left(t, &site, before);

    let streams = open();
    site.kill_edge();
    for stream in streams {
        assert!(stream.ends(SOON), "a stream goes on after the daemon was killed");
    }
    eventually(SOON, "the provider has given its streams up", || {
        same(open_at_the_provider(t, &site)?, 0)
    });
    site.start_edge();
    site.wait_ready();
    assert_eq!(
        skerry_tests::pods::ready(&t.kubectl, "pod")["status"]["containerStatuses"][0]["restartCount"],
        0
    );
    t.kubectl
        .run(&["delete", "pod", "pod", "--grace-period=1", "--wait=true"]);
}
