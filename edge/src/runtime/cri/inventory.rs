//! What the runtime has, in our words, asking only about what has changed.
//!
//! The two list calls are cheap but brief: addresses, exit codes and log paths need one more call per object. Such an
//! answer holds as long as the object's state does, so it is kept under id and state. When nothing has changed,
//! [`Cache::list`] makes two calls in all.

use std::collections::{HashMap, HashSet};
use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::{Mutex, MutexGuard, PoisonError};

use futures::{StreamExt, TryStreamExt, stream};
use jiff::Timestamp;
use skerry_proto::object::Uid;

use super::api;
use super::client::Client;
use super::config::IMAGE_ANNOTATION;
use crate::runtime::{
    Container, ContainerId, ContainerState, ContainerUser, Features, Handler, Image, Inventory, RuntimeError,
    RuntimeStatus, Sandbox, SandboxId, SandboxState, labels,
};

/// Status calls under way at the same time; after a restart of the daemon there is one per object.
const CONCURRENT_CALLS: usize = 8;

/// Answers that still hold.
#[derive(Default)]
pub(super) struct Cache {
    sandboxes: Mutex<HashMap<String, (i32, Sandbox)>>,
    containers: Mutex<HashMap<String, (i32, Container)>>,
}

impl Cache {
    /// Everything of ours. What goes away during the call is left out; any other failure fails the call.
    pub(super) async fn list(&self, client: &Client) -> Result<Inventory, RuntimeError> {
        self.ask(client, None, Scope::All).await
    }

    /// What is ours of one pod, likewise.
    pub(super) async fn list_pod(&self, client: &Client, pod: &Uid) -> Result<Inventory, RuntimeError> {
        self.ask(client, Some(pod), Scope::Part).await
    }

    async fn ask(&self, client: &Client, pod: Option<&Uid>, scope: Scope) -> Result<Inventory, RuntimeError> {
        let (sandboxes, containers) =
            tokio::try_join!(client.list_pod_sandboxes(pod), client.list_containers(pod, None))?;
        let (mut sandboxes, mut containers) = tokio::try_join!(
            known_or_asked(
                &self.sandboxes,
                scope,
                sandboxes,
                |brief| (brief.id.clone(), brief.state),
                |brief| ask_sandbox(client, brief)
            ),
            known_or_asked(
                &self.containers,
                scope,
                containers,
                |brief| (brief.id.clone(), brief.state),
                |brief| ask_container(client, brief)
            ),
        )?;
        sandboxes.sort_by(|a, b| (a.created_at, &a.id).cmp(&(b.created_at, &b.id)));
        containers.sort_by(|a, b| (a.created_at, &a.id).cmp(&(b.created_at, &b.id)));
        Ok(Inventory {
            sandboxes,
            containers,
        })
    }
}

/// What a listing covers.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Scope {
    /// Everything: what it does not name is gone.
    All,
    /// A part: it says nothing of what it does not name.
    Part,
}

/// Takes each listed object from `cache` or asks about it. A complete listing drops from `cache` what it does not name.
async fn known_or_asked<Brief, Full, Answer>(
    cache: &Mutex<HashMap<String, (i32, Full)>>,
    scope: Scope,
    listed: Vec<Brief>,
    key: impl Fn(&Brief) -> (String, i32),
    ask: impl Fn(Brief) -> Answer,
) -> Result<Vec<Full>, RuntimeError>
where
    Full: Clone,
    Answer: Future<Output = Result<(i32, Full), RuntimeError>>,
{
    let mut full = Vec::with_capacity(listed.len());
    let mut unknown = Vec::new();
    {
        let mut cache = lock(cache);
        if scope == Scope::All {
            let named: HashSet<String> = listed.iter().map(|brief| key(brief).0).collect();
            cache.retain(|id, _| named.contains(id));
        }
        for brief in listed {
            let (id, state) = key(&brief);
            match cache.get(&id) {
                Some((known, answer)) if *known == state => full.push(answer.clone()),
                _ => unknown.push((id, brief)),
            }
        }
    }
    let asked: Vec<_> = stream::iter(unknown)
        .map(|(id, brief)| {
            let answer = ask(brief);
            async move {
                match answer.await {
                    Ok(answer) => Ok(Some((id, answer))),
                    Err(RuntimeError::NotFound(_)) => Ok(None),
                    Err(error) => Err(error),
                }
            }
        })
        .buffer_unordered(CONCURRENT_CALLS)
        .try_collect()
        .await?;
    let mut cache = lock(cache);
    for (id, answer) in asked.into_iter().flatten() {
        full.push(answer.1.clone());
        cache.insert(id, answer);
    }
    Ok(full)
}

