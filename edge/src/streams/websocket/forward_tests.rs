//! A client in memory and ports on loopback.

use super::*;
use crate::streams::websocket::PROTOCOLS;
use tokio::net::TcpListener;
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::protocol::Role;

async fn client(ports: Vec<u16>) -> WebSocketStream<tokio::io::DuplexStream> {
    let (ours, theirs) = tokio::io::duplex(4096);
    let server = WebSocketStream::from_raw_socket(ours, Role::Server, None).await;
    let [_, v4, ..] = PROTOCOLS;
    tokio::spawn(serve_socket("p".into(), ports, v4, server));
    WebSocketStream::from_raw_socket(theirs, Role::Client, None).await
}

async fn next(client: &mut WebSocketStream<tokio::io::DuplexStream>) -> Message {
    client.next().await.unwrap().unwrap()
}

#[tokio::test]
async fn every_channel_begins_with_its_port_and_data_passes_both_ways() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let mut client = client(vec![port]).await;
    let [low, high] = port.to_le_bytes();
    assert_eq!(next(&mut client).await, Message::binary(vec![0, low, high]));
    assert_eq!(next(&mut client).await, Message::binary(vec![1, low, high]));
    let (mut program, _) = listener.accept().await.unwrap();
    client.send(Message::binary(&b"\0ping"[..])).await.unwrap();
    let mut text = [0; 4];
    program.read_exact(&mut text).await.unwrap();
    assert_eq!(&text, b"ping");
    program.write_all(b"pong").await.unwrap();
    assert_eq!(next(&mut client).await, Message::binary(&b"\0pong"[..]));
    drop(program);
    assert!(matches!(next(&mut client).await, Message::Close(_)));
}

#[tokio::test]
async fn a_port_that_nobody_listens_on_says_so_on_its_error_channel() {
    // Bound and not listening for anything any more.
    let gone = TcpListener::bind("127.0.0.1:0")
        .await
        .unwrap()
        .local_addr()
        .unwrap();
    let mut client = client(vec![gone.port()]).await;
    next(&mut client).await;
    next(&mut client).await;
    let error = next(&mut client).await.into_data();
    assert_eq!(error[0], 1);
    let text = String::from_utf8_lossy(&error[1..]).into_owned();
    assert!(text.contains("failed to connect to localhost"), "{text}");
}
