//! Sandboxes and containers as a pod's spec wants them.

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};
use std::time::Duration;

use k8s_openapi::api::core::v1::{Container, Pod, Secret};
use tokio::time::Instant;

use super::backoff::Backoff;
use super::config;
use super::env::{self, ConfigError, Facts};
use super::env_files;
use super::events::Level;
use super::images::{self, Found, Outcome, Request};
use super::network;
use super::objects::Objects;
use super::plan::{backoff_key, inits, regulars, spec_hash};
use super::record::{Ended, State};
use super::resources;
use super::security;
use super::status::Waiting;
use super::trace::Stage;
use super::worker::{SyncError, Worker, grace};
use super::{ephemeral, hooks};
use crate::runtime::{
    self, ContainerConfig, ImageMount, NamespaceOptions, RuntimeError, SandboxConfig, labels,
};

impl Worker {
    /// Makes the pod's sandbox; answers whether it is there.
    pub(super) async fn run_sandbox(&mut self, pod: &Pod, attempt: u32) -> Result<bool, SyncError> {
        let begun = Instant::now();
        if !self.make_cgroup(pod).await? {
            return Ok(false);
        }
        self.trace.note(Stage::Cgroup, begun);
        let config = match self.sandbox_config(pod, attempt).await {
            Ok(config) => config,
            Err(message) => {
                self.sandbox_failed(pod, &message).await;
                return Ok(false);
            }
        };
        let io = |path: &Path, error| SyncError::Io {
            path: path.to_owned(),
            error,
        };
        std::fs::create_dir_all(&config.log_directory).map_err(|e| io(&config.log_directory, e))?;
        let dir = self.pod_dir();
        std::fs::create_dir_all(&dir).map_err(|e| io(&dir, e))?;
        // The number is taken whatever happens: a name half reserved in the runtime is not used again.
        self.record.sandboxes_made = attempt + 1;
        self.save()?;
        let begun = Instant::now();
        let made = self.shared.runtime.run_sandbox(&config);
        let made = self.uninterrupted.call(made).await;
        self.trace.note(Stage::Sandbox, begun);
        match made {
            Ok(id) => {
                self.record.sandbox = Some(id.0);
                self.sandbox_made = Some(config);
                self.save()?;
                Ok(true)
            }
            Err(error) => {
                self.sandbox_failed(pod, &error.to_string()).await;
                Ok(false)
            }
        }
    }

    async fn sandbox_failed(&mut self, pod: &Pod, why: &str) {
        let message = format!("Failed to create pod sandbox: {why}");
        self.shared
            .events
            .emit(pod, None, Level::Warning, "FailedCreatePodSandBox", message)
            .await;
        self.again = self.again.min(Duration::from_secs(10));
    }

    pub(super) fn log_dir(&self) -> PathBuf {
        let name = format!("{}_{}_{}", self.record.namespace, self.record.name, self.uid);
        self.shared.config.pod_log_dir.join(name)
    }

    /// The sandbox that the pod asks for, or why this node cannot make it.
    async fn sandbox_config(&self, pod: &Pod, attempt: u32) -> Result<SandboxConfig, String> {
        let settings = &self.shared.config;
        let spec = pod.spec.clone().unwrap_or_default();
        let node = std::fs::read_to_string(&settings.resolv_conf).unwrap_or_default();
        let node = network::parse_resolv_conf(&node);
        let dns = network::dns(pod, &settings.cluster_dns, &settings.cluster_domain, &node);
        if let Some(message) = dns.cut {
            self.shared
                .events
                .emit(pod, None, Level::Warning, "DNSConfigForming", message)
                .await;
        }
        if dns.missing_cluster && self.shared.runtime.isolated() {
            let message =
                "the node has no cluster DNS configured and cannot create Pod using \"ClusterFirst\" \
                           policy. Falling back to \"Default\" policy."
                    .to_owned();
            self.shared
                .events
                .emit(pod, None, Level::Warning, "MissingClusterDNS", message)
                .await;
        }
        let context = spec.security_context.as_ref();
        let sysctls = context.and_then(|c| c.sysctls.clone()).unwrap_or_default();
        let runtime_handler = security::runtime_handler(pod, &self.shared.store)?;
        let user_namespace =
            security::user_namespace(pod, &self.features, &runtime_handler, &self.shared.user_ranges)?;
        Ok(SandboxConfig {
            name: self.record.name.clone(),
            namespace: self.record.namespace.clone(),
            uid: self.uid.clone(),
            attempt,
            hostname: network::kernel_hostname(pod, &settings.cluster_domain)?,
            log_directory: self.log_dir(),
            dns: Some(dns.config),
            ports: config::port_mappings(pod),
            labels: self.labels(pod, None),
            annotations: pod.metadata.annotations.clone().unwrap_or_default(),
            cgroup_parent: self.cgroup_parent(pod),
            namespaces: NamespaceOptions {
                host_network: spec.host_network.unwrap_or(false),
                host_pid: spec.host_pid.unwrap_or(false),
                host_ipc: spec.host_ipc.unwrap_or(false),
                share_process: spec.share_process_namespace.unwrap_or(false),
            },
            sysctls: sysctls
                .into_iter()
                .map(|s| (security::dotted(&s.name), s.value))
                .collect(),
            privileged: inits(pod)
                .iter()
                .chain(regulars(pod))
                .any(security::is_privileged),
            runtime_handler,
            supplemental_groups: security::supplemental_groups(pod),
            strict_groups: security::strict_groups(pod),
            run_as_user: context.and_then(|c| c.run_as_user),
            run_as_group: context.and_then(|c| c.run_as_group),
            selinux: context
                .and_then(|c| c.se_linux_options.as_ref())
                .map(security::selinux),
            user_namespace,
        })
    }

