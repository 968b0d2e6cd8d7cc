//! Images of pods: pull policy, back-off, credentials; pulls run in the background, a few at a time.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use base64::Engine;
use jiff::Timestamp;
use k8s_openapi::api::core::v1::{Pod, Secret};
use serde::Deserialize;
use tokio::sync::Semaphore;

use super::backoff::Backoff;
use super::events::{Events, Level};
use super::starts::Starts;
use super::status::Waiting;
use crate::clock::Clock;
use crate::runtime::{RegistryAuth, Runtime};

/// What a container that needs its image is told.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// The image is there, under this reference.
    Ready(String),
    /// It is being fetched; the waker is called when that is over.
    Pulling,
    /// It is not there, and why; tried again after the time, when one is given.
    Failed(Waiting, Option<Duration>),
}

/// What is asked for.
pub(crate) struct Request<'a> {
    /// The pod that asks.
    pub(crate) pod: &'a Pod,
    /// The container's name.
    pub(crate) container: &'a str,
    /// The image as the spec names it.
    pub(crate) image: &'a str,
    /// `Always`, `IfNotPresent`, `Never`.
    pub(crate) policy: &'a str,
    /// Credentials, best match first.
    pub(crate) auths: Vec<RegistryAuth>,
    /// Called when a pull is over.
    pub(crate) wake: Arc<dyn Fn() + Send + Sync>,
}

/// Pulls images for all pods.
pub(crate) struct Images {
    runtime: Arc<dyn Runtime>,
    events: Events,
    clock: Arc<dyn Clock>,
    slots: Arc<Semaphore>,
    starts: Starts,
    pulls: Arc<Mutex<HashMap<(String, String), Pull>>>,
}

#[derive(Default)]
struct Pull {
    running: bool,
    done: Option<Result<String, String>>,
    backoff: Option<Backoff>,
    failed_at: Option<Timestamp>,
    error: String,
}

impl Images {
    /// Pulls at most `parallel` images at a time.
    pub(crate) fn new(
        runtime: Arc<dyn Runtime>,
        events: Events,
        clock: Arc<dyn Clock>,
        parallel: usize,
        starts: Starts,
    ) -> Self {
        Self {
            runtime,
            events,
            clock,
            slots: Arc::new(Semaphore::new(parallel.max(1))),
            starts,
            pulls: Arc::default(),
        }
    }

    /// Looks for an image, and starts to fetch it where the policy says so. Never waits for a pull.
    pub(crate) async fn ensure(&self, request: Request<'_>) -> Outcome {
        let Request {
            pod,
            container,
            image,
            policy,
            ..
        } = request;
        if image.is_empty() || image.chars().any(|c| c.is_whitespace() || c.is_control()) {
            let message = format!("Failed to apply default image tag \"{image}\": couldn't parse image name");
            self.events
                .emit(
                    pod,
                    Some(container),
                    Level::Warning,
                    "InspectFailed",
                    message.clone(),
                )
                .await;
            return failed("InvalidImageName", message, None);
        }
        let key = (pod.metadata.uid.clone().unwrap_or_default(), image.to_owned());
        match self.take(&key) {
            Taken::Running => return Outcome::Pulling,
            Taken::Done(Ok(reference)) => return Outcome::Ready(reference),
            Taken::Done(Err(message)) => {
                return failed("ErrImagePull", message, Some(Duration::from_secs(1)));
            }
            Taken::Nothing => {}
        }
        let present = match self.runtime.image_status(image).await {
            Ok(present) => present,
            Err(error) => {
                let message = format!("Failed to inspect image \"{image}\": {error}");
                self.events
                    .emit(
                        pod,
                        Some(container),
                        Level::Warning,
                        "InspectFailed",
                        message.clone(),
                    )
                    .await;
                return failed("ImageInspectError", message, Some(Duration::from_secs(10)));
            }
        };
        if let Some(found) = present
            && policy != "Always"
        {
            let message = format!(
                "Container image \"{image}\" already present on machine and can be accessed by the pod"
            );
            self.events
                .emit(pod, Some(container), Level::Normal, "Pulled", message)
                .await;
            return Outcome::Ready(found.id);
        }
        if policy == "Never" {
            let message = format!("Container image \"{image}\" is not present with pull policy of Never");
            self.events
                .emit(
                    pod,
                    Some(container),
                    Level::Warning,
                    "ErrImageNeverPull",
                    message.clone(),
                )
                .await;
            return failed("ErrImageNeverPull", message, Some(Duration::from_secs(10)));
        }
        if let Some((remaining, error)) = self.backing_off(&key) {
            let message = format!("Back-off pulling image \"{image}\"");
            self.events
                .emit(pod, Some(container), Level::Normal, "BackOff", message.clone())
                .await;
            return failed(
                "ImagePullBackOff",
                format!("{message}: ErrImagePull: {error}"),
                Some(remaining),
            );
        }
        self.start(key, request).await;
        Outcome::Pulling
    }

