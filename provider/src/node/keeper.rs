//! One task per Site: keeps its Node, Lease and status true to its link.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::Duration;

use jiff::{SignedDuration, Timestamp};
use k8s_openapi::api::coordination::v1::Lease;
use kube::Client;
use kube::api::{Api, Patch, PatchParams, PostParams};
use serde_json::{Value, json};
use skerry_proto::SiteName;
use skerry_proto::link::Kind;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use super::status::mark_away;
use crate::cluster::{Mirror, Object};
use crate::link::sessions::{LinkState, Sessions};
use crate::metrics::Metrics;
use crate::pods::tolerations;
use crate::sites;

/// How often a lease is renewed, as a kubelet does.
const LEASE_RENEWAL: Duration = Duration::from_secs(10);
/// `leaseDurationSeconds`, as a kubelet writes it.
const LEASE_SECONDS: i32 = 40;
/// How often new Sites are looked for.
const LOOK: Duration = Duration::from_secs(1);
/// A Site's `lastSeen` is written at least this often while it is heard.
const LAST_SEEN_EVERY: SignedDuration = SignedDuration::from_secs(60);

/// What the keepers work with.
pub struct NodeDeps {
    /// The Kubernetes API.
    pub client: Client,
    /// The cluster as watched.
    pub mirror: Arc<Mirror>,
    /// Who is connected.
    pub sessions: Sessions,
    /// Silence after which a site is said to be away.
    pub deadline: Duration,
    /// Metrics to set.
    pub metrics: Arc<Metrics>,
    /// Tells the devices of a site that it came or went.
    pub reachability: tokio::sync::mpsc::UnboundedSender<(SiteName, bool)>,
}

/// Runs a keeper for every Site until `stop`.
pub async fn run(deps: Arc<NodeDeps>, stop: CancellationToken) {
    deps.mirror.synced().await;
    let mut keepers: HashMap<SiteName, JoinHandle<()>> = HashMap::new();
    let mut look = tokio::time::interval(LOOK);
    loop {
        tokio::select! {
            () = stop.cancelled() => return,
            _ = look.tick() => {}
        }
        keepers.retain(|_, keeper| !keeper.is_finished());
        for object in deps.mirror.all(Kind::Site) {
            let Ok(site) = object.name.parse::<SiteName>() else {
                continue;
            };
            keepers.entry(site.clone()).or_insert_with(|| {
                let keeper = Keeper {
                    deps: Arc::clone(&deps),
                    site,
                    said_away: None,
                };
                tokio::spawn(keeper.run(stop.clone()))
            });
        }
    }
}

struct Keeper {
    deps: Arc<NodeDeps>,
    site: SiteName,
    /// What was last told to the devices room.
    said_away: Option<bool>,
}