    /// The pod's labels and ours; with the container's name when one is given.
    fn labels(&self, pod: &Pod, container: Option<&str>) -> BTreeMap<String, String> {
        let mut all = if container.is_some() {
            None
        } else {
            pod.metadata.labels.clone()
        }
        .unwrap_or_default();
        let mut put = |key: &str, value: &str| all.insert(key.to_owned(), value.to_owned());
        put(labels::POD_NAME, &self.record.name);
        put(labels::POD_NAMESPACE, &self.record.namespace);
        put(labels::POD_UID, self.uid.as_str());
        put(labels::MANAGED_BY, "skerry");
        if let Some(name) = container {
            put(labels::CONTAINER_NAME, name);
        }
        all
    }

    /// Makes and starts a container; answers whether it started. What keeps it from that is noted for the status.
    ///
    /// `after` is how the instance before it ended.
    pub(super) async fn start_container(
        &mut self,
        pod: &Pod,
        container: &Container,
        restart_count: u32,
        after: Option<&Ended>,
    ) -> Result<bool, SyncError> {
        let name = &container.name;
        let begun = Instant::now();
        let Some(found) = self.image(pod, container).await else {
            return Ok(false);
        };
        self.trace.note(Stage::Image, begun);
        let begun = Instant::now();
        let attempt = self.record.sandboxes_made.saturating_sub(1);
        let made = self.sandbox_made.take().filter(|made| made.attempt == attempt);
        let sandbox_config = match made {
            Some(made) => Ok(made),
            // Made by the daemon before this one.
            None => self.sandbox_config(pod, attempt).await,
        };
        let sandbox_config = match sandbox_config {
            Ok(config) => config,
            Err(message) => {
                self.fail(pod, name, "CreateContainerConfigError", message).await;
                return Ok(false);
            }
        };
        let sandbox_config = self.sandbox_made.insert(sandbox_config).clone();
        let Some(images) = self.image_volumes(pod, container).await else {
            return Ok(false);
        };
        let prepared = self.container_config(pod, container, restart_count, found, &images);
        let config = match prepared {
            Ok(config) => config,
            Err(ConfigError(message)) => {
                self.fail(pod, name, "CreateContainerConfigError", message).await;
                return Ok(false);
            }
        };
        let Some(sandbox) = self.view.ready_sandbox().map(|s| s.id.clone()) else {
            return Ok(false);
        };
        self.record.containers.entry(name.clone()).or_default().actuated =
            Some(super::allocation::Actuated::of(pod, container));
        self.trace.note(Stage::Configure, begun);
        let begun = Instant::now();
        let runtime = &self.shared.runtime;
        let created = runtime.create_container(&sandbox, &config, &sandbox_config);
        let created = self.uninterrupted.call(created).await;
        self.trace.note(Stage::Create, begun);
        let id = match created {
            Ok(id) => id,
            Err(error @ RuntimeError::Unavailable { .. }) => return Err(error.into()),
            Err(error) => {
                self.fail(pod, name, "CreateContainerError", error.to_string())
                    .await;
                return Ok(false);
            }
        };
        self.shared
            .events
            .emit(
                pod,
                Some(name),
                Level::Normal,
                "Created",
                "Container created".to_owned(),
            )
            .await;
        // Counted now, whether it will start or not: one that cannot start must wait longer and longer too.
        if let Some(ended) = after {
            self.step_backoff(container, ended)?;
        }
        let begun = Instant::now();
        let started = self.shared.runtime.start_container(&id);
        let started = self.uninterrupted.call(started).await;
        self.trace.note(Stage::Start, begun);
        if let Err(error) = started {
            self.fail(pod, name, "RunContainerError", error.to_string()).await;
            return Ok(false);
        }
        self.shared
            .events
            .emit(
                pod,
                Some(name),
                Level::Normal,
                "Started",
                "Container started".to_owned(),
            )
            .await;
        self.waiting.remove(name);
        self.post_start(pod, container, &id).await?;
        Ok(true)
    }

