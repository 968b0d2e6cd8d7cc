//! A session with a client and a process in memory.

use super::*;
use tokio::sync::oneshot;

#[test]
fn the_first_known_protocol_of_the_client_wins() {
    let target = |protocols: &str| StreamTarget {
        headers: vec![
            process::our_header("Sec-WebSocket-Key", "dGhlIHNhbXBsZSBub25jZQ=="),
            process::our_header("Sec-WebSocket-Protocol", protocols),
        ],
        ..StreamTarget::default()
    };
    let (protocol, headers) = handshake(&target("v9.x, v4.channel.k8s.io, v5.channel.k8s.io")).unwrap();
    assert_eq!(protocol.name, "v4.channel.k8s.io");
    // The example of RFC 6455, section 1.3.
    assert_eq!(
        process::header(&headers, "Sec-WebSocket-Accept"),
        Some("s3pPLMBiTxaQ9kYGzzhZRbK+xOo=")
    );
    assert_eq!(handshake(&target("")).unwrap().0, UNNAMED);
    assert!(handshake(&target("v9.x")).is_err());
}

#[test]
fn channels_are_told_apart_in_both_encodings() {
    let mut resizes = Resizes::default();
    let [v5, v4, v4_base64, ..] = PROTOCOLS;
    assert_eq!(
        decode(v5, Bytes::from_static(b"\0hi"), &mut resizes),
        [FromClient::Stdin("hi".into())]
    );
    assert_eq!(
        decode(v5, Bytes::from_static(b"\xff\0"), &mut resizes),
        [FromClient::StdinEnd]
    );
    assert_eq!(decode(v4, Bytes::from_static(b"\xff\0"), &mut resizes), []);
    assert_eq!(
        decode(v4_base64, Bytes::from_static(b"0aGk="), &mut resizes),
        [FromClient::Stdin("hi".into())]
    );
    let size = Bytes::from_static(b"\x04{\"Width\":8,\"Height\":2}");
    assert_eq!(decode(v4, size, &mut resizes), [FromClient::Resize(8, 2)]);
    assert_eq!(encode(v4_base64, STDOUT, b"hi"), Message::text("1aGk="));
    assert_eq!(encode(v4, STDERR, b"hi"), Message::binary(&b"\x02hi"[..]));
}

#[tokio::test]
async fn a_process_echoes_and_its_outcome_comes_before_the_close() {
    let (ours, theirs) = tokio::io::duplex(4096);
    let (stdin, mut process_in) = tokio::io::duplex(64);
    let (mut process_out, stdout) = tokio::io::duplex(64);
    let (exit_sender, exit) = oneshot::channel();
    let process = StreamedProcess {
        stdin: Some(Box::new(stdin)),
        stdout: Some(Box::new(stdout)),
        stderr: None,
        resize: None,
        exit,
    };
    tokio::spawn(async move {
        tokio::io::copy(&mut process_in, &mut process_out).await.unwrap();
        drop(process_out);
        exit_sender.send(0).unwrap();
    });
    let request = ExecRequest {
        command: vec!["cat".into()],
        stdin: true,
        stdout: true,
        stderr: false,
        tty: false,
    };
    let server = WebSocketStream::from_raw_socket(ours, Role::Server, None).await;
    let server =
        tokio::spawn(async move { serve_socket(process, &request, false, PROTOCOLS[0], server).await });
    let mut client = WebSocketStream::from_raw_socket(theirs, Role::Client, None).await;
    client.send(Message::binary(&b"\0hi"[..])).await.unwrap();
    client.send(Message::binary(&[CLOSE, STDIN][..])).await.unwrap();
    let mut messages = vec![];
    while let Some(Ok(message)) = client.next().await {
        messages.push(message);
    }
    assert_eq!(messages[0], Message::binary(&b"\x01"[..]));
    assert_eq!(messages[1], Message::binary(&b"\x01hi"[..]));
    assert_eq!(
        messages[2],
        Message::binary(&b"\x03{\"metadata\":{},\"status\":\"Success\"}"[..])
    );
    assert!(
        matches!(&messages[3], Message::Close(Some(close)) if close.code == CloseCode::Normal),
        "{messages:?}"
    );
    server.await.unwrap();
}

proptest::proptest! {
    #[test]
    fn any_message_decodes(bytes: Vec<u8>, base64: bool) {
        let protocol = PROTOCOLS[if base64 { 2 } else { 0 }];
        decode(protocol, bytes.into(), &mut Resizes::default());
    }
}
