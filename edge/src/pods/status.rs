//! A pod's status from its record: a pure function, a kubelet's rules.

use std::collections::BTreeMap;
use std::net::IpAddr;

use jiff::Timestamp;
use k8s_openapi::api::core::v1::{
    Container, ContainerState, ContainerStateRunning, ContainerStateTerminated, ContainerStateWaiting,
    ContainerStatus, HostIP, Pod, PodCondition, PodIP, PodStatus, VolumeMount, VolumeMountStatus,
};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;

use super::plan::{any_regular_started, inits, is_sidecar, regulars, restarts};
use super::record::{Ended, PodRecord, State};
use super::resources;
use super::{ephemeral, restart_all};

/// Why a container does not run yet, or not again.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Waiting {
    /// `ImagePullBackOff`, `CrashLoopBackOff`, …
    pub(crate) reason: String,
    /// For people.
    pub(crate) message: String,
}

/// What a status is made from besides spec and record.
pub(crate) struct Context<'a> {
    /// Prefix of container ids.
    pub(crate) scheme: &'a str,
    /// The node's address.
    pub(crate) host_ip: Option<IpAddr>,
    /// The sandbox's addresses.
    pub(crate) pod_ips: &'a [IpAddr],
    /// A sandbox is there and has its network.
    pub(crate) sandbox_ready: bool,
    /// Errors by container name.
    pub(crate) waiting: &'a BTreeMap<String, Waiting>,
    /// Now.
    pub(crate) now: Timestamp,
}

/// How a pod stands by its containers alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Phase {
    Pending,
    Running,
    Succeeded,
    Failed,
}

impl Phase {
    fn text(self) -> &'static str {
        match self {
            Self::Pending => "Pending",
            Self::Running => "Running",
            Self::Succeeded => "Succeeded",
            Self::Failed => "Failed",
        }
    }
}

/// The phase that the containers' states give (`getPhase` of a kubelet).
pub(crate) fn phase(pod: &Pod, record: &PodRecord) -> Phase {
    let ran = any_regular_started(pod, record) || regulars(pod).iter().any(|c| ended(record, c).is_some());
    let mut init_pending = false;
    for container in inits(pod) {
        let state = record.last(&container.name).map(|i| &i.state);
        if is_sidecar(container) {
            let started = record.containers.get(&container.name).is_some_and(|c| c.started);
            init_pending |= !ran && !started;
            continue;
        }
        match state {
            Some(State::Exited(e)) if e.code == 0 => {}
            Some(State::Exited(e)) if !ran && !restarts(pod, container, e.code) => return Phase::Failed,
            _ => init_pending |= !ran,
        }
    }
    let (mut running, mut waiting, mut stopped, mut succeeded, mut again, mut unknown) =
        (0, 0, 0, 0, false, 0);
    for container in regulars(pod) {
        match record.last(&container.name).map(|i| &i.state) {
            None | Some(State::Created) => waiting += 1,
            Some(State::Running(_)) => running += 1,
            // Taken away so that the pod starts from its beginning.
            Some(State::Unknown) if restarted_with_the_pod(record, &container.name) => {
                stopped += 1;
                again = true;
            }
            Some(State::Unknown) => unknown += 1,
            Some(State::Exited(e)) => {
                stopped += 1;
                succeeded += usize::from(e.code == 0);
                again |= restarts(pod, container, e.code);
            }
        }
    }
    if record.restarting_all {
        Phase::Running
    } else if init_pending || waiting > 0 || unknown > 0 {
        Phase::Pending
    } else if running > 0 || again || stopped == 0 {
        Phase::Running
    } else if succeeded == stopped {
        Phase::Succeeded
    } else {
        Phase::Failed
    }
}

/// The container's newest instance was removed by a rule `RestartAllContainers`.
fn restarted_with_the_pod(record: &PodRecord, container: &str) -> bool {
    let known = record.containers.get(container);
    known
        .and_then(|k| k.previous.as_ref())
        .is_some_and(|ended| ended.reason == restart_all::REASON)
}

/// The phase of a pod whose termination is complete: always terminal.
pub(crate) fn final_succeeded(pod: &Pod, record: &PodRecord) -> bool {
    !regulars(pod).is_empty()
        && regulars(pod)
            .iter()
            .all(|c| ended(record, c).is_some_and(|e| e.code == 0))
}

fn ended<'a>(record: &'a PodRecord, container: &Container) -> Option<&'a Ended> {
    match &record.last(&container.name)?.state {
        State::Exited(ended) => Some(ended),
        _ => None,
    }
}

