//! Notices that the cluster was restored from an older backup.
//!
//! A watch does not: a resourceVersion that is newer than the restored cluster's is waited for in silence, and everything
//! before it is left out. So the newest resourceVersion is asked for now and then: it never goes back by itself.

use std::time::Duration;

use k8s_openapi::api::core::v1::Namespace;
use kube::Client;
use kube::api::{Api, ListParams};

/// How often it is asked for.
const EVERY: Duration = Duration::from_secs(5);

/// The highest resourceVersion that was seen.
#[derive(Default)]
struct Highest(u64);

impl Highest {
    /// Takes the newest one; whether the cluster has gone back. What is no number says nothing.
    fn take(&mut self, version: Option<&str>) -> bool {
        let Some(version) = version.and_then(|version| version.parse().ok()) else {
            return false;
        };
        let back = version < self.0;
        self.0 = self.0.max(version);
        back
    }
}

/// Ends when the cluster's resourceVersions have gone back. A cluster that does not answer is asked again.
pub async fn restored(client: Client) {
    let namespaces: Api<Namespace> = Api::all(client);
    let mut highest = Highest::default();
    let mut look = tokio::time::interval(EVERY);
    look.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        look.tick().await;
        // Without a resourceVersion of its own, a list is as new as etcd.
        let Ok(list) = namespaces.list_metadata(&ListParams::default().limit(1)).await else {
            continue;
        };
        if highest.take(list.metadata.resource_version.as_deref()) {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_version_below_one_that_was_seen_is_a_restore() {
        let mut highest = Highest::default();
        let seen = ["5", "5", "9", "", "x"].map(|version| highest.take(Some(version)));
        assert_eq!(seen, [false; 5]);
        assert!(!highest.take(None));
        assert!(highest.take(Some("8")));
    }
}