    fn step_backoff(&mut self, container: &Container, ended: &Ended) -> Result<(), SyncError> {
        let now = self.shared.clock.now();
        let since = |then| self.shared.clock.elapsed(then);
        let known = self.record.containers.entry(container.name.clone()).or_default();
        let step = Backoff::step(
            known.backoff.as_ref(),
            &backoff_key(container),
            ended.finished,
            now,
            &since,
        );
        known.backoff = Some(step);
        self.save()
    }

    /// Runs the postStart hook, if there is one; a container whose hook fails is stopped.
    async fn post_start(
        &mut self,
        pod: &Pod,
        container: &Container,
        id: &runtime::ContainerId,
    ) -> Result<(), SyncError> {
        let Some(hook) = container.lifecycle.as_ref().and_then(|l| l.post_start.as_ref()) else {
            return Ok(());
        };
        let shared = std::sync::Arc::clone(&self.shared);
        let ip = self.pod_ips().first().copied();
        let host = hooks::reached_at(&shared, pod, ip);
        let Err(message) = hooks::run(&shared, pod, container, id, hook, host, hooks::UNLIMITED).await else {
            return Ok(());
        };
        let name = &container.name;
        tracing::info!(container = name, message, "a postStart hook failed");
        let said = "PostStartHook failed".to_owned();
        let events = &shared.events;
        events
            .emit(pod, Some(name), Level::Warning, "FailedPostStartHook", said)
            .await;
        let killing = "FailedPostStartHook".to_owned();
        events
            .emit(pod, Some(name), Level::Normal, "Killing", killing)
            .await;
        self.look(pod).await?;
        let reason = "PostStartHookError".to_owned();
        if let Some(instance) = self.view.containers.iter().find(|c| c.id == *id) {
            let stop = hooks::Stop {
                pod: Some(pod),
                container: instance,
                ip,
                grace: grace(pod),
                least: Duration::from_secs(2),
            };
            stop.run(&shared).await?;
        }
        self.waiting.insert(name.clone(), Waiting { reason, message });
        Ok(())
    }

    pub(super) async fn fail(&mut self, pod: &Pod, container: &str, reason: &str, message: String) {
        self.shared
            .events
            .emit(
                pod,
                Some(container),
                Level::Warning,
                "Failed",
                format!("Error: {message}"),
            )
            .await;
        self.waiting.insert(
            container.to_owned(),
            Waiting {
                reason: reason.to_owned(),
                message,
            },
        );
        self.again = self.again.min(Duration::from_secs(10));
    }

    /// The container's image, once it is there.
    async fn image(&mut self, pod: &Pod, container: &Container) -> Option<Found> {
        let image = container.image.as_deref().unwrap_or_default();
        self.image_of(pod, container, image, container.image_pull_policy.as_deref())
            .await
    }

    /// An image that the container needs, its own or one of its volumes', once it is there.
    pub(super) async fn image_of(
        &mut self,
        pod: &Pod,
        container: &Container,
        image: &str,
        policy: Option<&str>,
    ) -> Option<Found> {
        let policy = policy.unwrap_or_else(|| images::default_policy(image));
        let waker = self.waker.clone();
        let request = Request {
            pod,
            container: &container.name,
            image,
            policy,
            auths: images::credentials(image, &self.pull_secrets(pod).await),
            wake: std::sync::Arc::new(move || waker.send_modify(|o| o.wakes += 1)),
        };
        match self.shared.images.ensure(request).await {
            Outcome::Ready(found) => Some(found),
            Outcome::Pulling => None,
            Outcome::Failed(waiting, again) => {
                let own = container.image.as_deref() == Some(image);
                if own && let Some(found) = self.known_image(container).await {
                    let message = format!(
                        "Image \"{image}\" cannot be pulled ({}); the copy that this container ran before is used",
                        waiting.message
                    );
                    self.shared
                        .events
                        .emit(pod, Some(&container.name), Level::Warning, "Failed", message)
                        .await;
                    return Some(found);
                }
                if let Some(again) = again {
                    self.again = self.again.min(again);
                }
                let changed = self.waiting.get(&container.name).map(|w| &w.reason) != Some(&waiting.reason);
                if changed {
                    let message = format!("Error: {}", waiting.reason);
                    self.shared
                        .events
                        .emit(pod, Some(&container.name), Level::Warning, "Failed", message)
                        .await;
                }
                self.waiting.insert(container.name.clone(), waiting);
                None
            }
        }
    }

