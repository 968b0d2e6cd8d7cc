//! What the room asks of the rest of the daemon: a store and a clock.

use async_trait::async_trait;
use jiff::Timestamp;
use skerry_proto::device::DeviceStatus;
use skerry_proto::link::{DeviceStatusReport, Kind, report};
use skerry_proto::object::Uid;
use tokio::sync::broadcast;

use super::{Decoded, unreadable};
use crate::store::{NewReport, ObjectChanged, Store, StoreError};

/// The room's name in the store's `state` table; its records are [`DeviceStatus`]es by UID.
const ROOM: &str = "devices";

/// A Device of this site.
#[derive(Clone, Debug)]
pub struct DeviceObject {
    /// Identity.
    pub uid: Uid,
    /// Its namespace.
    pub namespace: String,
    /// Its name.
    pub name: String,
    /// Metadata and spec, or why they cannot be read.
    pub device: Decoded,
}

/// The store as this room sees it. Failures are logged by the implementation: the room goes on with what it knows.
#[async_trait]
pub trait DeviceStore: Send + Sync {
    /// All Devices of the site.
    async fn devices(&self) -> Vec<DeviceObject>;
    /// Notices of changed objects.
    fn changes(&self) -> broadcast::Receiver<ObjectChanged>;
    /// What was last reported of a device.
    async fn last_status(&self, uid: &Uid) -> Option<DeviceStatus>;
    /// Keeps what is reported of a device, and queues it for the provider. `false`: not stored, try again later.
    async fn report(&self, device: &DeviceObject, status: &DeviceStatus, observed: Timestamp) -> bool;
    /// Forgets a device that was deleted.
    async fn forget(&self, uid: &Uid);
}

#[async_trait]
impl DeviceStore for Store {
    async fn devices(&self) -> Vec<DeviceObject> {
        let objects = match self.list(Kind::Device) {
            Ok(objects) => objects,
            Err(error) => {
                tracing::error!(%error, "the store cannot list devices");
                Vec::new()
            }
        };
        objects
            .into_iter()
            .map(|object| DeviceObject {
                device: object.decode().map_err(|error| unreadable(&error)),
                uid: object.key.uid,
                namespace: object.namespace,
                name: object.name,
            })
            .collect()
    }

    fn changes(&self) -> broadcast::Receiver<ObjectChanged> {
        self.changes()
    }

    async fn last_status(&self, uid: &Uid) -> Option<DeviceStatus> {
        self.state_get(ROOM, uid.as_str()).unwrap_or_else(|error| {
            tracing::warn!(%uid, %error, "the last values of a device are lost");
            None
        })
    }

    async fn report(&self, device: &DeviceObject, status: &DeviceStatus, observed: Timestamp) -> bool {
        match queue(self, device, status, observed).await {
            Ok(()) => true,
            Err(error) => {
                tracing::error!(device = %device.name, namespace = %device.namespace, %error,
                    "a device's status cannot be stored, trying again");
                false
            }
        }
    }

    async fn forget(&self, uid: &Uid) {
        let store = self.clone();
        let key = uid.clone();
        let done = tokio::task::spawn_blocking(move || store.state_delete(ROOM, key.as_str())).await;
        if let Ok(Err(error)) = done {
            tracing::warn!(%uid, %error, "a deleted device's record stays in the store");
        }
    }
}

async fn queue(
    store: &Store,
    device: &DeviceObject,
    status: &DeviceStatus,
    observed: Timestamp,
) -> Result<(), StoreError> {
    let status_json = serde_json::to_vec(status).map_err(|error| StoreError::Value {
        what: format!("status of device {}/{}", device.namespace, device.name),
        reason: error.to_string(),
    })?;
    let records = store.clone();
    let (uid, record) = (device.uid.clone(), status.clone());
    let put = tokio::task::spawn_blocking(move || records.state_put(ROOM, uid.as_str(), &record)).await;
    if let Ok(result) = put {
        result?;
    }
    store
        .report(NewReport {
            coalesce: Some(format!("device/{}", device.uid)),
            observed,
            body: report::Report::DeviceStatus(DeviceStatusReport {
                uid: device.uid.to_string(),
                namespace: device.namespace.clone(),
                name: device.name.clone(),
                status_json: status_json.into(),
            }),
        })
        .await?;
    Ok(())
}
