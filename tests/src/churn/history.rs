//! What the API server showed of each pod, held against what may never happen.

use std::collections::{BTreeMap, BTreeSet};
use std::process::{Child, Stdio};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use serde_json::Value;

use crate::kubectl::Kubectl;

/// A watch on the pods of a namespace.
pub(super) struct History {
    watch: Child,
    reader: Option<JoinHandle<()>>,
    seen: Arc<Mutex<Seen>>,
}

#[derive(Default)]
struct Seen {
    pods: BTreeMap<String, Pod>,
    changes: usize,
    broken: Vec<String>,
}

/// The newest of what was seen of one pod.
#[derive(Default)]
struct Pod {
    phase: String,
    start_time: String,
    observed_generation: i64,
    deleted: bool,
    containers: BTreeMap<String, Container>,
    /// By condition: status and time of its last change.
    conditions: BTreeMap<String, (String, String)>,
}

#[derive(Default)]
struct Container {
    id: String,
    restarts: i64,
    earlier: BTreeSet<String>,
}

impl History {
    /// Begins to look.
    pub(super) fn watch(kubectl: &Kubectl) -> Self {
        let mut watch = kubectl
            .command(&["get", "pods", "--watch", "--output-watch-events", "-o", "json"])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .expect("kubectl runs");
        let out = watch.stdout.take().expect("stdout is piped");
        let seen = Arc::new(Mutex::new(Seen::default()));
        let into = Arc::clone(&seen);
        let reader = std::thread::spawn(move || {
            for event in
                serde_json::Deserializer::from_reader(std::io::BufReader::new(out)).into_iter::<Value>()
            {
                let Ok(event) = event else { return };
                into.lock().unwrap().note(&event);
            }
        });
        Self {
            watch,
            reader: Some(reader),
            seen,
        }
    }

    /// Ends the watch; what was broken. Fails itself when the watch has ended before.
    pub(super) fn end(&mut self) -> Vec<String> {
        // The last changes are still under way.
        std::thread::sleep(Duration::from_secs(1));
        let early = self.watch.try_wait().ok().flatten().is_some();
        let _ = self.watch.kill();
        let _ = self.watch.wait();
        if let Some(reader) = self.reader.take() {
            let _ = reader.join();
        }
        let mut broken = std::mem::take(&mut self.seen.lock().unwrap().broken);
        if early {
            broken.push("the watch on the pods ended before the churn".to_owned());
        }
        broken
    }

    /// How many changes were looked at.
    pub(super) fn changes(&self) -> usize {
        self.seen.lock().unwrap().changes
    }
}

impl Drop for History {
    fn drop(&mut self) {
        let _ = self.watch.kill();
        let _ = self.watch.wait();
    }
}

fn text(value: &Value) -> String {
    value.as_str().unwrap_or_default().to_owned()
}

fn is_terminal(phase: &str) -> bool {
    matches!(phase, "Succeeded" | "Failed")
}

impl Seen {
    fn note(&mut self, event: &Value) {
        self.changes += 1;
        let object = &event["object"];
        let name = text(&object["metadata"]["name"]);
        let pod = self.pods.entry(text(&object["metadata"]["uid"])).or_default();
        let mut broken = Vec::new();
        if pod.deleted {
            broken.push("it changed after it was gone".to_owned());
        }
        pod.deleted = event["type"] == "DELETED";
        pod.take(object, &mut broken);
        self.broken
            .extend(broken.into_iter().map(|what| format!("pod {name}: {what}")));
    }
}

