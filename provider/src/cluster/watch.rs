use std::collections::HashSet;
use std::sync::Arc;

use futures::TryStreamExt;
use kube::api::{Api, DynamicObject};
use kube::discovery::ApiResource;
use kube::runtime::WatchStreamExt;
use kube::runtime::watcher::{self, Event, watcher};
use kube::{Client, ResourceExt};
use skerry_proto::link::Kind;
use skerry_proto::object::Uid;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use super::Mirror;
use super::mirror::KINDS;

/// Feeds the mirror from the API server until `stop`. Watches are re-established for ever, with back-off.
pub async fn run(client: Client, mirror: Arc<Mirror>, stop: CancellationToken) {
    let mut informers = JoinSet::new();
    for kind in KINDS {
        informers.spawn(inform(client.clone(), Arc::clone(&mirror), kind));
    }
    stop.cancelled().await;
    informers.shutdown().await;
}

async fn inform(client: Client, mirror: Arc<Mirror>, kind: Kind) {
    let Some(resource) = resource(kind) else { return };
    let api: Api<DynamicObject> = Api::all_with(client, &resource);
    let events = watcher(api, config(kind)).default_backoff();
    futures::pin_mut!(events);
    let mut seen = HashSet::new();
    loop {
        match events.try_next().await {
            Ok(Some(event)) => handle(&mirror, kind, &resource, event, &mut seen),
            Ok(None) => return,
            // The watcher goes on by itself after its back-off.
            Err(error) => tracing::warn!(kind = %resource.plural, %error, "the watch was interrupted"),
        }
    }
}

fn handle(
    mirror: &Mirror,
    kind: Kind,
    resource: &ApiResource,
    event: Event<DynamicObject>,
    seen: &mut HashSet<Uid>,
) {
    match event {
        Event::Init => seen.clear(),
        Event::InitApply(object) => {
            seen.extend(object.uid().map(Uid::from));
            apply(mirror, kind, resource, object);
        }
        Event::InitDone => mirror.listed(kind, seen),
        Event::Apply(object) => apply(mirror, kind, resource, object),
        Event::Delete(object) => {
            if let Some(uid) = object.uid() {
                mirror.delete(kind, &Uid::from(uid));
            }
        }
    }
}

fn apply(mirror: &Mirror, kind: Kind, resource: &ApiResource, mut object: DynamicObject) {
    // Items of a list carry no type of their own.
    object.types = Some(kube::api::TypeMeta {
        api_version: resource.api_version.clone(),
        kind: resource.kind.clone(),
    });
    match serde_json::to_value(&object) {
        Ok(value) => mirror.apply(kind, value),
        Err(error) => {
            tracing::error!(kind = %resource.plural, name = %object.name_any(), %error, "an object is left out")
        }
    }
}

fn config(kind: Kind) -> watcher::Config {
    let config = watcher::Config::default();
    match kind {
        // Only pods that are bound concern a node.
        Kind::Pod => config.fields("spec.nodeName!="),
        // Helm keeps whole releases in Secrets; no pod mounts those.
        Kind::Secret => config.fields("type!=helm.sh/release.v1"),
        _ => config,
    }
}

fn resource(kind: Kind) -> Option<ApiResource> {
    let (group, version, kind, plural) = match kind {
        Kind::Pod => ("", "v1", "Pod", "pods"),
        Kind::ConfigMap => ("", "v1", "ConfigMap", "configmaps"),
        Kind::Secret => ("", "v1", "Secret", "secrets"),
        Kind::Service => ("", "v1", "Service", "services"),
        Kind::Node => ("", "v1", "Node", "nodes"),
        Kind::RuntimeClass => ("node.k8s.io", "v1", "RuntimeClass", "runtimeclasses"),
        Kind::PersistentVolumeClaim => ("", "v1", "PersistentVolumeClaim", "persistentvolumeclaims"),
        Kind::PersistentVolume => ("", "v1", "PersistentVolume", "persistentvolumes"),
        Kind::Site => return Some(crate::sites::resource()),
        Kind::Device => ("devices.kubeedge.io", "v1alpha1", "Device", "devices"),
        _ => return None,
    };
    let api_version = if group.is_empty() {
        version.to_owned()
    } else {
        format!("{group}/{version}")
    };
    Some(ApiResource {
        group: group.to_owned(),
        version: version.to_owned(),
        api_version,
        kind: kind.to_owned(),
        plural: plural.to_owned(),
    })
}
