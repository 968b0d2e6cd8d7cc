//! Logs, exec, attach and port-forward: what a person at `kubectl` sees of a container.
//!
//! In comes one tunnel's target and its bytes, out go the tunnel's frames ([`Streams::run`]); the link opens the
//! gRPC stream and sends `TunnelOpen` itself.
//!
//! * [`select`] finds the container that is meant, [`logs`] reads its file, [`lines`] the file's format;
//! * [`relay`] replays the client's upgrade request to the runtime's own streaming server and copies bytes;
//! * [`query`] answers a question about the node, or runs a command to its end;
//! * [`forward`] connects ports of the host, for pods that have its network;
//! * where the runtime has no such server, [`process`] connects a process's pipes and [`spdy`] or [`websocket`]
//!   speaks the client's protocol.
//!
//! What must always hold: everything that a tunnel started ends with it, and nothing from the cloud is allocated
//! for without a limit.

mod follow;
mod forward;
mod fuzzing;
mod lines;
mod logs;
mod process;
mod query;
mod relay;
mod select;
mod spdy;
#[cfg(test)]
mod testing;
mod websocket;

pub(crate) use fuzzing::{any_client, any_target, client_seeds};

use std::path::PathBuf;
use std::sync::Arc;

use bytes::Bytes;
use http::StatusCode;
use k8s_openapi::api::core::v1::Pod;
use skerry_proto::link::open_tunnel::Target;
use skerry_proto::link::query_target::What;
use skerry_proto::link::stream_target::Verb;
use skerry_proto::link::{Header, StreamTarget, TunnelError, TunnelFrame, TunnelReady, tunnel_frame::Frame};
use tokio::sync::mpsc;

use crate::runtime::{ExecRequest, Runtime, RuntimeError, StreamEndpoint};

/// Where a site's pods are looked up by name.
pub trait PodLookup: Send + Sync {
    /// The pod as the store has it, with the newest status that is known.
    fn pod(&self, namespace: &str, name: &str) -> Option<Pod>;

    /// Whether the API knows the pod under that UID.
    fn has_uid(&self, pod: &Pod, uid: &str) -> bool {
        pod.metadata.uid.as_deref() == Some(uid)
    }
}

/// Answers questions about the whole node.
#[async_trait::async_trait]
pub trait Queries: Send + Sync {
    /// The answer, compressed as [`skerry_proto::object::compress`] does.
    async fn answer(&self, what: What) -> Result<Vec<u8>, StreamError>;
}

/// Why a tunnel cannot be served: an HTTP status and words for the person who asked.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct StreamError {
    /// HTTP status.
    pub status: StatusCode,
    /// What the person reads.
    pub message: String,
}

impl StreamError {
    fn new(status: StatusCode, message: impl Into<String>) -> Self {
        Self {
            status,
            message: message.into(),
        }
    }

    fn bad_request(message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, message)
    }

    fn not_found(message: impl Into<String>) -> Self {
        Self::new(StatusCode::NOT_FOUND, message)
    }
}

impl From<RuntimeError> for StreamError {
    fn from(error: RuntimeError) -> Self {
        let status = match &error {
            RuntimeError::NotFound(_) => StatusCode::NOT_FOUND,
            RuntimeError::Invalid(_) => StatusCode::BAD_REQUEST,
            RuntimeError::Unsupported { .. } => StatusCode::NOT_IMPLEMENTED,
            RuntimeError::Unavailable { .. } => StatusCode::SERVICE_UNAVAILABLE,
            RuntimeError::Timeout(_) => StatusCode::GATEWAY_TIMEOUT,
            RuntimeError::Busy(_) => StatusCode::TOO_MANY_REQUESTS,
            RuntimeError::Failed(_) => StatusCode::INTERNAL_SERVER_ERROR,
        };
        Self::new(status, error.to_string())
    }
}

/// Serves tunnels. Cheap to share behind an `Arc`.
pub struct Streams {
    runtime: Arc<dyn Runtime>,
    pods: Arc<dyn PodLookup>,
    log_root: PathBuf,
    queries: Option<Arc<dyn Queries>>,
}

