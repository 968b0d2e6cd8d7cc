//! The class of a pod: whose status goes first.

use std::sync::atomic::Ordering;

use k8s_openapi::api::core::v1::Pod;
use skerry_proto::{Class, InvalidClass, POD_CLASS};

use super::Pods;
use super::events::Level;
use super::worker::Worker;

/// The class of a pod, and what is wrong with the name that it gives.
fn of(pod: &Pod, critical_priority: i32) -> (Class, Option<InvalidClass>) {
    let priority = pod.spec.as_ref().and_then(|spec| spec.priority).unwrap_or(0);
    let by_priority = Class::of_priority(priority, critical_priority);
    let maps = [&pod.metadata.annotations, &pod.metadata.labels];
    match maps.into_iter().flatten().find_map(|map| map.get(POD_CLASS)) {
        None => (by_priority, None),
        Some(named) => match named.parse() {
            Ok(class) => (class, None),
            Err(error) => (by_priority, Some(error)),
        },
    }
}

/// The class of a stored pod, for whoever serves its streams.
pub(crate) fn class_of(pod: &Pod) -> Class {
    of(pod, skerry_proto::CRITICAL_PRIORITY).0
}

impl Pods {
    /// From which priority on pods are critical, as the provider says.
    pub fn set_critical_priority(&self, priority: i32) {
        if priority > 0 {
            self.shared.critical_priority.store(priority, Ordering::Relaxed);
        }
    }
}

impl Worker {
    pub(super) fn class(&self, pod: &Pod) -> Class {
        of(pod, self.shared.critical_priority.load(Ordering::Relaxed)).0
    }

    /// A class that does not exist is said.
    pub(super) async fn say_wrong_class(&self, pod: &Pod) {
        let (class, wrong) = of(pod, self.shared.critical_priority.load(Ordering::Relaxed));
        if let Some(error) = wrong {
            let message = format!("{POD_CLASS}: {error}; the pod counts as {class}, by its priority");
            self.shared
                .events
                .emit(pod, None, Level::Warning, "InvalidClass", message)
                .await;
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn class(pod: Value) -> (Class, bool) {
        let (class, wrong) = of(&serde_json::from_value(pod).unwrap(), 1_000);
        (class, wrong.is_some())
    }

    #[test]
    fn a_pod_says_its_class_itself_or_by_its_priority() {
        assert_eq!(class(json!({})), (Class::Standard, false));
        assert_eq!(
            class(json!({"spec": {"priority": 1_000, "containers": []}})),
            (Class::Critical, false)
        );
        let said = |map: &str, value: &str| json!({"metadata": {map: {POD_CLASS: value}}, "spec": {"priority": -5, "containers": []}});
        assert_eq!(class(said("annotations", "critical")), (Class::Critical, false));
        assert_eq!(class(said("labels", "standard")), (Class::Standard, false));
        assert_eq!(class(said("labels", "Critical")), (Class::BestEffort, true));
    }
}