impl Keeper {
    async fn run(mut self, stop: CancellationToken) {
        let mut link = self.deps.sessions.watch(&self.site);
        let mut changes = self.deps.mirror.changes(&self.site);
        let mut renewal = tokio::time::interval(LEASE_RENEWAL);
        renewal.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            let state = link.borrow_and_update().clone();
            let patience = self.patience(&state, Timestamp::now());
            let renew = tokio::select! {
                () = stop.cancelled() => return,
                _ = link.changed() => true,
                _ = changes.changed() => false,
                _ = renewal.tick() => true,
                () = tokio::time::sleep(patience.unwrap_or(LEASE_RENEWAL)), if patience.is_some() => true,
            };
            let Some(site) = self.deps.mirror.named(Kind::Site, "", self.site.as_str()) else {
                self.deps
                    .sessions
                    .dismiss(&self.site, "the Site was deleted", 60_000);
                self.deps.metrics.forget_site(&self.site);
                self.deps.metrics.forget_drops(&self.site, &link.borrow().drops);
                return;
            };
            self.deps.sessions.dismiss_earlier(&self.site, &site.key.uid);
            let state = link.borrow().clone();
            if let Err(error) = self.step(&site, &state, renew).await {
                tracing::warn!(site = %self.site, %error, "the site's Node could not be brought up to date; it is tried again");
            }
        }
    }

    /// How long until a silent site must be called away; `None` when it is heard, or was called so.
    fn patience(&self, state: &LinkState, now: Timestamp) -> Option<Duration> {
        if state.online || self.said_away == Some(true) {
            return None;
        }
        let silent = Duration::try_from(now.duration_since(state.last_heard.unwrap_or(state.since)))
            .unwrap_or_default();
        Some(self.deps.deadline.saturating_sub(silent))
    }

    async fn step(&mut self, site: &Object, state: &LinkState, renew: bool) -> Result<(), kube::Error> {
        let now = Timestamp::now();
        let away = !state.online && self.patience(state, now).is_none_or(|left| left.is_zero());
        let enrolled = site.value["status"]["state"].is_string();
        self.deps.metrics.set_site(&self.site, state.online);
        self.deps.metrics.set_drops(&self.site, &state.drops);
        let pods = self.deps.mirror.pods_of(&self.site);
        let node = self.deps.mirror.named(Kind::Node, "", self.site.as_str());
        if state.online || away {
            self.tell_devices(away);
            if enrolled || state.online {
                self.write_site(site, state, pods.len(), now).await?;
            }
        }
        for pod in pods.iter().filter(|pod| tolerations::due(pod, state.online, now)) {
            // One pod that refuses must not leave the others unprotected.
            if let Err(error) = tolerations::protect(&self.deps.client, pod).await {
                tracing::warn!(site = %self.site, namespace = %pod.namespace, pod = %pod.name, %error,
                    "a pod could not be protected from eviction; it is tried again");
            }
        }
        let Some(node) = node else { return Ok(()) };
        if state.online && renew {
            self.renew_lease(&node, now).await?;
        }
        if away {
            mark_away(&self.deps.client, &node, state.last_heard, now).await?;
        }
        Ok(())
    }

    fn tell_devices(&mut self, away: bool) {
        if self.said_away != Some(away) {
            self.said_away = Some(away);
            // The devices room ends only with the provider.
            let _ = self.deps.reachability.send((self.site.clone(), !away));
        }
    }

    async fn renew_lease(&self, node: &Object, now: Timestamp) -> Result<(), kube::Error> {
        let leases: Api<Lease> = Api::namespaced(self.deps.client.clone(), "kube-node-lease");
        let time = now.strftime("%Y-%m-%dT%H:%M:%S%.6fZ").to_string();
        let patch = json!({"spec": {"holderIdentity": self.site.as_str(), "renewTime": time}});
        match leases
            .patch(self.site.as_str(), &PatchParams::default(), &Patch::Merge(&patch))
            .await
        {
            Err(kube::Error::Api(status)) if status.code == 404 => {}
            other => return other.map(|_| ()),
        }
        let lease: Lease = serde_json::from_value(json!({
            "metadata": {
                "name": self.site.as_str(),
                "ownerReferences": [{
                    "apiVersion": "v1", "kind": "Node", "name": self.site.as_str(), "uid": node.key.uid.as_str(),
                }],
            },
            "spec": {
                "holderIdentity": self.site.as_str(), "leaseDurationSeconds": LEASE_SECONDS, "renewTime": time,
            },
        }))
        .map_err(kube::Error::SerdeError)?;
        leases.create(&PostParams::default(), &lease).await.map(|_| ())
    }

    /// Writes the Site's status when it says something new, or its `lastSeen` is old.
    async fn write_site(
        &self,
        site: &Object,
        state: &LinkState,
        pods: usize,
        now: Timestamp,
    ) -> Result<(), kube::Error> {
        let current = &site.value["status"];
        let word = if state.online { "Online" } else { "Offline" };
        let mut status = serde_json::Map::new();
        let mut set = |field: &str, value: Value| {
            if current.get(field) != Some(&value) {
                status.insert(field.to_owned(), value);
            }
        };
        set("state", Value::from(word));
        set("pods", Value::from(pods));
        if !state.version.is_empty() {
            set("version", Value::from(state.version.clone()));
            set("bootID", Value::from(state.boot_id.clone()));
        }
        if !state.drops.is_empty() {
            set("drops", drops(&state.drops));
        }
        let written = current["lastSeen"]
            .as_str()
            .and_then(|t| t.parse::<Timestamp>().ok());
        let stale = written.is_none_or(|time| now.duration_since(time) >= LAST_SEEN_EVERY);
        if let Some(heard) = state.last_heard
            && (!status.is_empty() || (state.online && stale))
        {
            status.insert(
                "lastSeen".to_owned(),
                Value::from(heard.strftime("%Y-%m-%dT%H:%M:%SZ").to_string()),
            );
        }
        if status.is_empty() {
            return Ok(());
        }
        sites::patch_status(&self.deps.client, &self.site, Value::Object(status)).await
    }
}

/// Dropped reports for the Site's status, by lane.
fn drops(drops: &BTreeMap<(String, String), u64>) -> Value {
    let line = |((lane, reason), count): (&(String, String), &u64)| json!({"lane": lane, "reason": reason, "count": count});
    Value::from(drops.iter().map(line).collect::<Vec<_>>())
}