/// The edge's end of one tunnel.
struct Wire {
    /// From the cloud; closed when the user has gone or has half-closed.
    incoming: mpsc::Receiver<Bytes>,
    /// To the cloud; closed when the tunnel is gone.
    out: mpsc::Sender<TunnelFrame>,
}

impl Wire {
    async fn ready(&self, status: u16, headers: Vec<Header>) -> bool {
        let ready = TunnelReady {
            status: u32::from(status),
            headers,
        };
        self.send(Frame::Ready(ready)).await
    }

    async fn send(&self, frame: Frame) -> bool {
        send(&self.out, frame).await
    }
}

/// Sends one frame; false when the tunnel is gone.
async fn send(out: &mpsc::Sender<TunnelFrame>, frame: Frame) -> bool {
    out.send(TunnelFrame { frame: Some(frame) }).await.is_ok()
}

impl Streams {
    /// Serves the containers of `runtime` for the pods in `pods`. `log_root` is where the pods' log directories
    /// are, normally `/var/log/pods`.
    pub fn new(runtime: Arc<dyn Runtime>, pods: Arc<dyn PodLookup>, log_root: PathBuf) -> Self {
        Self {
            runtime,
            pods,
            log_root,
            queries: None,
        }
    }

    /// The same with answers about the node.
    pub fn answering(mut self, queries: Arc<dyn Queries>) -> Self {
        self.queries = Some(queries);
        self
    }

    /// Serves one tunnel to its end: sends `TunnelReady` or `TunnelError`, then data.
    ///
    /// `incoming` closing is the end of the client's direction; `out` closing ends everything. Dropping the future
    /// does, too.
    pub async fn run(&self, target: Target, incoming: mpsc::Receiver<Bytes>, out: mpsc::Sender<TunnelFrame>) {
        let closed = out.clone();
        let failed = out.clone();
        let wire = Wire { incoming, out };
        let serve = async {
            match target {
                Target::Logs(target) => logs::serve(self, &target, wire).await,
                Target::Stream(target) => self.stream(target, wire).await,
                Target::Query(target) => query::serve(self, &target, wire).await,
            }
        };
        tokio::select! {
            outcome = serve => if let Err(error) = outcome {
                let error = TunnelError { status: u32::from(error.status.as_u16()), message: error.message };
                // The tunnel may be gone, which is no matter.
                let _ = failed.send(TunnelFrame { frame: Some(Frame::Error(error)) }).await;
            },
            () = closed.closed() => {}
        }
    }

    async fn stream(&self, target: StreamTarget, wire: Wire) -> Result<(), StreamError> {
        let pod = select::pod(&*self.pods, &target.namespace, &target.pod, &target.uid)?;
        let inventory = self.runtime.list().await?;
        let request = ExecRequest {
            command: target.command.clone(),
            stdin: target.stdin,
            stdout: target.stdout,
            stderr: target.stderr && !target.tty,
            tty: target.tty,
        };
        let endpoint = match target.verb() {
            Verb::Exec => {
                let container = select::running(&pod, &target.container, &inventory)?;
                if request.command.is_empty() {
                    return Err(StreamError::bad_request("exec needs a command"));
                }
                self.runtime.exec(&container.id, &request).await?
            }
            Verb::Attach => {
                let container = select::running(&pod, &target.container, &inventory)?;
                self.runtime.attach(&container.id, &request).await?
            }
            Verb::PortForward => {
                let sandbox = select::sandbox(&pod, &inventory)?;
                let ports: Vec<u16> = target
                    .ports
                    .iter()
                    .filter_map(|&port| u16::try_from(port).ok())
                    .collect();
                self.runtime.port_forward(&sandbox.id, &ports).await?
            }
            Verb::Unspecified => {
                return Err(StreamError::new(
                    StatusCode::NOT_IMPLEMENTED,
                    "this edge daemon does not know the kind of stream that was asked for; update it",
                ));
            }
        };
        match endpoint {
            StreamEndpoint::Url(url) => relay::serve(&url, &target, wire).await,
            StreamEndpoint::Host => forward::serve(&target, wire).await,
            StreamEndpoint::Process(process) => process::serve(process, &request, &target, wire).await,
        }
    }
}
