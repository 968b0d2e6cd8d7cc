//! The cluster as far as a site is concerned: pods, what they refer to, and what was written about them.

use std::collections::BTreeMap;
use std::sync::Arc;

use serde_json::{Value, json};
use skerry_proto::link::{EventReport, Kind, PodStatusReport, Report, report};
use skerry_proto::object::{ObjectKey, Uid};
use skerry_provider::cluster::{Desired, DesiredToken, Object};
use skerry_provider::refs::TokenNeed;
use skerry_provider::refs::tokens::{TokenOwner, token_uid};

#[derive(Clone)]
pub(crate) struct Pod {
    pub(crate) version: u32,
    pub(crate) deleting: bool,
    token: bool,
    object: Arc<Object>,
}

/// A status as the API has it: who wrote it, and its number on its machine.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Status {
    pub(crate) session: u64,
    pub(crate) machine: usize,
    pub(crate) number: u64,
}

/// Clones are backups.
#[derive(Clone, Default)]
pub(crate) struct Cluster {
    pub(crate) pods: BTreeMap<String, Pod>,
    pub(crate) secrets: BTreeMap<String, (u32, Arc<Object>)>,
    pub(crate) statuses: BTreeMap<String, Status>,
    pub(crate) events: BTreeMap<String, u32>,
    /// The Site's status.
    pub(crate) site: Value,
}

fn object(kind: Kind, uid: &str, value: &Value) -> Arc<Object> {
    let mut whole = json!({"metadata": {"name": uid, "uid": uid, "namespace": "ns"}, "spec": value});
    if value["deleting"] == true {
        whole["metadata"]["deletionTimestamp"] = json!("2026-01-01T00:00:00Z");
    }
    Arc::new(Object::new(kind, whole).unwrap())
}

impl Cluster {
    pub(crate) fn set_pod(&mut self, uid: &str, version: u32, deleting: bool, token: bool) {
        let value = json!({"version": version, "deleting": deleting});
        let pod = Pod {
            version,
            deleting,
            token,
            object: object(Kind::Pod, uid, &value),
        };
        self.pods.insert(uid.to_owned(), pod);
    }

    pub(crate) fn update(&mut self, uid: &str) {
        if let Some(pod) = self.pods.get(uid).cloned() {
            self.set_pod(uid, pod.version + 1, pod.deleting, pod.token);
        }
    }

    pub(crate) fn delete(&mut self, uid: &str) {
        if let Some(pod) = self.pods.get(uid).cloned() {
            self.set_pod(uid, pod.version, true, pod.token);
        }
    }

    pub(crate) fn set_secret(&mut self, uid: &str) {
        let version = self.secrets.get(uid).map_or(0, |(version, _)| version + 1);
        let object = object(Kind::Secret, uid, &json!({"version": version}));
        self.secrets.insert(uid.to_owned(), (version, object));
    }

    pub(crate) fn remove_secret(&mut self, uid: &str) {
        self.secrets.remove(uid);
    }

    pub(crate) fn desired(&self) -> Desired {
        let mut desired = Desired::default();
        let objects = self.pods.values().map(|pod| &pod.object);
        for object in objects.chain(self.secrets.values().map(|(_, object)| object)) {
            desired.objects.insert(object.key.clone(), Arc::clone(object));
        }
        for (uid, pod) in self.pods.iter().filter(|(_, pod)| pod.token) {
            let need = TokenNeed {
                volume: "v".to_owned(),
                path: "p".to_owned(),
                audience: String::new(),
                expiration_seconds: 3600,
            };
            let key = ObjectKey {
                kind: Kind::ServiceAccountToken,
                uid: token_uid(&Uid::from(uid.as_str()), &need),
            };
            let owner = TokenOwner {
                namespace: "ns".to_owned(),
                pod: uid.clone(),
                uid: Uid::from(uid.as_str()),
                service_account: "default".to_owned(),
            };
            let leaving = pod.deleting;
            desired.tokens.insert(key, DesiredToken { owner, need, leaving });
        }
        desired
    }

    /// A write of a report lands. `machine` is where it comes from.
    pub(crate) fn write(
        &mut self,
        report: &Report,
        machine: usize,
        session: u64,
        count_twice: bool,
    ) -> Result<(), String> {
        match report.report.as_ref().unwrap() {
            report::Report::PodStatus(status) => self.write_status(status, machine, session),
            report::Report::Event(event) => {
                let counted = self.events.entry(event_name(event)).or_default();
                if count_twice {
                    *counted += 1;
                } else {
                    *counted = event.count.max(*counted);
                }
                Ok(())
            }
            other => panic!("{other:?}"),
        }
    }

    fn write_status(&mut self, report: &PodStatusReport, machine: usize, session: u64) -> Result<(), String> {
        let Some(pod) = self.pods.get(&report.uid) else {
            return Ok(());
        };
        let status: Value = serde_json::from_slice(&report.status_json).unwrap();
        let new = Status {
            session,
            machine,
            number: status["number"].as_u64().unwrap(),
        };
        if let Some(old) = self.statuses.get(&report.uid) {
            let older = old.machine == machine && old.number > new.number;
            if older || old.session > session {
                return Err(format!(
                    "the status of {} went back: {new:?} after {old:?}",
                    report.uid
                ));
            }
        }
        self.statuses.insert(report.uid.clone(), new);
        if report.finished && pod.deleting {
            self.pods.remove(&report.uid);
        }
        Ok(())
    }
}

/// As the provider names events: by what they say and when the series began.
pub(crate) fn event_name(event: &EventReport) -> String {
    format!("{}/{}/{}", event.uid, event.reason, event.first_unix_nanos)
}
