//! Garbage collection of a pod's dead containers and old sandboxes.
//!
//! Source: kubelet, container GC: a few dead instances of each container are kept, for their logs.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use jiff::Timestamp;

use super::record::{PodRecord, View};
use super::worker::Worker;
use crate::runtime::{Container, ContainerState};

/// Which dead containers are kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeadPolicy {
    /// Those that ended less than this ago.
    pub min_age: Duration,
    /// So many of each container, the newest.
    pub per_container: usize,
}

impl Default for DeadPolicy {
    fn default() -> Self {
        Self {
            min_age: Duration::ZERO,
            per_container: 1,
        }
    }
}

impl Worker {
    /// Removes the dead instances that the policy does not keep, with their logs, and sandboxes that nothing uses.
    pub(super) async fn collect_dead(&mut self) {
        let policy = self.shared.config.dead;
        let now = self.shared.clock.now();
        let excess: Vec<Container> = excess(&self.view, &self.record, policy, now).cloned().collect();
        for container in excess {
            if let Err(error) = self.shared.runtime.remove_container(&container.id).await {
                tracing::debug!(id = container.id.0, %error, "a dead container could not be removed");
                continue;
            }
            remove_logs(&container);
        }
        let old: Vec<_> = self.view.sandboxes.iter().skip(1).cloned().collect();
        for sandbox in old {
            let used = self.view.containers.iter().any(|c| c.sandbox == sandbox.id);
            if !used && let Err(error) = self.shared.runtime.remove_sandbox(&sandbox.id).await {
                tracing::debug!(id = sandbox.id.0, %error, "an old sandbox could not be removed");
            }
        }
    }
}

/// The dead instances beyond those that are kept. A container's newest instance stays in any case: its end is the
/// pod's state.
fn excess<'a>(
    view: &'a View,
    record: &'a PodRecord,
    policy: DeadPolicy,
    now: Timestamp,
) -> impl Iterator<Item = &'a Container> {
    let mut kept = BTreeMap::<&str, usize>::new();
    // The view has the newest first.
    view.containers.iter().filter(move |container| {
        let ContainerState::Exited { finished_at, .. } = container.state else {
            return false;
        };
        let age = Duration::try_from(now.duration_since(finished_at)).unwrap_or_default();
        let newest = record
            .last(&container.name)
            .is_some_and(|l| l.id == container.id.0);
        let count = kept.entry(container.name.as_str()).or_default();
        if newest || age < policy.min_age || *count < policy.per_container {
            *count += 1;
            return false;
        }
        true
    })
}

/// Removes the log of an instance that is gone, the rotated parts too.
fn remove_logs(container: &Container) {
    let rotated = crate::rotation::files::rotated(&container.log_path).unwrap_or_default();
    let files: BTreeSet<_> = rotated
        .into_values()
        .chain([container.log_path.clone()])
        .collect();
    for file in files {
        // What cannot be removed goes with the pod.
        let _ = std::fs::remove_file(file);
    }
}

#[cfg(test)]
mod tests {
    use super::super::fixtures::{at, container, exited, running};
    use super::*;

    fn gone(containers: Vec<Container>, policy: DeadPolicy) -> Vec<String> {
        let view = View::new(vec![], containers);
        let mut record = PodRecord::default();
        record.observe(&view, at(100), |_| String::new());
        excess(&view, &record, policy, at(100))
            .map(|c| c.id.0.clone())
            .collect()
    }

    #[test]
    fn beside_a_running_instance_one_dead_one_is_kept_for_its_logs() {
        let life = vec![
            container("c", "id0", 0, exited(10, 1)),
            container("c", "id1", 1, exited(20, 1)),
            container("c", "id2", 2, running(30)),
            container("d", "id3", 0, exited(5, 0)),
        ];
        assert_eq!(gone(life, DeadPolicy::default()), ["id0"]);
    }

    #[test]
    fn the_newest_instance_stays_even_when_none_is_to_be_kept() {
        let policy = DeadPolicy {
            per_container: 0,
            ..DeadPolicy::default()
        };
        let life = vec![
            container("c", "id0", 0, exited(10, 1)),
            container("c", "id1", 1, exited(20, 1)),
        ];
        assert_eq!(gone(life, policy), ["id0"]);
    }

    #[test]
    fn a_young_dead_instance_stays() {
        let policy = DeadPolicy {
            min_age: Duration::from_secs(85),
            per_container: 0,
        };
        let life = vec![
            container("c", "id0", 0, exited(10, 1)),
            container("c", "id1", 1, exited(20, 1)),
            container("c", "id2", 2, running(30)),
        ];
        assert_eq!(gone(life, policy), ["id0"]);
    }
}