/// No code panics while it holds one of these locks; the content is a cache in any case.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

async fn ask_sandbox(client: &Client, brief: api::PodSandbox) -> Result<(i32, Sandbox), RuntimeError> {
    let status = client.pod_sandbox_status(&brief.id).await?;
    Ok((status.state, sandbox(brief, &status)))
}

async fn ask_container(client: &Client, brief: api::Container) -> Result<(i32, Container), RuntimeError> {
    let status = client.container_status(&brief.id).await?;
    Ok((status.state, container(brief, status)))
}

pub(super) fn sandbox(brief: api::PodSandbox, status: &api::PodSandboxStatus) -> Sandbox {
    let state = match status.state() {
        api::PodSandboxState::SandboxReady => SandboxState::Ready,
        api::PodSandboxState::SandboxNotready => SandboxState::NotReady,
    };
    let options = status
        .linux
        .as_ref()
        .and_then(|linux| linux.namespaces.as_ref())
        .and_then(|namespaces| namespaces.options.as_ref());
    let host_network = options.is_some_and(|options| options.network() == api::NamespaceMode::Node);
    let ips = match (state, host_network) {
        (SandboxState::Ready, false) => addresses(status.network.as_ref()),
        _ => Vec::new(),
    };
    let metadata = brief.metadata.unwrap_or_default();
    let mut labels = brief.labels;
    let mut label = |key, otherwise| labels.remove(key).unwrap_or(otherwise);
    Sandbox {
        id: SandboxId(brief.id),
        pod_uid: Uid::from(label(labels::POD_UID, metadata.uid)),
        pod_name: label(labels::POD_NAME, metadata.name),
        pod_namespace: label(labels::POD_NAMESPACE, metadata.namespace),
        attempt: metadata.attempt,
        state,
        created_at: moment(brief.created_at).unwrap_or_default(),
        ips,
        host_network,
    }
}

fn addresses(network: Option<&api::PodSandboxNetworkStatus>) -> Vec<IpAddr> {
    let Some(network) = network else {
        return Vec::new();
    };
    let others = network.additional_ips.iter().map(|other| &other.ip);
    std::iter::once(&network.ip)
        .chain(others)
        .filter_map(|ip| ip.parse().ok())
        .collect()
}

pub(super) fn container(brief: api::Container, status: api::ContainerStatus) -> Container {
    let state = container_state(&status);
    let metadata = brief.metadata.unwrap_or_default();
    let mut labels = brief.labels;
    let mut annotations: std::collections::BTreeMap<_, _> = brief.annotations.into_iter().collect();
    let restart_count = annotations
        .get(labels::RESTART_COUNT)
        .and_then(|count| count.parse().ok())
        .unwrap_or(metadata.attempt);
    let named = status.image.or(brief.image).unwrap_or_default();
    let image = annotations
        .remove(IMAGE_ANNOTATION)
        .or_else(|| Some(named.user_specified_image).filter(|name| !name.is_empty()))
        .unwrap_or(named.image);
    Container {
        id: ContainerId(brief.id),
        sandbox: SandboxId(brief.pod_sandbox_id),
        pod_uid: Uid::from(labels.remove(labels::POD_UID).unwrap_or_default()),
        name: labels.remove(labels::CONTAINER_NAME).unwrap_or(metadata.name),
        restart_count,
        spec_hash: annotations
            .get(labels::CONTAINER_HASH)
            .cloned()
            .unwrap_or_default(),
        state,
        created_at: moment(brief.created_at).unwrap_or_default(),
        image,
        image_ref: if status.image_ref.is_empty() {
            brief.image_ref
        } else {
            status.image_ref
        },
        log_path: PathBuf::from(status.log_path),
        annotations,
        user: status.user.and_then(|user| user.linux).map(|user| ContainerUser {
            uid: user.uid,
            gid: user.gid,
            groups: user.supplemental_groups,
        }),
    }
}

