//! What sites report of their Devices, on its way to the API server.

use jiff::Timestamp;
use kube::api::DynamicObject;
use kube::{Client, ResourceExt};
use serde_json::{Value, json};
use skerry_proto::SiteName;
use skerry_proto::device::{Condition, DeviceStatus};
use skerry_proto::link::DeviceStatusReport;

use crate::cluster::Mirror;
use crate::link::reports::Outcome;

use super::api::{apply_status, namespaced, status_of};

/// Field manager of what sites report.
const REPORT_MANAGER: &str = "skerry-site";
/// Field manager of `EdgeReachable`.
const LINK_MANAGER: &str = "skerry-link";
/// Conditions that a site may report; all others are the provider's.
const SITE_CONDITIONS: [&str; 4] = ["Connected", "DataFresh", "DesiredApplied", "ConfigDefaulted"];

/// Writes a site's report to the Device's status.
///
/// Dropped when the Device is gone or another one has its name, when it is not bound to this site, or when the report
/// cannot be read. Idempotent.
pub async fn apply_report(client: Client, site: &SiteName, report: &DeviceStatusReport) -> Outcome {
    let (namespace, name) = (&report.namespace, &report.name);
    let part = match site_part(&report.status_json) {
        Ok(part) => part,
        Err(error) => {
            return Outcome::Dropped(format!(
                "status of device {namespace}/{name} cannot be read: {error}"
            ));
        }
    };
    let device = match namespaced(client.clone(), namespace).get_opt(name).await {
        Ok(Some(device)) => device,
        Ok(None) => return Outcome::Dropped(format!("device {namespace}/{name} is gone")),
        Err(error) => return failed(namespace, name, error),
    };
    if let Some(refusal) = refusal(&device, site, report) {
        return Outcome::Dropped(refusal);
    }
    let device = match apply_status(&client, &device, REPORT_MANAGER, &part).await {
        Ok(device) => device,
        Err(error) => return failed(namespace, name, error),
    };
    // A report has just come through, so the site can be reached.
    match set_reachable(&client, &device, true).await {
        Ok(()) => Outcome::Accepted,
        Err(error) => failed(namespace, name, error),
    }
}

/// Sets `EdgeReachable` of all Devices bound to a site: `True` with a link, `Unknown` without. Values stay as they are.
///
/// Fails on the first Device whose status cannot be written, which may be because the mirror is behind; call it again.
pub(super) async fn site_reachable(
    client: &Client,
    mirror: &Mirror,
    site: &SiteName,
    reachable: bool,
) -> Result<(), kube::Error> {
    for object in mirror.devices_of(site) {
        // One that cannot be read stops no other.
        let Ok(device) = serde_json::from_value::<DynamicObject>(object.value.clone()) else {
            tracing::error!(device = %object.name, namespace = %object.namespace, "a device cannot be read");
            continue;
        };
        match set_reachable(client, &device, reachable).await {
            Err(kube::Error::Api(status)) if status.code == 404 => {}
            result => result?,
        }
    }
    Ok(())
}

async fn set_reachable(client: &Client, device: &DynamicObject, reachable: bool) -> Result<(), kube::Error> {
    let before = status_of(device);
    let (holds, reason, message) = if reachable {
        (Some(true), "LinkUp", "")
    } else {
        let message = "the site's link is down: what is shown is the last report; the site goes on reading";
        (None, "LinkDown", message)
    };
    let condition = Condition::new("EdgeReachable", holds, reason, message, Timestamp::now());
    let found = before.condition("EdgeReachable");
    if found.is_some_and(|found| found.status == condition.status && found.reason == condition.reason) {
        return Ok(());
    }
    let part = json!({"conditions": [condition]});
    apply_status(client, device, LINK_MANAGER, &part)
        .await
        .map(|_| ())
}

/// The site's part of a reported status: what belongs to the provider is left out, whatever the site says.
fn site_part(status_json: &[u8]) -> Result<Value, serde_json::Error> {
    let mut status: DeviceStatus = serde_json::from_slice(status_json)?;
    status.controller_observed_generation = None;
    status.node_name = None;
    status.protocol = None;
    status
        .conditions
        .retain(|c| SITE_CONDITIONS.contains(&c.kind.as_str()));
    serde_json::to_value(status)
}

/// Hostile bytes as the status that a site reports for a device.
pub(crate) fn any_reported(bytes: &[u8]) {
    let _ = site_part(bytes);
}

fn is_bound_to(device: &DynamicObject, site: &SiteName) -> bool {
    // A site's Node carries the site's name.
    status_of(device).node_name.as_deref() == Some(site.as_str())
}

fn refusal(device: &DynamicObject, site: &SiteName, report: &DeviceStatusReport) -> Option<String> {
    let place = format!("device {}/{}", report.namespace, report.name);
    if device.uid().as_deref() != Some(report.uid.as_str()) {
        return Some(format!(
            "{place} with UID {} is gone: another one has its name",
            report.uid
        ));
    }
    (!is_bound_to(device, site)).then(|| format!("{place} is not bound to site {site}"))
}

fn failed(namespace: &str, name: &str, error: kube::Error) -> Outcome {
    match &error {
        kube::Error::Api(status) if status.code == 404 => {
            Outcome::Dropped(format!("device {namespace}/{name} is gone"))
        }
        kube::Error::Api(status) if matches!(status.code, 400 | 413 | 422) => Outcome::Dropped(format!(
            "device {namespace}/{name}: the API server refuses the status: {}",
            status.message
        )),
        _ => Outcome::Retry(error.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn device(uid: &str, node: &str) -> DynamicObject {
        serde_json::from_value(json!({"apiVersion": "devices.kubeedge.io/v1alpha1", "kind": "Device",
            "metadata": {"name": "d", "namespace": "default", "uid": uid}, "spec": {}, "status": {"nodeName": node}}))
        .unwrap()
    }

    #[test]
    fn a_site_reports_only_its_own_devices_matched_by_uid() {
        let site: SiteName = "harbour".parse().unwrap();
        let report = DeviceStatusReport {
            uid: "u1".into(),
            namespace: "default".into(),
            name: "d".into(),
            ..DeviceStatusReport::default()
        };
        assert_eq!(refusal(&device("u1", "harbour"), &site, &report), None);
        assert!(
            refusal(&device("u1", "quay"), &site, &report)
                .unwrap()
                .contains("not bound")
        );
        assert!(
            refusal(&device("u2", "harbour"), &site, &report)
                .unwrap()
                .contains("is gone")
        );
    }

    #[test]
    fn a_report_cannot_touch_what_the_provider_owns() {
        let condition = |kind: &str| json!({"type": kind, "status": "True", "reason": "R", "lastTransitionTime": "2026-01-01T00:00:00Z"});
        let status = json!({"nodeName": "quay", "protocol": "x", "state": "online", "controllerObservedGeneration": 9,
            "conditions": [condition("Accepted"), condition("Connected"), condition("Ready")]});
        let part = site_part(status.to_string().as_bytes()).unwrap();
        assert_eq!(part["state"], "online");
        assert_eq!(part["conditions"].as_array().unwrap().len(), 1);
        assert!(part.get("nodeName").is_none() && part.get("protocol").is_none());
        assert!(part.get("controllerObservedGeneration").is_none());
    }
}
