//! Tells the Devices of a site that it came or went.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use kube::Client;
use skerry_proto::SiteName;
use tokio::sync::mpsc;
use tokio::task::AbortHandle;
use tokio_util::sync::CancellationToken;

use super::report::site_reachable;
use crate::cluster::Mirror;

/// How often, and after which pause, a site's devices are told.
const TRIES: usize = 30;
const AGAIN: Duration = Duration::from_secs(2);
/// With more tasks than this, those that have ended are dropped.
const MANY: usize = 256;

/// Passes on which sites came or went, each site for itself; a failure is tried again with the next change, at the latest.
pub async fn tell(
    client: Client,
    mirror: Arc<Mirror>,
    mut reachable: mpsc::UnboundedReceiver<(SiteName, bool)>,
    stop: CancellationToken,
) {
    let mut telling: HashMap<SiteName, AbortHandle> = HashMap::new();
    loop {
        let told = tokio::select! {
            () = stop.cancelled() => None,
            told = reachable.recv() => told,
        };
        let Some((site, online)) = told else { break };
        // Whatever is still being told is not true any more.
        if let Some(older) = telling.remove(&site) {
            older.abort();
        }
        if mirror.devices_of(&site).is_empty() {
            continue;
        }
        if telling.len() >= MANY {
            telling.retain(|_, task| !task.is_finished());
        }
        let task = tell_one(client.clone(), Arc::clone(&mirror), site.clone(), online);
        telling.insert(site, tokio::spawn(task).abort_handle());
    }
    telling.into_values().for_each(|task| task.abort());
}

async fn tell_one(client: Client, mirror: Arc<Mirror>, site: SiteName, online: bool) {
    for _ in 0..TRIES {
        match site_reachable(&client, &mirror, &site, online).await {
            Ok(()) => return,
            // The mirror may be behind: the next try sees what it has learnt by then.
            Err(error) => {
                tracing::warn!(%site, online, %error, "the site's devices do not show yet whether it is reachable");
                tokio::time::sleep(AGAIN).await;
            }
        }
    }
}
