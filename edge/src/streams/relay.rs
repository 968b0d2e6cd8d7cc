//! Replays a client's upgrade request to the runtime's own streaming server and copies bytes, as a kubelet does.
//!
//! The runtime's server (containerd, CRI-O) speaks the client's protocol; nothing here looks into it. The request
//! keeps its method and headers, only the path becomes that of the one-time URL.

use std::net::{IpAddr, Ipv4Addr};
use std::time::Duration;

use bytes::{Buf, Bytes, BytesMut};
use http::header::{self, HeaderName, HeaderValue};
use http::{Method, StatusCode, Uri};
use skerry_proto::limits::TUNNEL_CHUNK_BYTES;
use skerry_proto::link::{Header, StreamTarget, tunnel_frame::Frame};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::mpsc;

use super::{StreamError, Wire};

/// Largest response head, and largest body of a refusal.
const MAX_HEAD_BYTES: usize = 64 * 1024;

/// How long the runtime may take to accept the connection and to answer the request.
const ANSWER_LIMIT: Duration = Duration::from_secs(9);

/// Serves `target` from the runtime's streaming server at `url`.
pub(super) async fn serve(url: &str, target: &StreamTarget, wire: Wire) -> Result<(), StreamError> {
    let (address, path) = loopback(url)?;
    let request = request(&address, &path, target)?;
    let answer = tokio::time::timeout(ANSWER_LIMIT, ask(address, &request));
    let (head, rest, stream) = answer
        .await
        .map_err(|_| gateway("the container runtime's streaming server does not answer"))?
        .map_err(|error| {
            gateway(format!(
                "the container runtime's streaming server failed: {error}"
            ))
        })?;
    if head.status != StatusCode::SWITCHING_PROTOCOLS {
        return refused(head, rest, stream, wire).await;
    }
    if !wire.ready(head.status.as_u16(), head.headers).await {
        return Ok(());
    }
    pump(rest, stream, wire).await;
    Ok(())
}

fn gateway(message: impl Into<String>) -> StreamError {
    StreamError::new(StatusCode::BAD_GATEWAY, message)
}

/// Address and path of a URL, which must be on this machine: a runtime must not make the daemon dial elsewhere.
fn loopback(url: &str) -> Result<((IpAddr, u16), String), StreamError> {
    let wrong = || {
        gateway(format!(
            "the container runtime gave the streaming URL {url:?}, which is not http on loopback"
        ))
    };
    let uri: Uri = url.parse().map_err(|_| wrong())?;
    if uri.scheme_str() != Some("http") {
        return Err(wrong());
    }
    let host = uri.host().ok_or_else(wrong)?;
    let ip = match host {
        "localhost" => IpAddr::V4(Ipv4Addr::LOCALHOST),
        host => host.trim_matches(['[', ']']).parse().map_err(|_| wrong())?,
    };
    if !ip.is_loopback() {
        return Err(wrong());
    }
    let path = uri.path_and_query().map_or("/", |path| path.as_str());
    Ok(((ip, uri.port_u16().unwrap_or(80)), path.to_owned()))
}

fn request(address: &(IpAddr, u16), path: &str, target: &StreamTarget) -> Result<Vec<u8>, StreamError> {
    let wrong = |what: &str| StreamError::bad_request(format!("the upgrade request has a malformed {what}"));
    let method: Method = target.method.parse().map_err(|_| wrong("method"))?;
    let host = std::net::SocketAddr::from(*address);
    let mut text = format!("{method} {path} HTTP/1.1\r\nHost: {host}\r\nContent-Length: 0\r\n").into_bytes();
    for Header { name, value } in &target.headers {
        // Both parsers refuse line breaks, so that no second request can be smuggled in.
        let name = HeaderName::from_bytes(name.as_bytes()).map_err(|_| wrong("header name"))?;
        let value = HeaderValue::from_bytes(value).map_err(|_| wrong("header value"))?;
        let ours = [
            header::HOST,
            header::CONTENT_LENGTH,
            header::TRANSFER_ENCODING,
            header::AUTHORIZATION,
        ];
        if ours.contains(&name) {
            continue;
        }
        text.extend_from_slice(name.as_str().as_bytes());
        text.extend_from_slice(b": ");
        text.extend_from_slice(value.as_bytes());
        text.extend_from_slice(b"\r\n");
    }
    text.extend_from_slice(b"\r\n");
    Ok(text)
}

async fn ask(address: (IpAddr, u16), request: &[u8]) -> std::io::Result<(Head, BytesMut, TcpStream)> {
    let mut stream = TcpStream::connect(address).await?;
    stream.set_nodelay(true)?;
    stream.write_all(request).await?;
    let (head, rest) = read_head(&mut stream).await?;
    Ok((head, rest, stream))
}

