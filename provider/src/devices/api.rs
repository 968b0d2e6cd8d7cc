//! Devices at the API server. They are read as untyped objects, so that one that cannot be read stops no list.

use kube::api::{Api, ApiResource, DynamicObject, Patch, PatchParams};
use kube::core::GroupVersionKind;
use kube::{Client, ResourceExt};
use serde_json::{Value, json};
use skerry_proto::device::{Condition, DeviceStatus, GROUP, VERSION};

/// The resource.
pub(super) fn resource() -> ApiResource {
    ApiResource::from_gvk_with_plural(&GroupVersionKind::gvk(GROUP, VERSION, "Device"), "devices")
}

/// All namespaces.
pub(super) fn all(client: Client) -> Api<DynamicObject> {
    Api::all_with(client, &resource())
}

/// One namespace.
pub(super) fn namespaced(client: Client, namespace: &str) -> Api<DynamicObject> {
    Api::namespaced_with(client, namespace, &resource())
}

/// The status; an unreadable one counts as empty and is written anew.
pub(super) fn status_of(device: &DynamicObject) -> DeviceStatus {
    let status = device.data.get("status").cloned().unwrap_or_default();
    serde_json::from_value(status).unwrap_or_default()
}

/// Applies one writer's part of the status to the very object that was read: anything newer is a conflict (409).
///
/// The resourceVersion goes along, not only the UID: the status subresource of a custom resource ignores a wrong UID.
pub(super) async fn apply_status(
    client: &Client,
    device: &DynamicObject,
    manager: &str,
    part: &Value,
) -> Result<DynamicObject, kube::Error> {
    let namespace = device.namespace().unwrap_or_default();
    let name = device.name_any();
    let patch = json!({
        "apiVersion": format!("{GROUP}/{VERSION}"),
        "kind": "Device",
        "metadata": {"name": name, "namespace": namespace, "uid": device.uid(),
            "resourceVersion": device.resource_version()},
        "status": part,
    });
    let params = PatchParams::apply(manager).force();
    namespaced(client.clone(), &namespace)
        .patch_status(&name, &params, &Patch::Apply(&patch))
        .await
}

/// Whether two conditions say the same, whenever they began.
pub(super) fn same(a: &Condition, b: &Condition) -> bool {
    a.status == b.status
        && a.reason == b.reason
        && a.message == b.message
        && a.observed_generation == b.observed_generation
}
