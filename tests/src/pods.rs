//! Looking at pods.

use std::time::Duration;

use serde_json::Value;

use crate::kubectl::{Kubectl, condition};
use crate::wait::{SOON, eventually, same};

/// Waits until the pod is Ready; the pod.
pub fn ready(kubectl: &Kubectl, pod: &str) -> Value {
    eventually(SOON, &format!("pod {pod} is ready"), || {
        let pod = kubectl.get("pod", pod)?;
        same(condition(&pod, "Ready")["status"].as_str(), Some("True"))
            .map_err(|e| format!("{e}: {}", pod["status"]))?;
        Ok(pod)
    })
}

/// Waits until the pod is in that phase; the pod.
pub fn phase(kubectl: &Kubectl, pod: &str, phase: &str) -> Value {
    eventually(SOON, &format!("pod {pod} is {phase}"), || {
        let pod = kubectl.get("pod", pod)?;
        same(pod["status"]["phase"].as_str(), Some(phase)).map_err(|e| format!("{e}: {}", pod["status"]))?;
        Ok(pod)
    })
}

/// Waits until the pod does not exist any more.
pub fn gone(kubectl: &Kubectl, pod: &str) {
    eventually(SOON, &format!("pod {pod} is gone"), || {
        match kubectl.attempt(&["get", "pod", pod, "-o", "name"]) {
            Err(message) if message.contains("NotFound") => Ok(()),
            other => Err(format!("{other:?}")),
        }
    });
}

/// Waits until the first container waits for that reason; its status.
pub fn waiting(kubectl: &Kubectl, pod: &str, reasons: &[&str]) -> Value {
    eventually(SOON, &format!("pod {pod} waits: {reasons:?}"), || {
        let pod = kubectl.get("pod", pod)?;
        let status = &pod["status"]["containerStatuses"][0];
        let reason = status["state"]["waiting"]["reason"].as_str().unwrap_or_default();
        if reasons.contains(&reason) {
            Ok(status.clone())
        } else {
            Err(pod["status"].to_string())
        }
    })
}

/// Waits until an event with that reason about the object is there; its message.
pub fn event(kubectl: &Kubectl, object: &str, reason: &str) -> String {
    eventually(SOON, &format!("an event {reason} about {object}"), || {
        let events = kubectl.list(
            "events",
            &[
                "--field-selector",
                &format!("involvedObject.name={object},reason={reason}"),
            ],
        )?;
        let event = events.first().ok_or("there is none")?;
        Ok(event["message"].as_str().unwrap_or_default().to_owned())
    })
}

/// Standard output of a pod that has run to its end, or fails to within the deadline.
pub fn output(kubectl: &Kubectl, pod: &str) -> String {
    phase(kubectl, pod, "Succeeded");
    kubectl.run(&["logs", pod])
}

/// UID, container id and restart count of the first container: what tells one life of a pod from another.
pub fn identity(pod: &Value) -> (String, String, u64) {
    let status = &pod["status"]["containerStatuses"][0];
    let text = |v: &Value| v.as_str().unwrap_or_default().to_owned();
    (
        text(&pod["metadata"]["uid"]),
        text(&status["containerID"]),
        status["restartCount"].as_u64().unwrap_or(u64::MAX),
    )
}

/// Waits until a file has that many lines at least; its lines.
pub fn lines(file: &std::path::Path, wanted: usize, deadline: Duration) -> Vec<String> {
    eventually(deadline, &format!("{wanted} lines in {}", file.display()), || {
        let text = std::fs::read_to_string(file).map_err(|e| e.to_string())?;
        let lines: Vec<String> = text.lines().map(str::to_owned).collect();
        if lines.len() >= wanted {
            Ok(lines)
        } else {
            Err(format!("{lines:?}"))
        }
    })
}
