//! What is known of one device, and when that is worth a report.
//!
//! A report goes out at once when anything but a value changes (state, quality, a condition); when only values change,
//! after the device's `minInterval`; and at the latest after its `heartbeat`. A report holds everything, so a newer one
//! replaces an older one that was not yet sent.

use std::time::Duration;

use jiff::Timestamp;
use skerry_proto::device::{
    Condition, DeviceState, DeviceStatus, NormalisedDevice, Point, Problem, Quality, QualityReason,
    ReportPolicy, Reported, ReportedMetadata, Twin,
};
use tokio::time::Instant;

use super::Deps;
use super::drivers::{BusError, PointError};
use super::numeric::Decoded;
use super::ports::DeviceObject;

/// A quarter of an hour: reports of devices that are not read.
const IDLE_HEARTBEAT: Duration = Duration::from_secs(900);

/// A device's status in memory.
pub(crate) struct Shadow {
    object: DeviceObject,
    generation: i64,
    policy: ReportPolicy,
    status: DeviceStatus,
    reported: Option<(DeviceStatus, Instant)>,
}

impl Shadow {
    /// Starts from what was last reported; values of an earlier life are `Uncertain` until they are read again.
    pub(crate) async fn load(deps: &Deps, object: &DeviceObject) -> Self {
        let mut status = deps.store.last_status(&object.uid).await.unwrap_or_default();
        for reported in status.twins.iter_mut().filter_map(|twin| twin.reported.as_mut()) {
            reported.reason = Some(QualityReason::LastKnown);
            reported.message = None;
            reported.quality = match reported.value {
                Some(_) => Quality::Uncertain,
                None => Quality::Bad,
            };
        }
        Self {
            object: object.clone(),
            generation: 0,
            policy: ReportPolicy {
                min_interval: IDLE_HEARTBEAT,
                heartbeat: IDLE_HEARTBEAT,
            },
            status,
            reported: None,
        }
    }

    /// Takes over a new spec: twins of properties that are gone go, new ones come without a value.
    pub(crate) fn adopt(
        &mut self,
        object: &DeviceObject,
        generation: i64,
        plan: &NormalisedDevice,
        now: Timestamp,
    ) {
        self.object = object.clone();
        self.generation = generation;
        self.policy = plan.report;
        let old = std::mem::take(&mut self.status.twins);
        let twin = |point: &Point| {
            let known = old.iter().find(|twin| twin.property_name == point.name);
            let same_type = |twin: &&Twin| {
                twin.reported
                    .as_ref()
                    .is_some_and(|r| r.metadata.value_type == point.value_type.name())
            };
            known.filter(same_type).cloned().unwrap_or_else(|| Twin {
                property_name: point.name.clone(),
                reported: Some(Reported {
                    metadata: ReportedMetadata {
                        timestamp: None,
                        value_type: point.value_type.name().to_owned(),
                    },
                    quality: Quality::Bad,
                    reason: Some(QualityReason::NotConnected),
                    ..Reported::default()
                }),
            })
        };
        self.status.twins = plan.points.iter().map(twin).collect();
        self.status.observed_generation = (generation > 0).then_some(generation);
        self.status
            .conditions
            .retain(|c| matches!(c.kind.as_str(), "Connected" | "DataFresh"));
        if !plan.guesses.is_empty() {
            let guesses = plan.guesses.join("; ");
            self.set("ConfigDefaulted", Some(true), "Guessed", guesses, now);
        }
        if !plan.desired.is_empty() {
            let message = format!(
                "desired values are not written by this release ({}): remove them, or set the device by other means",
                plan.desired.join(", ")
            );
            self.set("DesiredApplied", Some(false), "NotSupported", message, now);
        }
    }

    /// A device that no bus reads: it has a mistake, no endpoint, or is suspended.
    pub(crate) fn idle(
        &mut self,
        generation: i64,
        plan: Result<&NormalisedDevice, &Vec<Problem>>,
        now: Timestamp,
    ) {
        let (reason, message) = match plan {
            Ok(plan) => {
                let object = self.object.clone();
                self.adopt(&object, generation, plan, now);
                if plan.suspend {
                    (
                        "Suspended",
                        "spec.suspend is true: the device is not read".to_owned(),
                    )
                } else {
                    let what = "no endpoint: set spec.connection.host in the Device, or a default endpoint for modbus \
                                (host:port) in the site's configuration";
                    ("NoEndpoint", what.to_owned())
                }
            }
            Err(problems) => {
                self.generation = generation;
                self.status.observed_generation = (generation > 0).then_some(generation);
                self.status.conditions.clear();
                let text: Vec<_> = problems.iter().map(Problem::to_string).collect();
                (
                    problems.first().map_or("InvalidSpec", |p| p.reason),
                    text.join("; "),
                )
            }
        };
        self.status.state = Some(DeviceState::Offline);
        self.mark_twins(QualityReason::NotConnected, None);
        self.set("Connected", Some(false), reason, message, now);
        self.set("DataFresh", Some(false), reason, "", now);
    }

    /// The bus, or this device on it, failed.
    pub(crate) fn failed(&mut self, error: &BusError, state: DeviceState, now: Timestamp) {
        self.status.state = Some(state);
        self.mark_twins(error.reason, Some(&error.message));
        let reason = match error.reason {
            QualityReason::Timeout => "Timeout",
            QualityReason::NotConnected => "NotConnected",
            _ => "CommFailure",
        };
        self.set("Connected", Some(false), reason, &error.message, now);
        self.set(
            "DataFresh",
            Some(false),
            reason,
            "no value is being read; the last known ones are shown",
            now,
        );
    }

