//! Events as a kubelet emits them: repeated ones are counted, too many of one pod are held back.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use jiff::Timestamp;
use k8s_openapi::api::core::v1::Pod;
use skerry_proto::SiteName;
use skerry_proto::link::{EventReport, report};

use crate::clock::Clock;
use crate::store::{NewReport, Store};

/// Events of one pod that may come at once.
const BURST: f64 = 25.0;
/// Seconds after which one more may come.
const REFILL_SECONDS: f64 = 300.0;
/// Series that are remembered; beyond it all are forgotten and counting starts anew.
const MAX_SERIES: usize = 4096;

/// Whether an operator should care.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Level {
    /// All is as it should be.
    Normal,
    /// Somebody should look.
    Warning,
}

/// Emits events into the outbox, in order and without waiting for the disk. Clones share the counts.
#[derive(Clone)]
pub(crate) struct Events {
    store: Store,
    clock: Arc<dyn Clock>,
    series: Arc<Mutex<Book>>,
}

#[derive(Default)]
struct Book {
    series: HashMap<(String, String, String, String), Series>,
    buckets: HashMap<String, Bucket>,
}

struct Series {
    count: u32,
    first: Timestamp,
}

struct Bucket {
    tokens: f64,
    at: Timestamp,
}

impl Events {
    /// Emits into `store`.
    pub(crate) fn new(store: Store, clock: Arc<dyn Clock>) -> Self {
        Self {
            store,
            clock,
            series: Arc::default(),
        }
    }

    /// An event of the pod, or of one of its containers.
    pub(crate) async fn emit(
        &self,
        pod: &Pod,
        container: Option<&str>,
        level: Level,
        reason: &str,
        message: String,
    ) {
        let now = self.clock.now();
        let uid = pod.metadata.uid.clone().unwrap_or_default();
        let field_path = container.map_or_else(String::new, |name| {
            let list = if super::plan::inits(pod).iter().any(|c| c.name == name) {
                "initContainers"
            } else if super::ephemeral::is_one(pod, name) {
                "ephemeralContainers"
            } else {
                "containers"
            };
            format!("spec.{list}{{{name}}}")
        });
        let about = EventReport {
            kind: "Pod".to_owned(),
            api_version: "v1".to_owned(),
            namespace: pod.metadata.namespace.clone().unwrap_or_default(),
            name: pod.metadata.name.clone().unwrap_or_default(),
            uid,
            field_path,
            ..Default::default()
        };
        self.send(about, level, reason, message, now).await;
    }

    /// Counts and queues an event about an object.
    async fn send(&self, about: EventReport, level: Level, reason: &str, message: String, now: Timestamp) {
        let key = (
            about.uid.clone(),
            about.field_path.clone(),
            reason.to_owned(),
            message.clone(),
        );
        let counted = self
            .series
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .count(key, now);
        tracing::debug!(
            kind = about.kind,
            name = about.name,
            uid = about.uid,
            reason,
            message,
            "event"
        );
        let Some((count, first)) = counted else { return };
        let nanos = |t: Timestamp| i64::try_from(t.as_nanosecond()).unwrap_or_default();
        let event = EventReport {
            r#type: match level {
                Level::Normal => "Normal",
                Level::Warning => "Warning",
            }
            .to_owned(),
            reason: reason.to_owned(),
            message,
            count,
            first_unix_nanos: nanos(first),
            last_unix_nanos: nanos(now),
            ..about
        };
        let report = NewReport {
            coalesce: None,
            observed: now,
            body: report::Report::Event(event),
        };
        // Nothing waits for an event. One that cannot be stored is named in the log by the store.
        drop(self.store.queue_report(report));
    }

    /// Forgets a pod that is gone.
    pub(crate) fn forget(&self, uid: &str) {
        let mut book = self.series.lock().unwrap_or_else(PoisonError::into_inner);
        book.series.retain(|key, _| key.0 != uid);
        book.buckets.remove(uid);
    }
}

/// Emits events about the Node. Clones share the counts, also with those about pods.
#[derive(Clone)]
pub struct NodeEvents(pub(super) Events);

impl NodeEvents {
    /// Emits into `store`, with counts of its own.
    pub fn new(store: Store, clock: Arc<dyn Clock>) -> Self {
        Self(Events::new(store, clock))
    }

    /// An event of the Node, under its name as UID, as a kubelet's.
    pub async fn emit(&self, node: &SiteName, level: Level, reason: &str, message: String) {
        let about = EventReport {
            kind: "Node".to_owned(),
            api_version: "v1".to_owned(),
            name: node.to_string(),
            uid: node.to_string(),
            ..Default::default()
        };
        let now = self.0.clock.now();
        self.0.send(about, level, reason, message, now).await;
    }
}

impl Book {
    /// Counts an event; `None` when the pod has used up its share.
    fn count(&mut self, key: (String, String, String, String), now: Timestamp) -> Option<(u32, Timestamp)> {
        if self.series.len() >= MAX_SERIES {
            self.series.clear();
        }
        let bucket = self.buckets.entry(key.0.clone()).or_insert(Bucket {
            tokens: BURST,
            at: now,
        });
        // A clock that was set back gives a share too much, and no hours without events.
        let elapsed = now.duration_since(bucket.at).as_secs_f64().abs();
        bucket.tokens = (bucket.tokens + elapsed / REFILL_SECONDS).min(BURST);
        bucket.at = now;
        let series = self.series.entry(key).or_insert(Series { count: 0, first: now });
        series.count = series.count.saturating_add(1);
        if bucket.tokens < 1.0 {
            return None;
        }
        bucket.tokens -= 1.0;
        Some((series.count, series.first))
    }
}

#[cfg(test)]
mod tests {
    use super::super::fixtures::at;
    use super::*;

    fn key(message: &str) -> (String, String, String, String) {
        ("u".into(), String::new(), "R".into(), message.into())
    }

    #[test]
    fn the_same_event_again_is_counted_from_its_first_time() {
        let mut book = Book::default();
        assert_eq!(book.count(key("a"), at(0)), Some((1, at(0))));
        assert_eq!(book.count(key("a"), at(9)), Some((2, at(0))));
        assert_eq!(book.count(key("b"), at(9)), Some((1, at(9))));
    }

    #[test]
    fn a_pod_that_floods_is_held_back_to_one_every_five_minutes() {
        let mut book = Book::default();
        let sent = (0..100).filter(|_| book.count(key("a"), at(0)).is_some()).count();
        assert_eq!(sent, 25);
        assert_eq!(book.count(key("a"), at(299)), None);
        assert_eq!(book.count(key("a"), at(300)).unwrap().0, 102);
    }
}
