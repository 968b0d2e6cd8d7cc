//! One run of a probe: ask, and judge the answer.

use std::collections::HashMap;
use std::time::Duration;

use k8s_openapi::api::core::v1::{Container, Probe};

use super::super::env;
use super::super::httpget::{Get, connect, join, port};
use super::grpc;
use crate::runtime::{ContainerId, Runtime, RuntimeError};

/// Most of a command's output that is passed on.
const MAX_OUTPUT: usize = 10 * 1024;
/// Tries in one run, when the question could not be put at all.
const TRIES: usize = 3;

/// How a run ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Outcome {
    /// Passed.
    Success,
    /// Passed, with a word to the user.
    Warning(String),
    /// Failed.
    Failure(String),
}

/// What is probed.
pub(super) struct Subject<'a> {
    pub(super) container: &'a Container,
    pub(super) id: &'a ContainerId,
    /// The pod's address.
    pub(super) host: &'a str,
    pub(super) timeout: Duration,
}

/// Runs a probe once; an error says why the question could not be put, and counts for nothing.
pub(super) async fn run(
    runtime: &dyn Runtime,
    probe: &Probe,
    subject: &Subject<'_>,
) -> Result<Outcome, String> {
    let mut result = Err(String::new());
    for _ in 0..TRIES {
        result = once(runtime, probe, subject).await;
        if result.is_ok() {
            break;
        }
    }
    result
}

async fn once(runtime: &dyn Runtime, probe: &Probe, subject: &Subject<'_>) -> Result<Outcome, String> {
    let (host, timeout) = (subject.host, subject.timeout);
    if let Some(exec) = &probe.exec {
        return command(runtime, exec.command.as_deref().unwrap_or_default(), subject).await;
    }
    if let Some(action) = &probe.http_get {
        let get = Get::new(action, subject.container, host, super::AGENT)?;
        return Ok(match get.fetch(timeout).await {
            Ok(answer) if (200..300).contains(&answer.code) => Outcome::Success,
            Ok(answer) if (300..400).contains(&answer.code) => Outcome::Warning(format!(
                "Probe terminated redirects, Response body: {}",
                String::from_utf8_lossy(&answer.body)
            )),
            Ok(answer) => Outcome::Failure(format!("HTTP probe failed with statuscode: {}", answer.code)),
            Err(error) => Outcome::Failure(error.to_string()),
        });
    }
    if let Some(action) = &probe.tcp_socket {
        let port = port(&action.port, subject.container)?;
        let host = action.host.as_deref().filter(|h| !h.is_empty()).unwrap_or(host);
        return Ok(match tokio::time::timeout(timeout, connect(host, port)).await {
            Ok(Ok(_)) => Outcome::Success,
            Ok(Err(error)) => Outcome::Failure(error),
            Err(_) => Outcome::Failure(format!("dial tcp {}: i/o timeout", join(host, port))),
        });
    }
    if let Some(action) = &probe.grpc {
        let port = u16::try_from(action.port).map_err(|_| format!("invalid port number: {}", action.port))?;
        let service = action.service.as_deref().unwrap_or_default();
        return Ok(grpc::check(host, port, service, timeout).await);
    }
    Err(format!(
        "missing probe handler for container {}",
        subject.container.name
    ))
}

async fn command(
    runtime: &dyn Runtime,
    command: &[String],
    subject: &Subject<'_>,
) -> Result<Outcome, String> {
    // Only what stands in the spec: a probe has no access to what the environment refers to.
    let known: HashMap<String, String> = subject
        .container
        .env
        .iter()
        .flatten()
        .map(|v| (v.name.clone(), v.value.clone().unwrap_or_default()))
        .collect();
    let command: Vec<String> = command.iter().map(|part| env::expand(part, &known)).collect();
    match runtime.exec_sync(subject.id, &command, subject.timeout).await {
        Ok(output) if output.code == 0 => Ok(Outcome::Success),
        Ok(output) => {
            let mut text = output.stdout;
            text.extend(output.stderr);
            text.truncate(MAX_OUTPUT);
            Ok(Outcome::Failure(String::from_utf8_lossy(&text).into_owned()))
        }
        Err(RuntimeError::Timeout(_)) => Ok(Outcome::Failure(format!(
            "command timed out: \"{}\" timed out after {}",
            command.join(" "),
            seconds(subject.timeout)
        ))),
        Err(error) => Err(error.to_string()),
    }
}

/// A duration of whole seconds as Go prints it: `1s`, `2m0s`.
pub(super) fn seconds(duration: Duration) -> String {
    if duration.subsec_nanos() > 0 && duration.as_secs() == 0 {
        return format!("{}ms", duration.as_millis());
    }
    match (duration.as_secs() / 60, duration.as_secs() % 60) {
        (0, seconds) => format!("{seconds}s"),
        (minutes, seconds) => format!("{minutes}m{seconds}s"),
    }
}