    /// The device answered: one result for each point that was due.
    pub(crate) fn answered<'a>(
        &mut self,
        plan: &NormalisedDevice,
        results: impl Iterator<Item = (&'a Point, Result<Decoded, PointError>)>,
        now: Timestamp,
    ) {
        for (point, result) in results {
            self.record(point, result, now);
        }
        self.status.state = Some(DeviceState::Online);
        self.status.last_online_time = Timestamp::from_second(now.as_second()).ok();
        self.set("Connected", Some(true), "Polling", "", now);
        let bad: Vec<_> = self
            .status
            .twins
            .iter()
            .filter_map(|twin| Some((twin, twin.reported.as_ref()?)))
            .filter(|(_, reported)| reported.quality == Quality::Bad)
            .map(|(twin, reported)| match &reported.message {
                Some(message) => format!("{}: {message}", twin.property_name),
                None => format!("{}: not read yet", twin.property_name),
            })
            .collect();
        if bad.is_empty() {
            self.set("DataFresh", Some(true), "Polling", "", now);
        } else {
            self.set("DataFresh", Some(false), "ReadFailed", bad.join("; "), now);
        }
        self.status.summary = summary(plan, &self.status.twins);
    }

    fn record(&mut self, point: &Point, result: Result<Decoded, PointError>, now: Timestamp) {
        let twins = &mut self.status.twins;
        let Some(twin) = twins.iter_mut().find(|twin| twin.property_name == point.name) else {
            return;
        };
        let reported = twin.reported.get_or_insert_default();
        match result {
            Ok(decoded) => {
                *reported = Reported {
                    value: Some(decoded.value),
                    metadata: ReportedMetadata {
                        timestamp: Some(now.as_millisecond().to_string()),
                        value_type: point.value_type.name().to_owned(),
                    },
                    source_time: Timestamp::from_millisecond(now.as_millisecond()).ok(),
                    quality: match decoded.out_of_range {
                        None => Quality::Good,
                        Some(_) => Quality::Uncertain,
                    },
                    reason: decoded.out_of_range.as_ref().map(|_| QualityReason::OutOfRange),
                    message: decoded.out_of_range,
                };
            }
            Err(error) => {
                reported.quality = Quality::Bad;
                reported.reason = Some(error.reason);
                reported.message = Some(error.message);
            }
        }
    }

    fn mark_twins(&mut self, reason: QualityReason, message: Option<&str>) {
        for reported in self
            .status
            .twins
            .iter_mut()
            .filter_map(|twin| twin.reported.as_mut())
        {
            reported.quality = Quality::Bad;
            reported.reason = Some(reason);
            reported.message = message.map(str::to_owned);
        }
    }

    fn set(
        &mut self,
        kind: &str,
        holds: Option<bool>,
        reason: &str,
        message: impl Into<String>,
        now: Timestamp,
    ) {
        let condition = Condition::new(kind, holds, reason, message, now)
            .of_generation(self.generation)
            .since(&self.status);
        self.status.conditions.retain(|c| c.kind != kind);
        self.status.conditions.push(condition);
        self.status.conditions.sort_by(|a, b| a.kind.cmp(&b.kind));
    }

    /// Queues a report when one is due. One that cannot be stored stays due.
    pub(crate) async fn report_if_due(&mut self, deps: &Deps) {
        if !self.is_due(Instant::now()) {
            return;
        }
        if deps
            .store
            .report(&self.object, &self.status, deps.clock.now())
            .await
        {
            self.reported = Some((self.status.clone(), Instant::now()));
        }
    }

    fn is_due(&self, now: Instant) -> bool {
        let Some((last, at)) = &self.reported else {
            return true;
        };
        let since = now.duration_since(*at);
        if matters(last) != matters(&self.status) {
            return true;
        }
        since >= self.policy.heartbeat
            || (since >= self.policy.min_interval && values(last) != values(&self.status))
    }
}

/// All that is reported at once: the status without values, times and wording.
fn matters(status: &DeviceStatus) -> DeviceStatus {
    let mut status = status.clone();
    status.last_online_time = None;
    status.summary = None;
    for reported in status.twins.iter_mut().filter_map(|twin| twin.reported.as_mut()) {
        // The first value matters, later ones wait.
        reported.value = reported.value.take().map(|_| String::new());
        reported.metadata.timestamp = None;
        reported.source_time = None;
        reported.message = None;
    }
    for condition in &mut status.conditions {
        if condition.kind == "DataFresh" {
            condition.message.clear();
        }
    }
    status
}

fn values(status: &DeviceStatus) -> Vec<Option<&str>> {
    status
        .twins
        .iter()
        .map(|twin| twin.reported.as_ref().and_then(|r| r.value.as_deref()))
        .collect()
}

fn summary(plan: &NormalisedDevice, twins: &[Twin]) -> Option<String> {
    let parts: Vec<_> = plan
        .points
        .iter()
        .filter_map(|point| {
            let twin = twins.iter().find(|twin| twin.property_name == point.name)?;
            let value = twin.reported.as_ref()?.value.as_ref()?;
            Some(match &point.unit {
                Some(unit) => format!("{}={value} {unit}", point.name),
                None => format!("{}={value}", point.name),
            })
        })
        .collect();
    (!parts.is_empty()).then(|| parts.join(", "))
}