/// The whole status. `record.status` is the one before: transition times are kept from it.
pub(crate) fn build(pod: &Pod, record: &PodRecord, context: &Context<'_>) -> PodStatus {
    if let Some(end) = super::conditions::rejected(record) {
        return super::conditions::rejected_status(pod, record, end, context.now);
    }
    let allocated = record.allocated.as_ref().map(|given| given.apply(pod));
    let pod = allocated.as_deref().unwrap_or(pod);
    let phase = match &record.end {
        // Terminal is final, and withheld until nothing can be running any more.
        Some(end) if record.released && end.succeeded => Phase::Succeeded,
        Some(_) if record.released => Phase::Failed,
        _ => match phase(pod, record) {
            Phase::Succeeded | Phase::Failed => Phase::Running,
            // Init containers run again after the sandbox was lost; the pod has been seen to run all the same.
            Phase::Pending if was_running(record) => Phase::Running,
            other => other,
        },
    };
    let mut init_statuses: Vec<_> = inits(pod)
        .iter()
        .map(|c| container_status(pod, c, record, context))
        .collect();
    let initialized = any_regular_started(pod, record);
    for (container, status) in inits(pod).iter().zip(&mut init_statuses) {
        let never_seen = record.last(&container.name).is_none();
        if initialized && never_seen && !is_sidecar(container) {
            status.ready = true;
            status.state = Some(ContainerState {
                terminated: Some(ContainerStateTerminated {
                    exit_code: 0,
                    reason: Some("Completed".to_owned()),
                    message: Some(
                        "Unable to get init container status from container runtime and pod has been \
                                   initialized, treat it as exited normally"
                            .to_owned(),
                    ),
                    ..Default::default()
                }),
                ..Default::default()
            });
        }
    }
    let mut statuses: Vec<_> = regulars(pod)
        .iter()
        .map(|c| container_status(pod, c, record, context))
        .collect();
    statuses.sort_by(|a, b| a.name.cmp(&b.name));
    let generation = pod.metadata.generation;
    let mut conditions = conditions(pod, record, phase, &init_statuses, &statuses, context);
    conditions.extend(super::conditions::of_resize(record));
    conditions.extend(super::conditions::disruption(record));
    // Before the first report, what the API server has: the scheduler's PodScheduled keeps its time.
    let before = record.status.as_ref().or(pod.status.as_ref());
    stamp(&mut conditions, before, generation, context.now);
    let host_ip = context.host_ip.map(|ip| ip.to_string());
    let host_network = pod.spec.as_ref().and_then(|s| s.host_network).unwrap_or(false);
    let own: Vec<String> = context.pod_ips.iter().map(ToString::to_string).collect();
    let old = record.status.as_ref();
    let pod_ips = if !own.is_empty() {
        Some(own)
    } else if host_network || context.sandbox_ready {
        host_ip.clone().map(|ip| vec![ip])
    } else {
        // A stopped pod keeps the address that it had.
        old.and_then(|s| s.pod_ips.clone())
            .map(|ips| ips.into_iter().map(|ip| ip.ip).collect())
    };
    let end = record.end.as_ref();
    PodStatus {
        phase: Some(phase.text().to_owned()),
        conditions: Some(conditions),
        message: end.map(|e| e.message.clone()).filter(|m| !m.is_empty()),
        reason: end.map(|e| e.reason.clone()).filter(|r| !r.is_empty()),
        host_ips: host_ip.clone().map(|ip| vec![HostIP { ip }]),
        host_ip,
        pod_ip: pod_ips.as_ref().and_then(|ips| ips.first().cloned()),
        pod_ips: pod_ips.map(|ips| ips.into_iter().map(|ip| PodIP { ip }).collect()),
        start_time: record.start_time.map(Time),
        init_container_statuses: (!init_statuses.is_empty()).then_some(init_statuses),
        container_statuses: Some(statuses),
        ephemeral_container_statuses: ephemeral::statuses(pod, |c| container_status(pod, c, record, context)),
        qos_class: pod.status.as_ref().and_then(|s| s.qos_class.clone()),
        observed_generation: generation,
        allocated_resources: Some(resources::to_list(&resources::requests(pod))).filter(|l| !l.is_empty()),
        resources: Some(
            record
                .pod_actuated
                .clone()
                .unwrap_or_else(|| resources::effective(pod)),
        ),
        ..Default::default()
    }
}

fn was_running(record: &PodRecord) -> bool {
    let before = record.status.as_ref().and_then(|s| s.phase.as_deref());
    before == Some(Phase::Running.text())
}