    /// With `Always` and no way to the registry, an image that this very container ran before is good enough: that is
    /// how a site comes up after a reboot without a link. A kubelet would wait.
    async fn known_image(&self, container: &Container) -> Option<Found> {
        let last = self.record.last(&container.name)?;
        if last.image_ref.is_empty()
            || !matches!(last.state, State::Exited(_))
            || last.spec_hash != spec_hash(container)
        {
            return None;
        }
        self.shared
            .runtime
            .image_status(&last.image_ref)
            .await
            .ok()
            .flatten()
            .map(Found::from)
    }

    async fn pull_secrets(&self, pod: &Pod) -> Vec<Secret> {
        let mut found = Vec::new();
        for reference in pod
            .spec
            .iter()
            .flat_map(|s| s.image_pull_secrets.iter().flatten())
        {
            match self.shared.store.secret(&self.record.namespace, &reference.name) {
                Some(secret) => found.push(secret),
                None => {
                    let message = format!(
                        "Unable to retrieve some image pull secrets ({}); attempting to pull the image may not succeed.",
                        reference.name
                    );
                    let events = &self.shared.events;
                    events
                        .emit(
                            pod,
                            None,
                            Level::Warning,
                            "FailedToRetrieveImagePullSecret",
                            message,
                        )
                        .await;
                }
            }
        }
        found
    }

    fn container_config(
        &self,
        pod: &Pod,
        container: &Container,
        restart_count: u32,
        found: Found,
        images: &BTreeMap<String, ImageMount>,
    ) -> Result<ContainerConfig, ConfigError> {
        let ips = self.pod_ips();
        let objects = &self.shared.store;
        let facts = Facts {
            pod,
            host_ip: self.shared.config.node_ip,
            pod_ips: &ips,
            objects,
        };
        let container = &env_files::resolved(container, &self.volumes)?;
        let env = env::environment(&facts, container)?;
        let known: HashMap<String, String> = env.iter().cloned().collect();
        let expand = |list: &Option<Vec<String>>| -> Vec<String> {
            list.iter()
                .flatten()
                .map(|text| env::expand(text, &known))
                .collect()
        };
        let message_path = container
            .termination_message_path
            .as_deref()
            .unwrap_or("/dev/termination-log");
        let policy = container.termination_message_policy.as_deref().unwrap_or("File");
        let log_path = PathBuf::from(&container.name).join(format!("{restart_count}.log"));
        let log_dir = self.log_dir().join(&container.name);
        std::fs::create_dir_all(&log_dir).map_err(|e| ConfigError(format!("{}: {e}", log_dir.display())))?;
        let annotations = [
            (labels::CONTAINER_HASH, spec_hash(container)),
            (labels::RESTART_COUNT, restart_count.to_string()),
            (labels::TERMINATION_MESSAGE_PATH, message_path.to_owned()),
            (labels::TERMINATION_MESSAGE_POLICY, policy.to_owned()),
        ];
        Ok(ContainerConfig {
            name: container.name.clone(),
            attempt: restart_count,
            image: container.image.clone().unwrap_or_default(),
            image_ref: found.reference,
            command: expand(&container.command),
            args: expand(&container.args),
            working_dir: container.working_dir.clone().unwrap_or_default(),
            mounts: self.mounts(pod, container, restart_count, &known, message_path, images)?,
            env,
            labels: self.labels(pod, Some(&container.name)),
            annotations: annotations.into_iter().map(|(k, v)| (k.to_owned(), v)).collect(),
            log_path,
            target: ephemeral::target(pod, &container.name, &self.view)?,
            stop_signal: container
                .lifecycle
                .as_ref()
                .and_then(|l| l.stop_signal.clone())
                .unwrap_or_default(),
            stdin: container.stdin.unwrap_or(false),
            stdin_once: container.stdin_once.unwrap_or(false),
            tty: container.tty.unwrap_or(false),
            resources: resources::container_values(
                pod,
                container,
                self.shared.groups.memory_capacity,
                &self.shared.groups.kernel,
            ),
            devices: self.devices(pod, container)?,
            security: security::security(
                pod,
                container,
                found.image.as_ref(),
                self.shared.config.seccomp_default,
                &self.shared.config.seccomp_dir,
            )?,
        })
    }
}
