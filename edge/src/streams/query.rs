//! A question with one answer.

use std::time::Duration;

use bytes::Bytes;
use http::StatusCode;
use skerry_proto::limits::TUNNEL_CHUNK_BYTES;
use skerry_proto::link::query_target::What;
use skerry_proto::link::{QueryTarget, tunnel_frame::Frame};

use super::{StreamError, Streams, Wire, select};

/// How long a command may run; a kubelet's limit is that of its connection.
const RUN_LIMIT: Duration = Duration::from_secs(4 * 60 * 60);

pub(super) async fn serve(streams: &Streams, target: &QueryTarget, wire: Wire) -> Result<(), StreamError> {
    let mut answer = Bytes::from(match target.what() {
        What::Run => run(streams, target).await?,
        what => {
            let queries = streams.queries.as_ref().ok_or_else(|| {
                StreamError::new(
                    StatusCode::NOT_IMPLEMENTED,
                    "this edge daemon answers no questions",
                )
            })?;
            queries.answer(what).await?
        }
    });
    if !wire.ready(StatusCode::OK.as_u16(), vec![]).await {
        return Ok(());
    }
    while !answer.is_empty() {
        let chunk = answer.split_to(answer.len().min(TUNNEL_CHUNK_BYTES));
        if !wire.send(Frame::Data(chunk)).await {
            break;
        }
    }
    Ok(())
}

/// Standard output, then standard error, as a kubelet does; a command that fails is an error with both.
async fn run(streams: &Streams, target: &QueryTarget) -> Result<Vec<u8>, StreamError> {
    let pod = select::pod(&*streams.pods, &target.namespace, &target.pod, &target.uid)?;
    let inventory = streams.runtime.list().await?;
    let container = select::running(&pod, &target.container, &inventory)?;
    let output = streams
        .runtime
        .exec_sync(&container.id, &target.command, RUN_LIMIT)
        .await?;
    let printed = [output.stdout, output.stderr].concat();
    if output.code == 0 {
        return Ok(printed);
    }
    let message = format!(
        "command {:?} exited with {}: {}",
        target.command.join(" "),
        output.code,
        String::from_utf8_lossy(&printed)
    );
    Err(StreamError::new(StatusCode::INTERNAL_SERVER_ERROR, message))
}