fn container_status(
    pod: &Pod,
    container: &Container,
    record: &PodRecord,
    context: &Context<'_>,
) -> ContainerStatus {
    let mut status = ContainerStatus {
        name: container.name.clone(),
        image: container.image.clone().unwrap_or_default(),
        started: Some(false),
        ..Default::default()
    };
    let is_init = inits(pod).iter().any(|c| c.name == container.name);
    let known = record.containers.get(&container.name);
    let error = context.waiting.get(&container.name);
    let waiting = || {
        let default = if inits(pod).is_empty() {
            "ContainerCreating"
        } else {
            "PodInitializing"
        };
        let (reason, message) =
            error.map_or((default, None), |w| (w.reason.as_str(), Some(w.message.clone())));
        Some(ContainerState {
            waiting: Some(ContainerStateWaiting {
                reason: Some(reason.to_owned()),
                message: message.filter(|m| !m.is_empty()),
            }),
            ..Default::default()
        })
    };
    let previous = known
        .and_then(|k| k.previous.as_ref())
        .map(|e| terminated(e, context));
    let Some(last) = known.and_then(|k| k.last.as_ref()) else {
        status.state = waiting();
        return status;
    };
    status.restart_count = i32::try_from(last.restart_count).unwrap_or(i32::MAX);
    status.container_id = Some(format!("{}://{}", context.scheme, last.id));
    status.image_id = last.image_ref.clone();
    status.user = last.user.as_ref().map(Into::into);
    status.last_state = previous;
    status.volume_mounts = volume_mounts(container);
    let given = container.resources.clone().unwrap_or_default();
    status.allocated_resources.clone_from(&given.requests);
    status.resources = Some(match (&last.state, known.and_then(|k| k.actuated.as_ref())) {
        (State::Running(_), Some(has)) => has.resources.clone(),
        _ => given,
    });
    match &last.state {
        State::Created => {
            status.state = waiting();
        }
        State::Unknown => {
            status.state = waiting();
            if last.lost && restarted_with_the_pod(record, &container.name) {
                status.restart_count += 1;
            }
        }
        State::Running(since) => {
            status.state = Some(ContainerState {
                running: Some(ContainerStateRunning {
                    started_at: Some(Time(*since)),
                }),
                ..Default::default()
            });
            let regular_init = is_init && !is_sidecar(container);
            status.started = Some(known.is_some_and(|k| k.started));
            status.ready = !regular_init && known.is_some_and(|k| k.ready);
        }
        State::Exited(ended) => {
            let again = record.end.is_none() && restarts(pod, container, ended.code);
            status.ready = is_init && !is_sidecar(container) && ended.code == 0;
            if again && (error.is_some() || ended.vanished) {
                status.state = waiting();
                status.last_state = Some(terminated(ended, context));
                if ended.vanished {
                    status.restart_count += 1;
                }
            } else {
                status.state = Some(terminated(ended, context));
            }
        }
    }
    status
}

/// The mounts as they are: read-only ones are so below other mounts too only where that was demanded, for then the
/// container would not have been made without it.
fn volume_mounts(container: &Container) -> Option<Vec<VolumeMountStatus>> {
    let mounts = container.volume_mounts.as_ref().filter(|m| !m.is_empty())?;
    let status = |mount: &VolumeMount| {
        let read_only = mount.read_only == Some(true);
        let demanded = mount.recursive_read_only.as_deref() == Some("Enabled");
        VolumeMountStatus {
            name: mount.name.clone(),
            mount_path: mount.mount_path.clone(),
            read_only: read_only.then_some(true),
            recursive_read_only: read_only.then(|| if demanded { "Enabled" } else { "Disabled" }.to_owned()),
            ..VolumeMountStatus::default()
        }
    };
    Some(mounts.iter().map(status).collect())
}

fn terminated(ended: &Ended, context: &Context<'_>) -> ContainerState {
    ContainerState {
        terminated: Some(ContainerStateTerminated {
            container_id: Some(format!("{}://{}", context.scheme, ended.id)),
            exit_code: ended.code,
            finished_at: Some(Time(ended.finished)),
            message: Some(ended.message.clone()).filter(|m| !m.is_empty()),
            reason: Some(ended.reason.clone()),
            signal: None,
            started_at: ended.started.map(Time),
        }),
        ..Default::default()
    }
}

/// One condition before times and generation are put in.
pub(crate) fn condition(kind: &str, ok: bool, reason: &str, message: String) -> PodCondition {
    PodCondition {
        type_: kind.to_owned(),
        status: if ok { "True" } else { "False" }.to_owned(),
        reason: (!reason.is_empty()).then(|| reason.to_owned()),
        message: (!message.is_empty()).then_some(message),
        ..Default::default()
    }
}