impl Pod {
    fn take(&mut self, object: &Value, broken: &mut Vec<String>) {
        let status = &object["status"];
        let phase = text(&status["phase"]);
        let order = |phase: &str| match phase {
            "" => 0,
            "Pending" => 1,
            "Running" => 2,
            _ => 3,
        };
        if order(&phase) < order(&self.phase) || (is_terminal(&self.phase) && phase != self.phase) {
            broken.push(format!("its phase went from {} to {phase}", self.phase));
        }
        let start = text(&status["startTime"]);
        if !self.start_time.is_empty() && start != self.start_time {
            broken.push(format!(
                "its startTime went from {} to {start:?}",
                self.start_time
            ));
        }
        let observed = status["observedGeneration"].as_i64().unwrap_or(0);
        if observed < self.observed_generation {
            broken.push(format!(
                "its observedGeneration went from {} to {observed}",
                self.observed_generation
            ));
        }
        self.phase = phase;
        self.start_time = start;
        self.observed_generation = observed;
        for condition in status["conditions"].as_array().into_iter().flatten() {
            let kind = text(&condition["type"]);
            let now = (text(&condition["status"]), text(&condition["lastTransitionTime"]));
            let before = self.conditions.insert(kind.clone(), now.clone());
            // The same status with a later time is honest: it changed twice between two reports.
            if let Some(before) = before
                && now.1 < before.1
            {
                broken.push(format!("its condition {kind} went from {before:?} to {now:?}"));
            }
        }
        let never = object["spec"]["restartPolicy"] == "Never";
        for list in ["initContainerStatuses", "containerStatuses"] {
            for status in status[list].as_array().into_iter().flatten() {
                let name = text(&status["name"]);
                let container = self.containers.entry(name.clone()).or_default();
                let mut said = Vec::new();
                container.take(status, never, &mut said);
                broken.extend(said.into_iter().map(|what| format!("container {name}: {what}")));
            }
        }
    }
}

impl Container {
    fn take(&mut self, status: &Value, never: bool, broken: &mut Vec<String>) {
        let restarts = status["restartCount"].as_i64().unwrap_or(0);
        if restarts < self.restarts {
            broken.push(format!(
                "its restartCount went from {} to {restarts}",
                self.restarts
            ));
        }
        let id = text(&status["containerID"]);
        if id != self.id && !id.is_empty() {
            if self.earlier.contains(&id) {
                broken.push(format!("the earlier container {id} is back"));
            }
            if !self.id.is_empty() {
                if restarts <= self.restarts {
                    broken.push(format!("another container at restartCount {restarts}"));
                }
                if never {
                    broken.push("it was started again although the pod never restarts".to_owned());
                }
                self.earlier.insert(std::mem::replace(&mut self.id, id));
            } else {
                self.id = id;
            }
        }
        self.restarts = restarts;
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn event(kind: &str, phase: &str, id: &str, restarts: i64) -> Value {
        json!({"type": kind, "object": {
            "metadata": {"name": "p", "uid": "u"},
            "spec": {"restartPolicy": "Always"},
            "status": {"phase": phase, "containerStatuses": [
                {"name": "c", "containerID": id, "restartCount": restarts}]},
        }})
    }

    fn broken(events: &[Value]) -> Vec<String> {
        let mut seen = Seen::default();
        for event in events {
            seen.note(event);
        }
        seen.broken
    }

    #[test]
    fn an_ordinary_life_breaks_nothing() {
        let life = [
            event("ADDED", "Pending", "", 0),
            event("MODIFIED", "Running", "x://1", 0),
            event("MODIFIED", "Running", "x://2", 1),
            event("MODIFIED", "Succeeded", "x://2", 1),
            event("DELETED", "Succeeded", "x://2", 1),
        ];
        assert_eq!(broken(&life), Vec::<String>::new());
    }

    #[test]
    fn each_step_backwards_is_seen() {
        let back = |from: Value, to: Value| broken(&[from, to]).len();
        let running = || event("MODIFIED", "Running", "x://2", 3);
        assert_eq!(back(running(), event("MODIFIED", "Pending", "x://2", 3)), 1);
        assert_eq!(back(running(), event("MODIFIED", "Running", "x://2", 2)), 1);
        assert_eq!(back(running(), event("MODIFIED", "Running", "x://3", 3)), 1);
        assert_eq!(back(event("MODIFIED", "Failed", "x://2", 3), running()), 1);
        assert_eq!(back(event("DELETED", "Running", "x://2", 3), running()), 1);
    }
}