/// Status and headers of a response.
#[derive(Debug)]
struct Head {
    status: StatusCode,
    headers: Vec<Header>,
}

/// Reads a response head; bytes that came after it belong to the stream.
async fn read_head<S: AsyncRead + Unpin>(stream: &mut S) -> std::io::Result<(Head, BytesMut)> {
    let mut buffer = BytesMut::with_capacity(4096);
    loop {
        if let Some(end) = buffer.windows(4).position(|window| window == b"\r\n\r\n") {
            let head = buffer.split_to(end);
            buffer.advance(4);
            let head = parse_head(&head).ok_or_else(|| std::io::Error::other("malformed response"))?;
            return Ok((head, buffer));
        }
        if buffer.len() > MAX_HEAD_BYTES {
            return Err(std::io::Error::other("the response head is too large"));
        }
        if stream.read_buf(&mut buffer).await? == 0 {
            return Err(std::io::ErrorKind::UnexpectedEof.into());
        }
    }
}

fn parse_head(head: &[u8]) -> Option<Head> {
    let text = std::str::from_utf8(head).ok()?;
    let mut lines = text.split("\r\n");
    let mut status = lines.next()?.splitn(3, ' ');
    status.next().filter(|version| version.starts_with("HTTP/1."))?;
    let status = StatusCode::from_bytes(status.next()?.as_bytes()).ok()?;
    let headers = lines.map(|line| {
        let (name, value) = line.split_once(':')?;
        HeaderName::from_bytes(name.as_bytes()).ok()?;
        Some(Header {
            name: name.to_owned(),
            value: Bytes::copy_from_slice(value.trim().as_bytes()),
        })
    });
    Some(Head {
        status,
        headers: headers.collect::<Option<_>>()?,
    })
}

/// Hostile bytes as the head of an engine's answer.
pub(super) fn any_head(bytes: &[u8]) {
    let _ = parse_head(bytes);
}

/// The runtime refused the upgrade: its words are for the person who asked.
async fn refused(
    head: Head,
    mut body: BytesMut,
    mut stream: TcpStream,
    wire: Wire,
) -> Result<(), StreamError> {
    let length = head
        .headers
        .iter()
        .find(|header| header.name.eq_ignore_ascii_case("content-length"))
        .and_then(|header| std::str::from_utf8(&header.value).ok()?.parse::<usize>().ok());
    let Some(length) = length.filter(|&length| length <= MAX_HEAD_BYTES) else {
        return Err(StreamError::new(
            head.status,
            format!("the container runtime answered {}", head.status),
        ));
    };
    while body.len() < length {
        let read = tokio::time::timeout(ANSWER_LIMIT, stream.read_buf(&mut body)).await;
        if !matches!(read, Ok(Ok(count)) if count > 0) {
            break;
        }
    }
    body.truncate(length);
    let useful = |header: &Header| {
        let name = header.name.to_ascii_lowercase();
        name.starts_with("x-") || name == "content-type" || name == "retry-after"
    };
    let headers = head.headers.into_iter().filter(useful).collect();
    if wire.ready(head.status.as_u16(), headers).await {
        let mut body = body.freeze();
        while !body.is_empty() {
            let chunk = body.split_to(body.len().min(TUNNEL_CHUNK_BYTES));
            wire.send(Frame::Data(chunk)).await;
        }
    }
    Ok(())
}

/// Copies both ways. The end of the client's direction is passed on and leaves the other one open.
async fn pump(rest: BytesMut, stream: TcpStream, wire: Wire) {
    let Wire { incoming, out } = wire;
    let (read, write) = stream.into_split();
    let up = up(
        rest,
        read,
        Wire {
            incoming: mpsc::channel(1).1,
            out,
        },
    );
    let down = down(incoming, write);
    tokio::pin!(up, down);
    tokio::select! {
        // Streaming servers close both directions at once: after the last byte nothing more is read.
        () = &mut up => {}
        () = &mut down => up.await,
    }
}

async fn up(rest: BytesMut, mut read: OwnedReadHalf, wire: Wire) {
    let mut buffer = rest;
    loop {
        while !buffer.is_empty() {
            let chunk = buffer.split_to(buffer.len().min(TUNNEL_CHUNK_BYTES)).freeze();
            if !wire.send(Frame::Data(chunk)).await {
                return;
            }
        }
        buffer.reserve(TUNNEL_CHUNK_BYTES);
        match read.read_buf(&mut buffer).await {
            Ok(count) if count > 0 => {}
            _ => return,
        }
    }
}

