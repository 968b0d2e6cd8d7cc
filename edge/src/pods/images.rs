//! Images of pods: pull policy, back-off, credentials; pulls run in the background, a few at a time.

mod access;
mod credentials;
mod reference;

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use jiff::Timestamp;
use k8s_openapi::api::core::v1::Pod;
use tokio::sync::Semaphore;

use super::backoff::Backoff;
use super::events::{Events, Level};
use super::starts::Starts;
use super::status::Waiting;
use crate::clock::Clock;
use crate::runtime::{Image, Runtime};
use crate::store::Store;
use access::{Access, Brought, Source};

pub(crate) use credentials::{Credential, credentials};

/// How often a pull that takes long is reported.
const PROGRESS: Duration = Duration::from_secs(60);

/// What a container that needs its image is told.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// The image is there.
    Ready(Found),
    /// It is being fetched; the waker is called when that is over.
    Pulling,
    /// It is not there, and why; tried again after the time, when one is given.
    Failed(Waiting, Option<Duration>),
}

/// An image that a container can be made from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Found {
    /// What the runtime calls it.
    pub(crate) reference: String,
    /// What the runtime says of it; `None` when it did not say after a pull.
    pub(crate) image: Option<Image>,
}

impl From<Image> for Found {
    fn from(image: Image) -> Self {
        Self {
            reference: image.id.clone(),
            image: Some(image),
        }
    }
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
    pub(crate) auths: Vec<Credential>,
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
    access: Arc<Access>,
    pulls: Arc<Mutex<HashMap<(String, String), Pull>>>,
}