fn container_state(status: &api::ContainerStatus) -> ContainerState {
    let created_at = moment(status.created_at).unwrap_or_default();
    let started_at = moment(status.started_at);
    match status.state() {
        api::ContainerState::ContainerCreated => ContainerState::Created,
        api::ContainerState::ContainerRunning => ContainerState::Running {
            started_at: started_at.unwrap_or(created_at),
        },
        api::ContainerState::ContainerExited => ContainerState::Exited {
            started_at,
            finished_at: moment(status.finished_at).or(started_at).unwrap_or(created_at),
            code: status.exit_code,
            reason: match (status.reason.as_str(), status.exit_code) {
                ("", 0) => "Completed".to_owned(),
                ("", _) => "Error".to_owned(),
                (reason, _) => reason.to_owned(),
            },
            message: status.message.clone(),
        },
        api::ContainerState::ContainerUnknown => ContainerState::Unknown,
    }
}

/// Zero means "not yet" in CRI, and so do the negative times that some engines make of an unset one.
fn moment(nanoseconds: i64) -> Option<Timestamp> {
    if nanoseconds <= 0 {
        return None;
    }
    Timestamp::from_nanosecond(nanoseconds.into()).ok()
}

/// An image, in our words.
pub(super) fn image(image: api::Image) -> Image {
    Image {
        id: image.id,
        tags: image.repo_tags,
        digests: image.repo_digests,
        size_bytes: image.size,
        uid: image.uid.map(|uid| uid.value),
        username: image.username,
    }
}