fn conditions(
    pod: &Pod,
    record: &PodRecord,
    phase: Phase,
    init_statuses: &[ContainerStatus],
    statuses: &[ContainerStatus],
    context: &Context<'_>,
) -> Vec<PodCondition> {
    let sidecars = inits(pod)
        .iter()
        .zip(init_statuses)
        .filter(|(c, _)| is_sidecar(c))
        .map(|(_, s)| s);
    let unready: Vec<&str> = sidecars
        .chain(statuses)
        .filter(|s| !s.ready)
        .map(|s| s.name.as_str())
        .collect();
    let containers_ready = match phase {
        Phase::Succeeded => condition("ContainersReady", false, "PodCompleted", String::new()),
        Phase::Failed => condition("ContainersReady", false, "PodFailed", String::new()),
        _ if unready.is_empty() => condition("ContainersReady", true, "", String::new()),
        _ => {
            let message = format!("containers with unready status: [{}]", unready.join(" "));
            condition("ContainersReady", false, "ContainersNotReady", message)
        }
    };
    let restarting = restart_all::may_happen(pod).then(|| match phase {
        Phase::Succeeded => condition("AllContainersRestarting", false, "PodCompleted", String::new()),
        Phase::Failed => condition("AllContainersRestarting", false, "PodFailed", String::new()),
        _ if record.restarting_all => {
            let message = "container exited with restart policy rule".to_owned();
            condition(
                "AllContainersRestarting",
                true,
                "RestartAllContainersStarted",
                message,
            )
        }
        _ => condition("AllContainersRestarting", false, "", String::new()),
    });
    let mut all = vec![
        condition(
            "PodReadyToStartContainers",
            context.sandbox_ready,
            "",
            String::new(),
        ),
        initialized(pod, record, phase, init_statuses),
        ready(pod, &containers_ready),
        containers_ready,
        condition("PodScheduled", true, "", String::new()),
    ];
    all.extend(restarting);
    all
}

fn initialized(pod: &Pod, record: &PodRecord, phase: Phase, statuses: &[ContainerStatus]) -> PodCondition {
    if phase == Phase::Succeeded {
        return condition("Initialized", true, "PodCompleted", String::new());
    }
    let ran = regulars(pod)
        .iter()
        .filter_map(|c| record.last(&c.name))
        .any(|i| matches!(i.state, State::Running(_) | State::Exited(_)) && record.is_current(i));
    let incomplete: Vec<&str> = inits(pod)
        .iter()
        .zip(statuses)
        .filter(|(c, s)| {
            if is_sidecar(c) {
                s.started != Some(true)
            } else {
                !s.ready
            }
        })
        .map(|(_, s)| s.name.as_str())
        .collect();
    if ran || incomplete.is_empty() {
        return condition("Initialized", true, "", String::new());
    }
    let message = format!("containers with incomplete status: [{}]", incomplete.join(" "));
    condition("Initialized", false, "ContainersNotInitialized", message)
}

fn ready(pod: &Pod, containers_ready: &PodCondition) -> PodCondition {
    if containers_ready.status != "True" {
        return PodCondition {
            type_: "Ready".to_owned(),
            ..containers_ready.clone()
        };
    }
    let mut messages = Vec::new();
    for gate in pod.spec.iter().flat_map(|s| s.readiness_gates.iter().flatten()) {
        let found = pod.status.iter().flat_map(|s| s.conditions.iter().flatten());
        match found.into_iter().find(|c| c.type_ == gate.condition_type) {
            None => messages.push(format!(
                "corresponding condition of pod readiness gate \"{}\" does not exist.",
                gate.condition_type
            )),
            Some(c) if c.status != "True" => messages.push(format!(
                "the status of pod readiness gate \"{}\" is not \"True\", but {}",
                gate.condition_type, c.status
            )),
            Some(_) => {}
        }
    }
    if messages.is_empty() {
        condition("Ready", true, "", String::new())
    } else {
        condition("Ready", false, "ReadinessGatesNotReady", messages.join(", "))
    }
}

/// Puts in generation and times; a time changes only with its condition's status.
pub(crate) fn stamp(
    conditions: &mut [PodCondition],
    before: Option<&PodStatus>,
    generation: Option<i64>,
    now: Timestamp,
) {
    for condition in conditions {
        let old = before
            .iter()
            .flat_map(|s| s.conditions.iter().flatten())
            .find(|c| c.type_ == condition.type_ && c.status == condition.status);
        condition.last_transition_time = old
            .and_then(|c| c.last_transition_time.clone())
            .or(condition.last_transition_time.take())
            .or(Some(Time(now)));
        condition.observed_generation = condition.observed_generation.or(generation);
    }
}

#[cfg(test)]
#[path = "status_tests.rs"]
mod tests;
