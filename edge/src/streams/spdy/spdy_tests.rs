//! A session with a client and a process in memory.

use super::*;
use crate::runtime::StreamEndpoint;
use crate::streams::testing::{FakeRuntime, pods, run};
use skerry_proto::link::open_tunnel::Target;
use skerry_proto::link::stream_target::Verb;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

fn target(versions: &str) -> StreamTarget {
    StreamTarget {
        verb: Verb::Exec.into(),
        namespace: "ns".into(),
        pod: "p".into(),
        container: "c".into(),
        command: vec!["cat".into()],
        stdin: true,
        stdout: true,
        method: "POST".into(),
        headers: vec![
            process::our_header("Connection", "Upgrade"),
            process::our_header("Upgrade", "SPDY/3.1"),
            process::our_header(PROTOCOL_HEADER, versions),
        ],
        ..StreamTarget::default()
    }
}

/// `cat` that exits with 3.
fn cat() -> StreamedProcess {
    let (stdin, mut process_in) = tokio::io::duplex(64);
    let (mut process_out, stdout) = tokio::io::duplex(64);
    let (exit_sender, exit) = oneshot::channel();
    tokio::spawn(async move {
        tokio::io::copy(&mut process_in, &mut process_out).await.unwrap();
        process_out.shutdown().await.unwrap();
        let _ = exit_sender.send(3);
    });
    StreamedProcess {
        stdin: Some(Box::new(stdin)),
        stdout: Some(Box::new(stdout)),
        stderr: None,
        resize: None,
        exit,
    }
}

fn start(
    versions: &str,
) -> (
    mpsc::Sender<Bytes>,
    mpsc::Receiver<TunnelFrame>,
    tokio::task::JoinHandle<()>,
) {
    let runtime = FakeRuntime::with_container("/nonexistent/0.log".as_ref(), true);
    *runtime.endpoint.lock().unwrap() = Some(StreamEndpoint::Process(cat()));
    run(runtime, pods(), Target::Stream(target(versions)))
}

#[tokio::test]
async fn a_process_echoes_and_its_exit_code_arrives() {
    let (to_edge, mut frames, task) = start("v4.channel.k8s.io, v3.channel.k8s.io");
    match frames.recv().await.unwrap().frame {
        Some(tunnel_frame::Frame::Ready(ready)) => {
            assert_eq!(ready.status, 101);
            assert_eq!(
                process::header(&ready.headers, PROTOCOL_HEADER),
                Some("v4.channel.k8s.io")
            );
        }
        other => panic!("{other:?}"),
    }
    let mut encoder = headers::Encoder::new().unwrap();
    for (id, kind) in [(1, "error"), (3, "stdin"), (5, "stdout"), (7, "nonsense")] {
        let block = encoder.encode(&[("streamtype", kind)]).unwrap();
        to_edge.send(frame::syn_stream(id, &block)).await.unwrap();
    }
    to_edge.send(frame::ping(9)).await.unwrap();
    let text = b"0123456789".repeat(50);
    to_edge.send(frame::data(3, false, &text)).await.unwrap();
    to_edge.send(frame::data(3, true, b"")).await.unwrap();

    let mut decoder = Decoder::new();
    let (mut output, mut error, mut ended, mut seen) = (vec![], vec![], vec![], vec![]);
    'session: while let Some(bytes) = frames.recv().await {
        match bytes.frame {
            Some(tunnel_frame::Frame::Data(bytes)) => decoder.push(&bytes),
            other => panic!("{other:?}"),
        }
        while let Some(frame) = decoder.next().unwrap() {
            match frame {
                Frame::Data { id, fin, bytes } => {
                    if id == 5 { &mut output } else { &mut error }.extend_from_slice(&bytes);
                    if fin {
                        ended.push(id);
                    }
                }
                Frame::GoAway => break 'session,
                other => seen.push(other),
            }
        }
    }
    assert_eq!(output, text);
    assert_eq!(ended, [5, 1]);
    assert!(
        seen.contains(&Frame::Ping(9)) && seen.contains(&Frame::Reset(7)),
        "{seen:?}"
    );
    let status: serde_json::Value = serde_json::from_slice(&error).unwrap();
    assert_eq!(status["details"]["causes"][0]["message"], "3");
    drop(to_edge);
    task.await.unwrap();
}

#[tokio::test]
async fn a_client_that_goes_takes_its_process_along() {
    let runtime = FakeRuntime::with_container("/nonexistent/0.log".as_ref(), true);
    let (stdin, mut process_in) = tokio::io::duplex(64);
    let (_running, exit) = oneshot::channel();
    let process = StreamedProcess {
        stdin: Some(Box::new(stdin)),
        stdout: None,
        stderr: None,
        resize: None,
        exit,
    };
    *runtime.endpoint.lock().unwrap() = Some(StreamEndpoint::Process(process));
    let (to_edge, _frames, task) = run(runtime, pods(), Target::Stream(target("v4.channel.k8s.io")));
    drop(to_edge);
    task.await.unwrap();
    assert_eq!(process_in.read(&mut [0; 1]).await.unwrap(), 0);
}

#[tokio::test]
async fn an_unknown_version_is_refused_with_those_that_are_known() {
    let (_to_edge, mut frames, _task) = start("v9.channel.k8s.io");
    match frames.recv().await.unwrap().frame {
        Some(tunnel_frame::Frame::Ready(ready)) => {
            assert_eq!((ready.status, ready.headers.len()), (403, VERSIONS.len()));
        }
        other => panic!("{other:?}"),
    }
}