#[derive(Default)]
struct Pull {
    running: bool,
    done: Option<Result<Found, String>>,
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
        store: Store,
        parallel: usize,
        starts: Starts,
    ) -> Self {
        Self {
            runtime,
            events,
            clock,
            slots: Arc::new(Semaphore::new(parallel.max(1))),
            starts,
            access: Arc::new(Access::new(store)),
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
        let tagged = match reference::tagged(image) {
            Ok(tagged) => tagged,
            Err(why) => {
                let message = format!("Failed to apply default image tag \"{image}\": {why}");
                self.say(pod, container, Level::Warning, "InspectFailed", &message)
                    .await;
                return failed("InvalidImageName", message, None);
            }
        };
        let key = (pod.metadata.uid.clone().unwrap_or_default(), image.to_owned());
        match self.take(&key) {
            Taken::Running => return Outcome::Pulling,
            Taken::Done(Ok(found)) => return Outcome::Ready(found),
            Taken::Done(Err(message)) => {
                let (reason, message) = pull_failure(image, &message);
                return failed(reason, message, Some(Duration::from_secs(1)));
            }
            Taken::Nothing => {}
        }
        let present = match self.runtime.image_status(&tagged).await {
            Ok(present) => present,
            Err(error) => {
                let message = format!("Failed to inspect image \"{image}\": {error}");
                self.say(pod, container, Level::Warning, "InspectFailed", &message)
                    .await;
                return failed("ImageInspectError", message, Some(Duration::from_secs(10)));
            }
        };
        // What another pod's Secret has brought here is not there for this one.
        let sources: Vec<Source> = request.auths.iter().map(|c| c.source.clone()).collect();
        if let Some(found) = present.filter(|found| self.access.may_use(image, &found.id, &sources))
            && policy != "Always"
        {
            let message = format!(
                "Container image \"{image}\" already present on machine and can be accessed by the pod"
            );
            self.say(pod, container, Level::Normal, "Pulled", &message).await;
            return Outcome::Ready(found.into());
        }
        if policy == "Never" {
            let message = format!("Container image \"{image}\" is not present with pull policy of Never");
            self.say(pod, container, Level::Warning, "ErrImageNeverPull", &message)
                .await;
            return failed("ErrImageNeverPull", message, Some(Duration::from_secs(10)));
        }
        if let Some((remaining, error)) = self.backing_off(&key) {
            let message = format!("Back-off pulling image \"{image}\"");
            self.say(pod, container, Level::Normal, "BackOff", &message).await;
            let (reason, why) = pull_failure(image, &error);
            return failed(
                "ImagePullBackOff",
                format!("{message}: {reason}: {why}"),
                Some(remaining),
            );
        }
        if let Err(error) = self.access.begin(image) {
            let message =
                format!("Failed to record image pull intent for container image \"{image}\": {error}");
            return failed("ErrImagePull", message, Some(Duration::from_secs(10)));
        }
        self.start(key, tagged, request).await;
        Outcome::Pulling
    }

    async fn say(&self, pod: &Pod, container: &str, level: Level, reason: &str, message: &str) {
        self.events
            .emit(pod, Some(container), level, reason, message.to_owned())
            .await;
    }

    /// To be called before the runtime's images are listed. What it answers takes the list, and forgets how images came
    /// here that are gone.
    pub(crate) fn before_listing(&self) -> crate::images::Forget {
        let (access, round) = (self.access.clone(), self.access.round());
        Box::new(move |there| access.prune(round, there))
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
        let failed = pull.failed_at?;
        let since = |then| self.clock.elapsed(then);
        let remaining = Backoff::remaining(pull.backoff.as_ref(), &key.1, failed, &since)?;
        Some((remaining, pull.error.clone()))
    }

    /// Fetches `tagged` in the background; the fetch has been written down.
    async fn start(&self, key: (String, String), tagged: String, request: Request<'_>) {
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
        let access = self.access.clone();
        let (clock, pulls, auths, wake) = (
            self.clock.clone(),
            self.pulls.clone(),
            request.auths,
            request.wake,
        );
        let starts = self.starts.clone();
        tokio::spawn(async move {
            let asked = tokio::time::Instant::now();
            let work = async {
                let slot = slots.acquire().await;
                let began = tokio::time::Instant::now();
                let result = pull(runtime.as_ref(), &tagged, &auths).await;
                drop(slot);
                (result, began.elapsed())
            };
            let progress = report_progress(&events, &pod, &container, &image);
            let (result, took) = tokio::select! {
                done = work => done,
                () = progress => return,
            };
            starts.pulled(&key.0, asked.elapsed());
            let present = match &result {
                Ok(_) => runtime.image_status(&tagged).await.ok().flatten(),
                Err(_) => None,
            };
            let size = present.as_ref().map_or(0, |i| i.size_bytes);
            let names: Vec<String> = present
                .iter()
                .flat_map(|i| i.tags.iter().chain(&i.digests).cloned())
                .collect();
            let brought = result.as_ref().ok().map(|(reference, source)| Brought {
                id: present.as_ref().map_or(reference.as_str(), |i| i.id.as_str()),
                names: &names,
                source: source.as_ref(),
            });
            access.end(&image, brought);
            let result = result.map(|(reference, _)| Found {
                reference,
                image: present,
            });
            let (level, reason, message) = match &result {
                Ok(_) => (
                    Level::Normal,
                    "Pulled",
                    format!(
                        "Successfully pulled image \"{image}\" in {} ({} including waiting). Image size: {size} bytes.",
                        seconds(took),
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
                            let since = |then| clock.elapsed(then);
                            let step = Backoff::step(pull.backoff.as_ref(), &key.1, now, now, &since);
                            pull.backoff = Some(step);
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
    Done(Result<Found, String>),
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

/// Says now and then that a pull goes on. Never ends.
async fn report_progress(events: &Events, pod: &Pod, container: &str, image: &str) {
    let began = tokio::time::Instant::now();
    loop {
        tokio::time::sleep(PROGRESS).await;
        let minutes = began.elapsed().as_secs() / 60;
        let message = format!("Still pulling image \"{image}\" after {minutes}m");
        events
            .emit(pod, Some(container), Level::Normal, "Pulling", message)
            .await;
    }
}

/// Tries every credential in turn, or none where there are none; answers the reference and what was used.
async fn pull(
    runtime: &dyn Runtime,
    image: &str,
    auths: &[Credential],
) -> Result<(String, Option<Source>), String> {
    let mut last = None;
    for credential in auths.iter().map(Some).chain(auths.is_empty().then_some(None)) {
        match runtime.pull_image(image, credential.map(|c| &c.auth)).await {
            Ok(reference) => return Ok((reference, credential.map(|c| c.source.clone()))),
            Err(error) => last = Some(error.to_string()),
        }
    }
    Err(last.unwrap_or_default())
}

/// Reason and message of a failed pull. Engines name two causes by a word at the beginning.
fn pull_failure(image: &str, error: &str) -> (&'static str, String) {
    for (word, what) in [
        ("RegistryUnavailable", "the registry is unavailable"),
        ("SignatureValidationFailed", "the signature validation failed"),
    ] {
        if let Some((_, rest)) = error.split_once(word) {
            return (
                word,
                format!("image pull failed for {image} because {what}{rest}"),
            );
        }
    }
    ("ErrImagePull", error.to_owned())
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

#[cfg(test)]
mod tests {
    use super::*;

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

    #[test]
    fn the_causes_that_an_engine_names_become_the_reason() {
        assert_eq!(
            pull_failure("a:1", "image a:1: RegistryUnavailable: no route"),
            (
                "RegistryUnavailable",
                "image pull failed for a:1 because the registry is unavailable: no route".to_owned()
            )
        );
        assert_eq!(pull_failure("a:1", "x"), ("ErrImagePull", "x".to_owned()));
    }
}