async fn down(mut incoming: mpsc::Receiver<Bytes>, mut write: OwnedWriteHalf) {
    while let Some(bytes) = incoming.recv().await {
        if write.write_all(&bytes).await.is_err() {
            return;
        }
    }
    // The runtime sees the end of the client's direction; it may be gone already.
    let _ = write.shutdown().await;
}

#[cfg(test)]
mod tests {
    use super::*;
    use skerry_proto::link::{TunnelFrame, TunnelReady};
    use tokio::net::TcpListener;

    fn target() -> StreamTarget {
        let header = |name: &str, value: &'static str| Header {
            name: name.into(),
            value: value.into(),
        };
        StreamTarget {
            method: "POST".into(),
            headers: vec![
                header("Connection", "Upgrade"),
                header("Upgrade", "SPDY/3.1"),
                header("Authorization", "Bearer secret"),
            ],
            ..StreamTarget::default()
        }
    }

    /// Serves one connection with `answer`, then echoes; answers the request head that it got.
    async fn server(answer: &'static str) -> (String, tokio::task::JoinHandle<String>) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}/exec/token", listener.local_addr().unwrap());
        let task = tokio::spawn(async move {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut head = vec![];
            while !head.ends_with(b"\r\n\r\n") {
                head.push(stream.read_u8().await.unwrap());
            }
            stream.write_all(answer.as_bytes()).await.unwrap();
            let (mut read, mut write) = stream.split();
            let _ = tokio::io::copy(&mut read, &mut write).await;
            String::from_utf8(head).unwrap()
        });
        (url, task)
    }

    async fn frames(mut out: mpsc::Receiver<TunnelFrame>) -> (Option<TunnelReady>, String) {
        let (mut ready, mut text) = (None, String::new());
        while let Some(frame) = out.recv().await {
            match frame.frame {
                Some(Frame::Ready(frame)) => ready = Some(frame),
                Some(Frame::Data(bytes)) => text.push_str(std::str::from_utf8(&bytes).unwrap()),
                other => panic!("{other:?}"),
            }
        }
        (ready, text)
    }

    #[tokio::test]
    async fn an_upgraded_connection_is_copied_both_ways_to_the_last_byte() {
        let (url, server) =
            server("HTTP/1.1 101 Switching Protocols\r\nUpgrade: SPDY/3.1\r\n\r\nearly ").await;
        let (to_edge, incoming) = mpsc::channel(4);
        let (out, from_edge) = mpsc::channel(64);
        to_edge.send(Bytes::from_static(b"echo")).await.unwrap();
        drop(to_edge);
        let target = target();
        let (outcome, (ready, text)) =
            tokio::join!(serve(&url, &target, Wire { incoming, out }), frames(from_edge));
        outcome.unwrap();
        let ready = ready.unwrap();
        assert_eq!((ready.status, ready.headers.len()), (101, 1));
        assert_eq!(text, "early echo");
        let head = server.await.unwrap();
        assert!(head.starts_with("POST /exec/token HTTP/1.1\r\n"), "{head}");
        assert!(
            head.contains("upgrade: SPDY/3.1\r\n") && !head.contains("secret"),
            "{head}"
        );
    }

    #[tokio::test]
    async fn a_refusal_comes_with_its_status_and_words() {
        let (url, _server) = server("HTTP/1.1 404 Not Found\r\nContent-Length: 4\r\n\r\ngone").await;
        let (_to_edge, incoming) = mpsc::channel(4);
        let (out, from_edge) = mpsc::channel(64);
        let target = target();
        let (outcome, (ready, text)) =
            tokio::join!(serve(&url, &target, Wire { incoming, out }), frames(from_edge));
        outcome.unwrap();
        assert_eq!((ready.unwrap().status, text.as_str()), (404, "gone"));
    }

    #[test]
    fn only_loopback_is_dialled() {
        assert!(loopback("http://127.0.0.1:10010/exec/a").is_ok());
        assert!(loopback("http://[::1]:10010/exec/a").is_ok());
        for url in [
            "http://10.0.0.1/exec/a",
            "https://127.0.0.1/x",
            "http://example.com/",
            "nonsense",
            "",
        ] {
            assert!(loopback(url).is_err(), "{url}");
        }
    }

    #[test]
    fn a_header_with_a_line_break_is_refused() {
        let mut target = target();
        target.headers.push(Header {
            name: "X".into(),
            value: Bytes::from_static(b"a\r\nHost: b"),
        });
        assert!(request(&("127.0.0.1".parse().unwrap(), 1), "/", &target).is_err());
    }

    proptest::proptest! {
        #[test]
        fn any_bytes_parse_to_a_head_or_nothing(bytes: Vec<u8>) {
            let _ = parse_head(&bytes);
        }
    }
}
