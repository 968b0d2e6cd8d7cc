//! Conditions and statuses of pods that something special has happened to: refused, resized, ended for others' sake.

use jiff::Timestamp;
use k8s_openapi::api::core::v1::{Pod, PodCondition, PodStatus};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;

use super::record::{End, PodRecord};
use super::status::{condition, stamp};

/// How a pod was turned away, if it was: it ended for a reason before it was given anything.
pub(crate) fn rejected(record: &PodRecord) -> Option<&End> {
    let end = record.end.as_ref().filter(|end| !end.reason.is_empty())?;
    (record.allocated.is_none() && record.sandbox.is_none()).then_some(end)
}

/// The status of a pod that was turned away: it has no containers, and never had.
pub(crate) fn rejected_status(pod: &Pod, record: &PodRecord, end: &End, now: Timestamp) -> PodStatus {
    let generation = pod.metadata.generation;
    let mut conditions = vec![condition("PodScheduled", true, "", String::new())];
    stamp(
        &mut conditions,
        record.status.as_ref().or(pod.status.as_ref()),
        generation,
        now,
    );
    PodStatus {
        phase: Some("Failed".to_owned()),
        reason: Some(end.reason.clone()),
        message: Some(end.message.clone()),
        conditions: Some(conditions),
        start_time: record.start_time.map(Time),
        qos_class: pod.status.as_ref().and_then(|s| s.qos_class.clone()),
        observed_generation: generation,
        ..PodStatus::default()
    }
}

/// Conditions of a resize. They carry the generation that asked for it, not the newest.
pub(crate) fn of_resize(record: &PodRecord) -> Vec<PodCondition> {
    if record.end.is_some() {
        return Vec::new();
    }
    let pending = record.resize.pending.as_ref().map(|pending| PodCondition {
        observed_generation: pending.generation,
        last_transition_time: Some(Time(pending.since)),
        ..condition(
            "PodResizePending",
            true,
            if pending.infeasible {
                "Infeasible"
            } else {
                "Deferred"
            },
            pending.message.clone(),
        )
    });
    let progress = record.resize.progress.as_ref().map(|progress| PodCondition {
        observed_generation: progress.generation,
        ..condition(
            "PodResizeInProgress",
            true,
            if progress.error.is_some() { "Error" } else { "" },
            progress.error.clone().unwrap_or_default(),
        )
    });
    pending.into_iter().chain(progress).collect()
}

/// The condition of a pod that the node ended for the sake of others; only when nothing of it runs any more.
pub(crate) fn disruption(record: &PodRecord) -> Option<PodCondition> {
    let message = record
        .end
        .as_ref()
        .filter(|_| record.released)?
        .disruption
        .clone()?;
    Some(condition(
        "DisruptionTarget",
        true,
        "TerminationByKubelet",
        message,
    ))
}

#[cfg(test)]
mod tests {
    use super::super::allocation::{Allocation, Pending, Progress};
    use super::super::fixtures::{at, pod};
    use super::*;
    use serde_json::json;

    #[test]
    fn a_pod_that_was_turned_away_has_no_containers() {
        let record = PodRecord {
            start_time: Some(at(0)),
            end: Some(End {
                reason: "OutOfcpu".to_owned(),
                message: "Pod was rejected: full".to_owned(),
                ..End::default()
            }),
            ..PodRecord::default()
        };
        let pod = pod(json!({"containers": [{"name": "c"}]}));
        let status = rejected_status(&pod, &record, rejected(&record).unwrap(), at(1));
        assert_eq!(status.reason.as_deref(), Some("OutOfcpu"));
        assert!(status.container_statuses.is_none());
        let taken = PodRecord {
            allocated: Some(Allocation::of(&pod)),
            ..record
        };
        assert!(rejected(&taken).is_none());
    }

    #[test]
    fn a_resize_is_told_with_the_generation_that_asked_for_it() {
        let mut record = PodRecord::default();
        record.resize.pending = Some(Pending {
            infeasible: false,
            message: "full".to_owned(),
            generation: Some(3),
            since: at(0),
        });
        record.resize.progress = Some(Progress {
            error: Some("busy".to_owned()),
            generation: Some(2),
        });
        let told = of_resize(&record);
        assert_eq!(
            (told[0].reason.as_deref(), told[0].observed_generation),
            (Some("Deferred"), Some(3))
        );
        assert_eq!(
            (told[1].reason.as_deref(), told[1].observed_generation),
            (Some("Error"), Some(2))
        );
        record.end = Some(End::default());
        assert!(of_resize(&record).is_empty());
    }
}