/// The two conditions that every runtime has; one that is missing does not hold.
pub(super) fn runtime_status(conditions: &[api::RuntimeCondition]) -> RuntimeStatus {
    let holds = |name: &str| {
        conditions
            .iter()
            .any(|condition| condition.r#type == name && condition.status)
    };
    let failing = conditions
        .iter()
        .filter(|condition| {
            !condition.status && ["RuntimeReady", "NetworkReady"].contains(&condition.r#type.as_str())
        })
        .map(|condition| match condition.message.as_str() {
            "" => format!("{} is false: {}", condition.r#type, condition.reason),
            message => message.to_owned(),
        });
    RuntimeStatus {
        ready: holds("RuntimeReady"),
        network_ready: holds("NetworkReady"),
        message: failing.collect::<Vec<_>>().join("; "),
    }
}

/// What the engine says that it can do.
pub(super) fn features(answer: &api::StatusResponse) -> Features {
    Features {
        supplemental_groups_policy: answer
            .features
            .as_ref()
            .is_some_and(|f| f.supplemental_groups_policy),
        handlers: answer
            .runtime_handlers
            .iter()
            .map(|handler| {
                let features = handler.features.as_ref();
                Handler {
                    name: handler.name.clone(),
                    recursive_readonly: features.is_some_and(|f| f.recursive_read_only_mounts),
                    user_namespaces: features.is_some_and(|f| f.user_namespaces),
                }
            })
            .collect(),
        // Engines learnt to mount images with the release in which they began to tell their groups policy
        // (containerd 2.0 tells, 2.1 mounts): what cannot be told here shows when the container is made.
        image_mounts: answer.features.is_some(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicUsize, Ordering};

    async fn ask_about(
        cache: &Mutex<HashMap<String, (i32, String)>>,
        scope: Scope,
        listed: &[(&str, i32)],
    ) -> (Vec<String>, usize) {
        let calls = AtomicUsize::new(0);
        let listed = listed
            .iter()
            .map(|(id, state)| ((*id).to_owned(), *state))
            .collect();
        let answers = known_or_asked(
            cache,
            scope,
            listed,
            Clone::clone,
            |(id, state): (String, i32)| {
                calls.fetch_add(1, Ordering::Relaxed);
                async move {
                    match id.as_str() {
                        "gone" => Err(RuntimeError::NotFound(id)),
                        "broken" => Err(RuntimeError::Failed(id)),
                        _ => Ok((state, format!("{id}{state}"))),
                    }
                }
            },
        )
        .await;
        let mut answers = answers.unwrap();
        answers.sort();
        (answers, calls.into_inner())
    }

    #[tokio::test]
    async fn only_what_is_new_or_in_another_state_is_asked_about() {
        let cache = Mutex::default();
        assert_eq!(
            ask_about(&cache, Scope::All, &[("a", 1), ("b", 1)]).await,
            (vec!["a1".into(), "b1".into()], 2)
        );
        assert_eq!(ask_about(&cache, Scope::All, &[("a", 1), ("b", 1)]).await.1, 0);
        assert_eq!(
            ask_about(&cache, Scope::All, &[("a", 2), ("b", 1)]).await,
            (vec!["a2".into(), "b1".into()], 1)
        );
        assert_eq!(ask_about(&cache, Scope::All, &[("b", 1)]).await.1, 0);
        assert_eq!(lock(&cache).len(), 1);
    }

    #[tokio::test]
    async fn a_part_asks_about_what_is_new_in_it_and_forgets_nothing_else() {
        let cache = Mutex::default();
        ask_about(&cache, Scope::All, &[("a", 1), ("b", 1)]).await;
        assert_eq!(ask_about(&cache, Scope::Part, &[("b", 2)]).await.1, 1);
        assert_eq!(ask_about(&cache, Scope::All, &[("a", 1), ("b", 2)]).await.1, 0);
    }

    #[tokio::test]
    async fn what_goes_away_between_list_and_status_is_left_out() {
        let cache = Mutex::default();
        assert_eq!(
            ask_about(&cache, Scope::All, &[("a", 1), ("gone", 1)]).await.0,
            ["a1"]
        );
    }

    #[tokio::test]
    async fn a_failing_status_fails_the_whole_list() {
        let cache: Mutex<HashMap<String, (i32, String)>> = Mutex::default();
        let listed = vec![("broken".to_owned(), 1)];
        let outcome = known_or_asked(
            &cache,
            Scope::All,
            listed,
            Clone::clone,
            |(id, _): (String, i32)| async { Err(RuntimeError::Failed(id)) },
        )
        .await;
        assert!(matches!(outcome, Err(RuntimeError::Failed(_))));
    }

    #[test]
    fn an_exit_without_a_reason_gets_one_from_its_code() {
        let status = |exit_code, reason: &str| api::ContainerStatus {
            state: api::ContainerState::ContainerExited.into(),
            created_at: 5,
            exit_code,
            reason: reason.to_owned(),
            ..Default::default()
        };
        let reason = |status| match container_state(&status) {
            ContainerState::Exited { reason, .. } => reason,
            other => panic!("{other:?}"),
        };
        assert_eq!(reason(status(0, "")), "Completed");
        assert_eq!(reason(status(1, "")), "Error");
        assert_eq!(reason(status(137, "OOMKilled")), "OOMKilled");
    }

    #[test]
    fn a_container_that_never_started_has_no_start_time_and_ends_when_it_was_made() {
        let status = api::ContainerStatus {
            state: api::ContainerState::ContainerExited.into(),
            created_at: 5,
            exit_code: 128,
            ..Default::default()
        };
        let ContainerState::Exited {
            started_at,
            finished_at,
            ..
        } = container_state(&status)
        else {
            panic!("not exited");
        };
        assert_eq!(started_at, None);
        assert_eq!(finished_at.as_nanosecond(), 5);
    }

    #[test]
    fn a_network_that_is_not_ready_is_explained() {
        let condition = |name: &str, status, message: &str| api::RuntimeCondition {
            r#type: name.to_owned(),
            status,
            reason: "R".to_owned(),
            message: message.to_owned(),
        };
        let status = runtime_status(&[
            condition("RuntimeReady", true, ""),
            condition("NetworkReady", false, "cni plugin not initialized"),
        ]);
        assert!(status.ready && !status.network_ready);
        assert_eq!(status.message, "cni plugin not initialized");
    }
}
