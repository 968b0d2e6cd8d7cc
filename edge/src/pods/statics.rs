//! Static pods among the others: where their workers come from, and under which UID they are reported.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use k8s_openapi::api::core::v1::Pod;
use skerry_proto::link::Kind;
use skerry_proto::object::Uid;
use tokio::sync::watch;

use super::worker::Worker;
use super::{Pods, Supervisor};
use crate::manifests::full_name;
use crate::manifests::mirror::mirrored;
use crate::manifests::read::is_static_uid;

/// The static pods of this site.
#[derive(Clone, Debug, PartialEq)]
pub enum StaticPods {
    /// The files could not be read yet: nobody knows which there are, so none is stopped.
    Unknown,
    /// These.
    Known(BTreeMap<Uid, Arc<Pod>>),
}

impl Default for StaticPods {
    fn default() -> Self {
        Self::Known(BTreeMap::new())
    }
}

impl Pods {
    /// Takes the set of static pods; the pods room starts and stops what differs.
    pub fn set_static(&self, set: StaticPods) {
        self.shared.statics.send_if_modified(|old| {
            let changed = *old != set;
            *old = set;
            changed
        });
    }

    /// The set of static pods, as it changes.
    pub fn statics(&self) -> watch::Receiver<StaticPods> {
        self.shared.statics.subscribe()
    }

    /// The static pod of that name.
    pub fn static_pod(&self, namespace: &str, name: &str) -> Option<Arc<Pod>> {
        let wanted = format!("{namespace}/{name}");
        match &*self.shared.statics.borrow() {
            StaticPods::Unknown => None,
            StaticPods::Known(pods) => pods.values().find(|pod| full_name(pod) == wanted).cloned(),
        }
    }
}

impl Supervisor {
    /// Whether a pod that the store does not know must be left alone all the same.
    pub(super) fn is_spared(&self, uid: &Uid) -> bool {
        is_static_uid(uid.as_str())
            && match &*self.shared.statics.borrow() {
                StaticPods::Unknown => true,
                StaticPods::Known(pods) => pods.contains_key(uid),
            }
    }

    /// Starts and stops workers as the files say. A pod waits for the end of the one that has its name.
    pub(super) fn look_at_statics(&mut self) {
        let StaticPods::Known(pods) = self.shared.statics.borrow().clone() else {
            return;
        };
        let mut names = BTreeSet::new();
        for (uid, orders) in &self.workers {
            if !is_static_uid(uid.as_str()) {
                continue;
            }
            if !pods.contains_key(uid) {
                orders.send_if_modified(|o| !std::mem::replace(&mut o.removed, true));
            }
            names.extend(orders.borrow().pod.as_deref().map(full_name));
        }
        for (uid, pod) in pods {
            // One that is being removed and came back starts anew once its worker has ended.
            if self.workers.contains_key(&uid) || !names.insert(full_name(&pod)) {
                continue;
            }
            self.start(&uid);
            if let Some(orders) = self.workers.get(&uid) {
                orders.send_modify(|o| o.pod = Some(pod));
            }
        }
    }

    /// A mirror came or changed: its static pod reports under the mirror's UID.
    pub(super) fn mirror_changed(&self) {
        self.wake(|uid| is_static_uid(uid.as_str()));
    }
}

impl Worker {
    /// The UID under which the API knows this pod: for a static pod its mirror's, `None` while there is no mirror.
    pub(super) fn api_uid(&self) -> Option<Uid> {
        if !is_static_uid(self.uid.as_str()) {
            return Some(self.uid.clone());
        }
        let record = &self.record;
        let found = self
            .shared
            .store
            .find(Kind::Pod, &record.namespace, &record.name)
            .ok()??;
        let mirror: Pod = found.decode().ok()?;
        (mirrored(&mirror) == Some(self.uid.as_str())).then_some(found.key.uid)
    }
}

/// Whether a worker's pod is reported under its own UID.
pub(super) fn first_report(uid: &Uid) -> Option<Uid> {
    (!is_static_uid(uid.as_str())).then(|| uid.clone())
}
