//! A client in memory and ports on loopback.

use super::*;
use tokio::net::TcpListener;

struct Client {
    to_edge: mpsc::Sender<Bytes>,
    frames: mpsc::Receiver<TunnelFrame>,
    decoder: Decoder,
    encoder: headers::Encoder,
    task: tokio::task::JoinHandle<Result<(), StreamError>>,
}

async fn client() -> Client {
    let target = StreamTarget {
        pod: "p".into(),
        headers: vec![
            process::our_header("Upgrade", "SPDY/3.1"),
            process::our_header(PROTOCOL_HEADER, PROTOCOL),
        ],
        ..StreamTarget::default()
    };
    let (to_edge, incoming) = mpsc::channel(8);
    let (out, mut frames) = mpsc::channel(8);
    let task = tokio::spawn(async move { serve(&target, Wire { incoming, out }).await });
    match frames.recv().await.unwrap().frame {
        Some(tunnel_frame::Frame::Ready(ready)) => assert_eq!(ready.status, 101),
        other => panic!("{other:?}"),
    }
    Client {
        to_edge,
        frames,
        decoder: Decoder::new(),
        encoder: headers::Encoder::new().unwrap(),
        task,
    }
}

impl Client {
    async fn open(&mut self, id: u32, kind: &str, port: u16, request: &str) {
        let port = port.to_string();
        let named = [("streamtype", kind), ("port", &port), ("requestid", request)];
        let headers: Vec<_> = named.into_iter().filter(|(_, value)| !value.is_empty()).collect();
        let block = self.encoder.encode(&headers).unwrap();
        self.to_edge.send(frame::syn_stream(id, &block)).await.unwrap();
    }

    async fn pair(&mut self, error: u32, data: u32, port: u16, request: &str) {
        self.open(error, "error", port, request).await;
        self.open(data, "data", port, request).await;
    }

    /// What comes on a stream until it ends.
    async fn read(&mut self, stream: u32) -> Vec<u8> {
        let mut all = Vec::new();
        loop {
            while let Some(frame) = self.decoder.next().unwrap() {
                if let Frame::Data { id, fin, bytes } = frame
                    && id == stream
                {
                    all.extend_from_slice(&bytes);
                    if fin {
                        return all;
                    }
                }
            }
            match self.frames.recv().await.unwrap().frame {
                Some(tunnel_frame::Frame::Data(bytes)) => self.decoder.push(&bytes),
                other => panic!("{other:?}"),
            }
        }
    }
}

/// Answers each connection with what it was sent, after its end.
async fn echo() -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            tokio::spawn(async move {
                let mut all = Vec::new();
                stream.read_to_end(&mut all).await.unwrap();
                stream.write_all(&all).await.unwrap();
            });
        }
    });
    port
}

#[tokio::test]
async fn connections_are_independent_and_end_in_both_directions() {
    let port = echo().await;
    let mut client = client().await;
    client.pair(1, 3, port, "0").await;
    // An old client, without request ids.
    client.pair(5, 7, port, "").await;
    for (data, text) in [(3, "first"), (7, "second")] {
        client
            .to_edge
            .send(frame::data(data, false, text.as_bytes()))
            .await
            .unwrap();
    }
    client.to_edge.send(frame::data(7, true, b"")).await.unwrap();
    assert_eq!(client.read(7).await, b"second");
    client.to_edge.send(frame::data(3, true, b"")).await.unwrap();
    assert_eq!(client.read(3).await, b"first");
    assert_eq!(client.read(1).await, b"");
    drop(client.to_edge);
    client.task.await.unwrap().unwrap();
}

#[tokio::test]
async fn a_failed_connection_says_why_and_leaves_room_for_the_next() {
    let gone = TcpListener::bind("127.0.0.1:0")
        .await
        .unwrap()
        .local_addr()
        .unwrap();
    let port = echo().await;
    let mut client = client().await;
    client.pair(1, 3, gone.port(), "0").await;
    let text = String::from_utf8(client.read(1).await).unwrap();
    assert!(text.contains("failed to connect to localhost"), "{text}");
    client.pair(5, 7, port, "1").await;
    client.to_edge.send(frame::data(7, true, b"again")).await.unwrap();
    assert_eq!(client.read(7).await, b"again");
}

#[tokio::test]
async fn a_client_that_goes_takes_its_connections_along() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let mut client = client().await;
    client
        .pair(1, 3, listener.local_addr().unwrap().port(), "0")
        .await;
    let (mut program, _) = listener.accept().await.unwrap();
    drop((client.to_edge, client.frames));
    client.task.await.unwrap().unwrap();
    assert_eq!(program.read(&mut [0; 1]).await.unwrap_or(0), 0);
}
