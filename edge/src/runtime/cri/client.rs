//! The connection to the engine: one typed function per call, with its time limit.

use std::io;
use std::path::PathBuf;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use hyper_util::rt::TokioIo;
use skerry_proto::object::Uid;
use tokio::net::UnixStream;
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Request, Response, Status, Streaming};

use super::api::image_service_client::ImageServiceClient;
use super::api::runtime_service_client::RuntimeServiceClient;
use super::api::{self, ContainerFilter, PodSandboxFilter};
use super::containerd::events_client::EventsClient;
use super::containerd::{Envelope, PublishRequest, SubscribeRequest};
use super::failure::{self, CreateError};
use super::operations::{Counted, Operations};
use crate::runtime::{ExecRequest, RegistryAuth, RuntimeError, RuntimeVersion, labels};

/// How long the engine may take for a call, beside what the call itself waits for.
const CALL_LIMIT: Duration = Duration::from_secs(120);

/// Largest answer that is read.
const MESSAGE_LIMIT: usize = 16 << 20;

/// Cheap to clone; all clones share one connection, which is made when first needed and again after it is lost.
#[derive(Clone)]
pub(super) struct Client {
    runtime: RuntimeServiceClient<Counted<Channel>>,
    images: ImageServiceClient<Counted<Channel>>,
    /// containerd's own events; other engines do not serve them.
    events: EventsClient<Counted<Channel>>,
    shared: Arc<Shared>,
}

struct Shared {
    socket: PathBuf,
    owner: String,
    scheme: OnceLock<&'static str>,
    operations: Operations,
}

impl Client {
    pub(super) fn new(socket: PathBuf, owner: &str) -> Client {
        let path = socket.clone();
        let connector = tower::service_fn(move |_| {
            let path = path.clone();
            async move { Ok::<_, io::Error>(TokioIo::new(UnixStream::connect(path).await?)) }
        });
        // The socket's path is no valid authority in HTTP/2, and the engine does not look at it.
        let channel = Endpoint::from_static("http://localhost").connect_with_connector_lazy(connector);
        let operations = Operations::default();
        let channel = Counted::new(channel, operations.clone());
        Client {
            runtime: RuntimeServiceClient::new(channel.clone()).max_decoding_message_size(MESSAGE_LIMIT),
            events: EventsClient::new(channel.clone()),
            images: ImageServiceClient::new(channel).max_decoding_message_size(MESSAGE_LIMIT),
            shared: Arc::new(Shared {
                socket,
                owner: owner.to_owned(),
                scheme: OnceLock::new(),
                operations,
            }),
        }
    }

    /// Counters of the calls.
    pub(super) fn operations(&self) -> &Operations {
        &self.shared.operations
    }

    /// Value of the label on everything that we made.
    pub(super) fn owner(&self) -> &str {
        &self.shared.owner
    }