    /// Forgets the pulls of a pod that is gone.
    pub(crate) fn forget(&self, uid: &str) {
        self.lock().retain(|key, _| key.0 != uid);
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<(String, String), Pull>> {
        self.pulls.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn take(&self, key: &(String, String)) -> Taken {
        let mut pulls = self.lock();
        let Some(pull) = pulls.get_mut(key) else {
            return Taken::Nothing;
        };
        if pull.running {
            return Taken::Running;
        }
        match pull.done.take() {
            Some(result) => Taken::Done(result),
            None => Taken::Nothing,
        }
    }

    fn backing_off(&self, key: &(String, String)) -> Option<(Duration, String)> {
        let pulls = self.lock();
        let pull = pulls.get(key)?;
        let remaining = Backoff::remaining(pull.backoff.as_ref(), &key.1, pull.failed_at?, self.clock.now())?;
        Some((remaining, pull.error.clone()))
    }

    async fn start(&self, key: (String, String), request: Request<'_>) {
        self.lock().entry(key.clone()).or_default().running = true;
        let (pod, container, image) = (
            request.pod.clone(),
            request.container.to_owned(),
            request.image.to_owned(),
        );
        let message = format!("Pulling image \"{image}\"");
        self.events
            .emit(&pod, Some(&container), Level::Normal, "Pulling", message)
            .await;
        let (runtime, events, slots) = (self.runtime.clone(), self.events.clone(), self.slots.clone());
        let (clock, pulls, auths, wake) = (
            self.clock.clone(),
            self.pulls.clone(),
            request.auths,
            request.wake,
        );
        let starts = self.starts.clone();
        tokio::spawn(async move {
            let asked = tokio::time::Instant::now();
            let slot = slots.acquire().await;
            let began = tokio::time::Instant::now();
            let result = pull(runtime.as_ref(), &image, &auths).await;
            drop(slot);
            starts.pulled(&key.0, asked.elapsed());
            let size = match &result {
                Ok(_) => runtime
                    .image_status(&image)
                    .await
                    .ok()
                    .flatten()
                    .map_or(0, |i| i.size_bytes),
                Err(_) => 0,
            };
            let (level, reason, message) = match &result {
                Ok(_) => (
                    Level::Normal,
                    "Pulled",
                    format!(
                        "Successfully pulled image \"{image}\" in {} ({} including waiting). Image size: {size} bytes.",
                        seconds(began.elapsed()),
                        seconds(asked.elapsed())
                    ),
                ),
                Err(error) => (
                    Level::Warning,
                    "Failed",
                    format!("Failed to pull image \"{image}\": {error}"),
                ),
            };
            events.emit(&pod, Some(&container), level, reason, message).await;
            let now = clock.now();
            {
                let mut pulls = pulls.lock().unwrap_or_else(PoisonError::into_inner);
                // The pod may have gone meanwhile.
                if let Some(pull) = pulls.get_mut(&key) {
                    pull.running = false;
                    match &result {
                        Ok(_) => (pull.backoff, pull.failed_at) = (None, None),
                        Err(error) => {
                            pull.backoff = Some(Backoff::step(pull.backoff.as_ref(), &key.1, now, now));
                            pull.failed_at = Some(now);
                            pull.error.clone_from(error);
                        }
                    }
                    pull.done = Some(result);
                }
            }
            wake();
        });
    }
}

enum Taken {
    Nothing,
    Running,
    Done(Result<String, String>),
}

fn failed(reason: &str, message: String, again: Option<Duration>) -> Outcome {
    Outcome::Failed(
        Waiting {
            reason: reason.to_owned(),
            message,
        },
        again,
    )
}

fn seconds(duration: Duration) -> String {
    let millis = duration.as_millis();
    if millis < 1000 {
        format!("{millis}ms")
    } else {
        format!("{:.3}s", duration.as_secs_f64())
    }
}

/// Tries every credential, then none.
async fn pull(runtime: &dyn Runtime, image: &str, auths: &[RegistryAuth]) -> Result<String, String> {
    let mut last = None;
    for auth in auths.iter().map(Some).chain(auths.is_empty().then_some(None)) {
        match runtime.pull_image(image, auth).await {
            Ok(reference) => return Ok(reference),
            Err(error) => last = Some(error.to_string()),
        }
    }
    Err(last.unwrap_or_default())
}

/// `Always` for `:latest` or no tag, else `IfNotPresent`.
pub(crate) fn default_policy(image: &str) -> &'static str {
    let name = image.rsplit('/').next().unwrap_or(image);
    if image.contains('@') {
        return "IfNotPresent";
    }
    match name.split_once(':') {
        None | Some((_, "latest")) => "Always",
        Some(_) => "IfNotPresent",
    }
}

#[derive(Deserialize, Default)]
struct DockerAuth {
    #[serde(default)]
    username: String,
    #[serde(default)]
    password: String,
    #[serde(default)]
    auth: String,
    #[serde(default, rename = "identitytoken")]
    identity_token: String,
}

#[derive(Deserialize)]
struct DockerConfig {
    auths: HashMap<String, DockerAuth>,
}

/// The credentials in pull secrets that match an image, longest match first.
pub(crate) fn credentials(image: &str, secrets: &[Secret]) -> Vec<RegistryAuth> {
    let mut found = Vec::new();
    for secret in secrets {
        let Some(data) = &secret.data else { continue };
        let auths = if let Some(json) = data.get(".dockerconfigjson") {
            serde_json::from_slice::<DockerConfig>(&json.0).map(|c| c.auths)
        } else if let Some(json) = data.get(".dockercfg") {
            serde_json::from_slice::<HashMap<String, DockerAuth>>(&json.0)
        } else {
            continue;
        };
        let auths = auths.unwrap_or_else(|error| {
            let name = secret.metadata.name.as_deref().unwrap_or_default();
            tracing::warn!(secret = name, %error, "a pull secret is not JSON");
            HashMap::new()
        });
        for (registry, auth) in auths {
            if let Some(length) = matches(image, &registry) {
                found.push((length, decode_auth(auth)));
            }
        }
    }
    found.sort_by_key(|(length, _)| std::cmp::Reverse(*length));
    found.into_iter().map(|(_, auth)| auth).collect()
}

fn decode_auth(auth: DockerAuth) -> RegistryAuth {
    let pair = base64::engine::general_purpose::STANDARD
        .decode(auth.auth.trim())
        .ok()
        .and_then(|bytes| String::from_utf8(bytes).ok())
        .and_then(|text| text.split_once(':').map(|(u, p)| (u.to_owned(), p.to_owned())));
    let (username, password) = match pair {
        Some(pair) if auth.username.is_empty() => pair,
        _ => (auth.username, auth.password),
    };
    RegistryAuth {
        username,
        password,
        identity_token: auth.identity_token,
    }
}

/// Length of the match of a credential's registry (with or without a path) on an image.
fn matches(image: &str, registry: &str) -> Option<usize> {
    let bare = registry
        .trim_start_matches("https://")
        .trim_start_matches("http://")
        .trim_end_matches('/');
    let bare = match bare.split_once("/v1").or_else(|| bare.split_once("/v2")) {
        Some((host, "")) => host,
        _ => bare,
    };
    let bare = if bare == "index.docker.io" {
        "docker.io"
    } else {
        bare
    };
    let first = image.split('/').next().unwrap_or_default();
    let has_host = image.contains('/') && (first.contains(['.', ':']) || first == "localhost");
    let full = if has_host {
        image.to_owned()
    } else {
        format!("docker.io/{image}")
    };
    let rest = if let Some(suffix) = bare.strip_prefix("*.") {
        let (host, path) = full.split_once('/')?;
        let (left, right) = host.split_once('.')?;
        if left.is_empty() || right != suffix {
            return None;
        }
        path
    } else {
        full.strip_prefix(bare)?
    };
    (rest.is_empty() || bare.starts_with("*.") || rest.starts_with(['/', ':', '@'])).then_some(bare.len())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn the_default_policy_follows_the_tag() {
        for (image, policy) in [
            ("busybox", "Always"),
            ("busybox:latest", "Always"),
            ("busybox:1.36", "IfNotPresent"),
            ("host:5000/busybox", "Always"),
            ("busybox@sha256:1", "IfNotPresent"),
        ] {
            assert_eq!(default_policy(image), policy, "{image}");
        }
    }

    fn secret(config: serde_json::Value) -> Secret {
        let text = base64::engine::general_purpose::STANDARD.encode(config.to_string());
        serde_json::from_value(json!({"data": {".dockerconfigjson": text}})).unwrap()
    }

    #[test]
    fn the_longest_matching_credential_comes_first() {
        let secret = secret(json!({"auths": {
            "r.example": {"username": "short", "password": "p"},
            "r.example/team": {"auth": base64::engine::general_purpose::STANDARD.encode("long:a:b")},
            "other.example": {"username": "x", "password": "y"}}}));
        let auths = credentials("r.example/team/app:1", &[secret]);
        let names: Vec<_> = auths
            .iter()
            .map(|a| (a.username.as_str(), a.password.as_str()))
            .collect();
        assert_eq!(names, [("long", "a:b"), ("short", "p")]);
    }

    #[test]
    fn a_credential_of_a_similar_host_does_not_match() {
        assert_eq!(matches("r.example.evil/app", "r.example"), None);
        assert_eq!(matches("a.b.r.example/app", "*.r.example"), None);
        assert!(matches("a.r.example/app", "*.r.example").is_some());
        assert!(matches("busybox", "https://index.docker.io/v1/").is_some());
    }
}