    /// Prefix of container ids, as far as it is known.
    pub(super) fn scheme(&self) -> &'static str {
        self.shared.scheme.get().copied().unwrap_or("containerd")
    }

    /// Selects what we made, or only what is of one pod.
    fn ours(&self, pod: Option<&Uid>) -> std::collections::HashMap<String, String> {
        let owner = (labels::MANAGED_BY.to_owned(), self.shared.owner.clone());
        let pod = pod.map(|uid| (labels::POD_UID.to_owned(), uid.to_string()));
        std::iter::once(owner).chain(pod).collect()
    }

    fn error(&self, object: &str, status: &Status) -> RuntimeError {
        failure::error(&self.shared.socket, self.scheme(), object, status)
    }

    /// Waits for a call, `limit` at most.
    async fn within<T>(
        limit: Duration,
        call: impl Future<Output = Result<Response<T>, Status>>,
    ) -> Result<T, Status> {
        match tokio::time::timeout(limit, call).await {
            Ok(answer) => answer.map(Response::into_inner),
            Err(_) => Err(Status::deadline_exceeded(
                "no answer within the limit of the call",
            )),
        }
    }

    pub(super) async fn version(&self) -> Result<RuntimeVersion, RuntimeError> {
        let request = api::VersionRequest {
            version: "0.1.0".to_owned(),
        };
        let answer = Self::within(CALL_LIMIT, self.runtime.clone().version(request))
            .await
            .map_err(|status| self.error("the runtime's version", &status))?;
        let scheme = if answer.runtime_name == "cri-o" {
            "cri-o"
        } else {
            "containerd"
        };
        // An engine does not turn into another one behind the same socket while the daemon runs.
        let _ = self.shared.scheme.set(scheme);
        Ok(RuntimeVersion {
            name: answer.runtime_name,
            version: answer.runtime_version,
        })
    }

    pub(super) async fn status(&self) -> Result<api::StatusResponse, RuntimeError> {
        self.status_call(false).await
    }

    /// Free-form information about the engine, its configuration among it.
    pub(super) async fn info(&self) -> Result<std::collections::HashMap<String, String>, RuntimeError> {
        Ok(self.status_call(true).await?.info)
    }

    async fn status_call(&self, verbose: bool) -> Result<api::StatusResponse, RuntimeError> {
        let request = api::StatusRequest { verbose };
        Self::within(CALL_LIMIT, self.runtime.clone().status(request))
            .await
            .map_err(|status| self.error("the runtime's status", &status))
    }

    pub(super) async fn run_pod_sandbox(
        &self,
        request: api::RunPodSandboxRequest,
    ) -> Result<String, CreateError> {
        Self::within(CALL_LIMIT, self.runtime.clone().run_pod_sandbox(request))
            .await
            .map(|answer| answer.pod_sandbox_id)
            .map_err(|status| self.create_error("the pod's sandbox", &status))
    }

    pub(super) async fn create_container(
        &self,
        request: api::CreateContainerRequest,
    ) -> Result<String, CreateError> {
        let object = match request
            .config
            .as_ref()
            .and_then(|config| config.metadata.as_ref())
        {
            Some(metadata) => format!("container {}", metadata.name),
            None => "container".to_owned(),
        };
        Self::within(CALL_LIMIT, self.runtime.clone().create_container(request))
            .await
            .map(|answer| answer.container_id)
            .map_err(|status| self.create_error(&object, &status))
    }

    fn create_error(&self, object: &str, status: &Status) -> CreateError {
        if failure::is_name_taken(status) {
            return CreateError::NameTaken(format!("{object}: {}", status.message()));
        }
        match self.error(object, status) {
            // What is missing is something that the object needs (an image, a handler), not the object.
            RuntimeError::NotFound(_) => {
                CreateError::Other(RuntimeError::NotFound(format!("{object}: {}", status.message())))
            }
            other => CreateError::Other(other),
        }
    }

    pub(super) async fn stop_pod_sandbox(&self, id: &str) -> Result<(), RuntimeError> {
        let request = api::StopPodSandboxRequest {
            pod_sandbox_id: id.to_owned(),
        };
        self.done(
            format!("sandbox {id}"),
            CALL_LIMIT,
            self.runtime.clone().stop_pod_sandbox(request),
        )
        .await
    }

    pub(super) async fn remove_pod_sandbox(&self, id: &str) -> Result<(), RuntimeError> {
        let request = api::RemovePodSandboxRequest {
            pod_sandbox_id: id.to_owned(),
        };
        self.done(
            format!("sandbox {id}"),
            CALL_LIMIT,
            self.runtime.clone().remove_pod_sandbox(request),
        )
        .await
    }

    pub(super) async fn start_container(&self, id: &str) -> Result<(), RuntimeError> {
        let request = api::StartContainerRequest {
            container_id: id.to_owned(),
        };
        let outcome = self
            .done(
                format!("container {id}"),
                CALL_LIMIT,
                self.runtime.clone().start_container(request),
            )
            .await;
        match outcome {
            // runc's words when the container's command is not in its image or is no program.
            Err(RuntimeError::Failed(message))
                if message.contains("unable to start container process: exec: ") =>
            {
                Err(RuntimeError::Invalid(message))
            }
            other => other,
        }
    }

    pub(super) async fn stop_container(&self, id: &str, grace: Duration) -> Result<(), RuntimeError> {
        let request = api::StopContainerRequest {
            container_id: id.to_owned(),
            timeout: whole_seconds(grace),
        };
        let limit = grace.saturating_add(CALL_LIMIT);
        self.done(
            format!("container {id}"),
            limit,
            self.runtime.clone().stop_container(request),
        )
        .await
    }

    pub(super) async fn remove_container(&self, id: &str) -> Result<(), RuntimeError> {
        let request = api::RemoveContainerRequest {
            container_id: id.to_owned(),
        };
        self.done(
            format!("container {id}"),
            CALL_LIMIT,
            self.runtime.clone().remove_container(request),
        )
        .await
    }

    pub(super) async fn update_container(
        &self,
        id: &str,
        resources: api::LinuxContainerResources,
    ) -> Result<(), RuntimeError> {
        let request = api::UpdateContainerResourcesRequest {
            container_id: id.to_owned(),
            linux: Some(resources),
        };
        self.done(
            format!("container {id}"),
            CALL_LIMIT,
            self.runtime.clone().update_container_resources(request),
        )
        .await
    }

    /// Succeeds also where the engine does not know the call.
    pub(super) async fn update_sandbox(
        &self,
        id: &str,
        resources: api::LinuxContainerResources,
    ) -> Result<(), RuntimeError> {
        let request = api::UpdatePodSandboxResourcesRequest {
            pod_sandbox_id: id.to_owned(),
            overhead: None,
            resources: Some(resources),
        };
        match Self::within(
            CALL_LIMIT,
            self.runtime.clone().update_pod_sandbox_resources(request),
        )
        .await
        {
            Err(status) if status.code() != Code::Unimplemented => {
                Err(self.error(&format!("sandbox {id}"), &status))
            }
            _ => Ok(()),
        }
    }

    /// Who makes cgroups; `None` where the engine does not know the call.
    pub(super) async fn cgroup_driver(&self) -> Result<Option<api::CgroupDriver>, RuntimeError> {
        let request = api::RuntimeConfigRequest {};
        match Self::within(CALL_LIMIT, self.runtime.clone().runtime_config(request)).await {
            Ok(answer) => Ok(answer.linux.map(|linux| linux.cgroup_driver())),
            Err(status) if status.code() == Code::Unimplemented => Ok(None),
            Err(status) => Err(self.error("the runtime's configuration", &status)),
        }
    }

    pub(super) async fn reopen_container_log(&self, id: &str) -> Result<(), RuntimeError> {
        let request = api::ReopenContainerLogRequest {
            container_id: id.to_owned(),
        };
        self.done(
            format!("container {id}"),
            CALL_LIMIT,
            self.runtime.clone().reopen_container_log(request),
        )
        .await
    }

    /// A call whose answer says no more than that it worked.
    async fn done<T>(
        &self,
        object: String,
        limit: Duration,
        call: impl Future<Output = Result<Response<T>, Status>>,
    ) -> Result<(), RuntimeError> {
        match Self::within(limit, call).await {
            Ok(_) => Ok(()),
            Err(status) => Err(self.error(&object, &status)),
        }
    }

    /// Our sandboxes, in brief; only those of `pod`, when there is one.
    pub(super) async fn list_pod_sandboxes(
        &self,
        pod: Option<&Uid>,
    ) -> Result<Vec<api::PodSandbox>, RuntimeError> {
        let request = api::ListPodSandboxRequest {
            filter: Some(PodSandboxFilter {
                label_selector: self.ours(pod),
            }),
        };
        Self::within(CALL_LIMIT, self.runtime.clone().list_pod_sandbox(request))
            .await
            .map(|answer| answer.items)
            .map_err(|status| self.error("the list of sandboxes", &status))
    }

    /// Our containers, in brief; only those of `pod` or in `sandbox`, when there is one.
    pub(super) async fn list_containers(
        &self,
        pod: Option<&Uid>,
        sandbox: Option<&str>,
    ) -> Result<Vec<api::Container>, RuntimeError> {
        let request = api::ListContainersRequest {
            filter: Some(ContainerFilter {
                pod_sandbox_id: sandbox.unwrap_or_default().to_owned(),
                label_selector: self.ours(pod),
            }),
        };
        Self::within(CALL_LIMIT, self.runtime.clone().list_containers(request))
            .await
            .map(|answer| answer.containers)
            .map_err(|status| self.error("the list of containers", &status))
    }

    /// Images of all containers of the engine, whoever made them.
    pub(super) async fn images_of_all_containers(&self) -> Result<Vec<String>, RuntimeError> {
        let request = api::ListContainersRequest { filter: None };
        let answer = Self::within(CALL_LIMIT, self.runtime.clone().list_containers(request))
            .await
            .map_err(|status| self.error("the list of containers", &status))?;
        let names = |c: api::Container| [c.image_ref, c.image.map(|i| i.image).unwrap_or_default()];
        Ok(answer.containers.into_iter().flat_map(names).collect())
    }

    pub(super) async fn pod_sandbox_status(&self, id: &str) -> Result<api::PodSandboxStatus, RuntimeError> {
        let request = api::PodSandboxStatusRequest {
            pod_sandbox_id: id.to_owned(),
            verbose: false,
        };
        let object = format!("sandbox {id}");
        Self::within(CALL_LIMIT, self.runtime.clone().pod_sandbox_status(request))
            .await
            .map_err(|status| self.error(&object, &status))?
            .status
            .ok_or(RuntimeError::NotFound(object))
    }

    pub(super) async fn container_status(&self, id: &str) -> Result<api::ContainerStatus, RuntimeError> {
        let request = api::ContainerStatusRequest {
            container_id: id.to_owned(),
            verbose: false,
        };
        let object = format!("container {id}");
        Self::within(CALL_LIMIT, self.runtime.clone().container_status(request))
            .await
            .map_err(|status| self.error(&object, &status))?
            .status
            .ok_or(RuntimeError::NotFound(object))
    }

    /// The number of a sandbox's first process; 0 when the engine does not tell.
    pub(super) async fn sandbox_pid(&self, id: &str) -> Result<i32, RuntimeError> {
        let request = api::PodSandboxStatusRequest {
            pod_sandbox_id: id.to_owned(),
            verbose: true,
        };
        Self::within(CALL_LIMIT, self.runtime.clone().pod_sandbox_status(request))
            .await
            .map(|answer| pid(&answer.info))
            .map_err(|status| self.error(&format!("sandbox {id}"), &status))
    }

    /// The number of a container's first process; 0 when the engine does not tell, or it does not run.
    pub(super) async fn container_pid(&self, id: &str) -> Result<i32, RuntimeError> {
        let request = api::ContainerStatusRequest {
            container_id: id.to_owned(),
            verbose: true,
        };
        Self::within(CALL_LIMIT, self.runtime.clone().container_status(request))
            .await
            .map(|answer| pid(&answer.info))
            .map_err(|status| self.error(&format!("container {id}"), &status))
    }

    /// What our containers use.
    pub(super) async fn container_stats(&self) -> Result<Vec<api::ContainerStats>, RuntimeError> {
        let request = api::ListContainerStatsRequest {
            filter: Some(api::ContainerStatsFilter {
                label_selector: self.ours(None),
                ..api::ContainerStatsFilter::default()
            }),
        };
        Self::within(CALL_LIMIT, self.runtime.clone().list_container_stats(request))
            .await
            .map(|answer| answer.stats)
            .map_err(|status| self.error("the use of containers", &status))
    }

    /// What images use.
    pub(super) async fn image_fs_info(&self) -> Result<api::ImageFsInfoResponse, RuntimeError> {
        Self::within(
            CALL_LIMIT,
            self.images.clone().image_fs_info(api::ImageFsInfoRequest {}),
        )
        .await
        .map_err(|status| self.error("the use of images", &status))
    }

    /// The stream of events; it opens with the first one. No time limit.
    pub(super) async fn events(&self) -> Result<Streaming<api::ContainerEventResponse>, Status> {
        let request = Request::new(api::GetEventsRequest {});
        self.runtime
            .clone()
            .get_container_events(request)
            .await
            .map(Response::into_inner)
    }

    /// containerd's events that match one of `filters`; opens with the first one. No time limit.
    pub(super) async fn containerd_events(
        &self,
        filters: Vec<String>,
    ) -> Result<Streaming<Envelope>, Status> {
        let request = SubscribeRequest { filters };
        self.events
            .clone()
            .subscribe(request)
            .await
            .map(Response::into_inner)
    }

    /// Sends an event without content to all who listen to containerd's events in `namespace`.
    pub(super) async fn publish(&self, namespace: &'static str, topic: &str) -> Result<(), Status> {
        let mut request = Request::new(PublishRequest {
            topic: topic.to_owned(),
            event: Some(Default::default()),
        });
        let namespace = tonic::metadata::MetadataValue::from_static(namespace);
        request.metadata_mut().insert("containerd-namespace", namespace);
        Self::within(CALL_LIMIT, self.events.clone().publish(request))
            .await
            .map(|_| ())
    }

    pub(super) async fn image_status(&self, image: &str) -> Result<Option<api::Image>, RuntimeError> {
        let request = api::ImageStatusRequest {
            image: Some(image_spec(image)),
            verbose: false,
        };
        match Self::within(CALL_LIMIT, self.images.clone().image_status(request)).await {
            Ok(answer) => Ok(answer.image.filter(|image| !image.id.is_empty())),
            Err(status) if status.code() == Code::NotFound => Ok(None),
            Err(status) => Err(self.error(&format!("image {image}"), &status)),
        }
    }

    pub(super) async fn pull_image(
        &self,
        image: &str,
        auth: Option<&RegistryAuth>,
    ) -> Result<String, RuntimeError> {
        let request = api::PullImageRequest {
            image: Some(image_spec(image)),
            auth: auth.map(|auth| api::AuthConfig {
                username: auth.username.clone(),
                password: auth.password.clone(),
                identity_token: auth.identity_token.clone(),
            }),
        };
        match self.images.clone().pull_image(request).await {
            Ok(answer) => Ok(answer.into_inner().image_ref),
            Err(status) => Err(failure::pull_error(
                &self.shared.socket,
                self.scheme(),
                image,
                &status,
            )),
        }
    }

    pub(super) async fn list_images(&self) -> Result<Vec<api::Image>, RuntimeError> {
        let request = api::ListImagesRequest { filter: None };
        Self::within(CALL_LIMIT, self.images.clone().list_images(request))
            .await
            .map(|answer| answer.images)
            .map_err(|status| self.error("the list of images", &status))
    }

    pub(super) async fn remove_image(&self, id: &str) -> Result<(), RuntimeError> {
        let request = api::RemoveImageRequest {
            image: Some(image_spec(id)),
        };
        self.done(
            format!("image {id}"),
            CALL_LIMIT,
            self.images.clone().remove_image(request),
        )
        .await
    }

    pub(super) async fn exec_sync(
        &self,
        id: &str,
        command: &[String],
        timeout: Duration,
    ) -> Result<api::ExecSyncResponse, RuntimeError> {
        let request = api::ExecSyncRequest {
            container_id: id.to_owned(),
            cmd: command.to_vec(),
            // Zero would mean no limit at all.
            timeout: whole_seconds(timeout).max(1),
        };
        let limit = timeout.saturating_add(CALL_LIMIT);
        Self::within(limit, self.runtime.clone().exec_sync(request))
            .await
            .map_err(|status| match self.error(&format!("container {id}"), &status) {
                RuntimeError::Timeout(_) => {
                    RuntimeError::Timeout(format!("command {command:?} in container {id}"))
                }
                other => other,
            })
    }

    pub(super) async fn exec(&self, id: &str, request: &ExecRequest) -> Result<String, RuntimeError> {
        let call = api::ExecRequest {
            container_id: id.to_owned(),
            cmd: request.command.clone(),
            tty: request.tty,
            stdin: request.stdin,
            stdout: request.stdout,
            stderr: request.stderr && !request.tty,
        };
        Self::within(CALL_LIMIT, self.runtime.clone().exec(call))
            .await
            .map(|answer| answer.url)
            .map_err(|status| self.error(&format!("container {id}"), &status))
    }

    pub(super) async fn attach(&self, id: &str, request: &ExecRequest) -> Result<String, RuntimeError> {
        let call = api::AttachRequest {
            container_id: id.to_owned(),
            stdin: request.stdin,
            tty: request.tty,
            stdout: request.stdout,
            stderr: request.stderr && !request.tty,
        };
        Self::within(CALL_LIMIT, self.runtime.clone().attach(call))
            .await
            .map(|answer| answer.url)
            .map_err(|status| self.error(&format!("container {id}"), &status))
    }

    pub(super) async fn port_forward(&self, id: &str, ports: &[u16]) -> Result<String, RuntimeError> {
        let call = api::PortForwardRequest {
            pod_sandbox_id: id.to_owned(),
            port: ports.iter().copied().map(i32::from).collect(),
        };
        Self::within(CALL_LIMIT, self.runtime.clone().port_forward(call))
            .await
            .map(|answer| answer.url)
            .map_err(|status| self.error(&format!("sandbox {id}"), &status))
    }
}

/// `pid` in the JSON under `info`, as containerd and CRI-O give it.
pub(super) fn pid(info: &std::collections::HashMap<String, String>) -> i32 {
    let parsed = info
        .get("info")
        .and_then(|text| serde_json::from_str::<serde_json::Value>(text).ok());
    let pid = parsed.and_then(|value| value["pid"].as_i64());
    pid.and_then(|pid| i32::try_from(pid).ok()).unwrap_or(0)
}

fn image_spec(image: &str) -> api::ImageSpec {
    api::ImageSpec {
        image: image.to_owned(),
        user_specified_image: String::new(),
    }
}

/// Rounded up: a grace of half a second is not none.
fn whole_seconds(duration: Duration) -> i64 {
    let up = duration
        .as_secs()
        .saturating_add(u64::from(duration.subsec_nanos() > 0));
    i64::try_from(up).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fraction_of_a_second_counts_as_a_whole_one() {
        assert_eq!(whole_seconds(Duration::ZERO), 0);
        assert_eq!(whole_seconds(Duration::from_millis(1)), 1);
        assert_eq!(whole_seconds(Duration::from_secs(30)), 30);
        assert_eq!(whole_seconds(Duration::MAX), i64::MAX);
    }
}
