//! One task per Site: keeps its Node, Lease and status true to its link.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use jiff::Timestamp;
use k8s_openapi::api::coordination::v1::Lease;
use kube::Client;
use kube::api::{Api, Patch, PatchParams, PostParams};
use serde_json::json;
use skerry_proto::autonomy::{Autonomy, AwayNode, AwayTaint};
use skerry_proto::link::Kind;
use skerry_proto::{Class, SiteName};
use tokio::task::JoinHandle;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::schedule::{jittered, last_seen_period, lease_period};
use super::site_status::{Facts, SiteStatus};
use super::status::{mark_away, refresh_heard};
use super::taint;
use super::writes::NodeWrites;
use crate::cluster::{Mirror, Object};
use crate::link::Timings;
use crate::link::sessions::{LinkState, Sessions};
use crate::metrics::Metrics;
use crate::pki::Revoked;
use crate::pods::tolerations;

/// How often a keeper looks whether something is left to do, for what has failed.
const LOOK_AGAIN: Duration = Duration::from_secs(10);
/// `leaseDurationSeconds`, as a kubelet writes it.
const LEASE_SECONDS: i32 = 40;
/// How often new Sites are looked for.
const LOOK: Duration = Duration::from_secs(1);

/// What the keepers work with.
pub struct NodeDeps {
    /// The Kubernetes API.
    pub client: Client,
    /// The cluster as watched.
    pub mirror: Arc<Mirror>,
    /// Who is connected.
    pub sessions: Sessions,
    /// Silence after which a site is said to be away, by its class.
    pub timings: Timings,
    /// Metrics to set.
    pub metrics: Arc<Metrics>,
    /// Tells the devices of a site that it came or went.
    pub reachability: tokio::sync::mpsc::UnboundedSender<(SiteName, bool)>,
    /// Whose turn it is to write a Node.
    pub writes: Arc<NodeWrites>,
}

/// Runs a keeper for every Site until `stop`.
pub async fn run(deps: Arc<NodeDeps>, stop: CancellationToken) {
    deps.mirror.synced().await;
    let mut keepers: HashMap<SiteName, JoinHandle<()>> = HashMap::new();
    let mut look = tokio::time::interval(LOOK);
    let count = Arc::new(AtomicUsize::new(0));
    loop {
        tokio::select! {
            () = stop.cancelled() => return,
            _ = look.tick() => {}
        }
        keepers.retain(|_, keeper| !keeper.is_finished());
        let sites = deps.mirror.all(Kind::Site);
        count.store(sites.len(), Ordering::Relaxed);
        for object in sites {
            let Ok(site) = object.name.parse::<SiteName>() else {
                continue;
            };
            keepers.entry(site.clone()).or_insert_with(|| {
                let keeper = Keeper {
                    deps: Arc::clone(&deps),
                    site,
                    sites: Arc::clone(&count),
                    class: Class::of_site(&object.value),
                    said_away: None,
                    status: SiteStatus::default(),
                    lease_due: None,
                };
                tokio::spawn(keeper.run(stop.clone()))
            });
        }
    }
}

struct Keeper {
    deps: Arc<NodeDeps>,
    site: SiteName,
    /// How many Sites there are.
    sites: Arc<AtomicUsize>,
    class: Class,
    /// What was last told to the devices room.
    said_away: Option<bool>,
    status: SiteStatus,
    /// When the lease is renewed next; `None` while the site is not heard.
    lease_due: Option<Instant>,
}

impl Keeper {
    async fn run(mut self, stop: CancellationToken) {
        let mut link = self.deps.sessions.watch(&self.site);
        let mut changes = self.deps.mirror.changes(&self.site);
        let mut again = Instant::now();
        loop {
            let state = link.borrow_and_update().clone();
            let patience = self.patience(&state, Timestamp::now());
            let next = again.min(self.lease_due.unwrap_or(again));
            let next = patience.map_or(next, |patience| next.min(Instant::now() + patience));
            tokio::select! {
                () = stop.cancelled() => return,
                _ = link.changed() => {}
                _ = changes.changed() => {}
                () = tokio::time::sleep_until(next) => {}
            }
            let Some(site) = self.deps.mirror.named(Kind::Site, "", self.site.as_str()) else {
                self.deps
                    .sessions
                    .dismiss(&self.site, "the Site was deleted", 60_000);
                self.deps.metrics.forget_site(&self.site);
                self.deps.metrics.forget_drops(&self.site, &link.borrow().drops);
                self.deps.writes.forget(&self.site);
                self.deps.sessions.forget(&self.site);
                return;
            };
            self.class = Class::of_site(&site.value);
            self.deps.metrics.set_class(&self.site, self.class);
            self.deps.sessions.dismiss_earlier(&self.site, &site.key.uid);
            let revoked = Revoked::of(&site.value["spec"]);
            self.deps.sessions.dismiss_revoked(&self.site, &revoked);
            let state = link.borrow().clone();
            let rest = Instant::now() + jittered(LOOK_AGAIN);
            match self.step(&site, &state).await {
                Ok(wanted) => again = wanted.unwrap_or(rest).min(rest),
                Err(error) => {
                    again = rest;
                    self.lease_due = self.lease_due.map(|due| due.max(rest));
                    tracing::warn!(site = %self.site, %error, "the site's Node could not be brought up to date; it is tried again");
                }
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
        Some(self.deps.timings.of(self.class).deadline.saturating_sub(silent))
    }

    /// Does what is to be done now; answers when to come again, if that is known.
    async fn step(&mut self, site: &Object, state: &LinkState) -> Result<Option<Instant>, kube::Error> {
        let now = Timestamp::now();
        let away = !state.online && self.patience(state, now).is_none_or(|left| left.is_zero());
        let enrolled = site.value["status"]["state"].is_string();
        self.deps.metrics.set_site(&self.site, state.online);
        self.deps.metrics.set_drops(&self.site, &state.drops);
        let pods = self.deps.mirror.pods_of(&self.site);
        let node = self.deps.mirror.named(Kind::Node, "", self.site.as_str());
        let mut told = Ok(None);
        if state.online || away {
            self.tell_devices(away);
            if enrolled || state.online {
                let facts = Facts {
                    link: state,
                    class: self.class,
                    pods: pods.len(),
                    away,
                    last_seen: last_seen_period(self.sites.load(Ordering::Relaxed)),
                };
                told = self
                    .status
                    .write(&self.deps.client, &self.site, site, &facts)
                    .await;
            }
        }
        let policy = Autonomy::of_site(&site.value);
        for pod in pods.iter().filter(|pod| tolerations::due(pod, state.online, now)) {
            // One pod that refuses must not leave the others unprotected.
            if let Err(error) = tolerations::protect(&self.deps.client, pod, &policy).await {
                tracing::warn!(site = %self.site, namespace = %pod.namespace, pod = %pod.name, %error,
                    "a pod could not be protected from eviction; it is tried again");
            }
        }
        let Some(node) = node else {
            self.lease_due = None;
            if state.online && enrolled {
                self.deps.sessions.ask_for_node(&self.site);
            }
            return told;
        };
        let deps = &self.deps;
        let shown_ready = policy.node == AwayNode::Ready;
        if state.online {
            refresh_heard(&deps.client, &deps.writes, &self.site, &node, now).await?;
            taint::keep(&deps.client, &node, AwayTaint::None).await?;
        }
        if away {
            taint::keep(&deps.client, &node, policy.taint).await?;
        }
        if away && !shown_ready {
            mark_away(&deps.client, &deps.writes, &deps.sessions, &self.site, &node, now).await?;
        }
        // Until the deadline of its class a site is not away, whatever became of its connections.
        let heard = state.online || (!away && state.last_heard.is_some());
        self.keep_lease(&node, heard || (away && shown_ready), now)
            .await?;
        told
    }

    /// Renews the lease of a site that is heard, or shown as if it were, when it is due.
    async fn keep_lease(&mut self, node: &Object, heard: bool, now: Timestamp) -> Result<(), kube::Error> {
        if !heard {
            self.lease_due = None;
            return Ok(());
        }
        let period = lease_period(self.sites.load(Ordering::Relaxed));
        match self.lease_due {
            // It has just come: its report renews the Node, and the leases of all who came together are spread.
            None => self.lease_due = Some(Instant::now() + period.mul_f64(rand::random_range(0.0..=0.5))),
            Some(due) if due <= Instant::now() => {
                // Also after a failure: the API server is asked for no more than that.
                self.lease_due = Some(Instant::now() + jittered(period));
                self.renew_lease(node, now).await?;
            }
            Some(_) => {}
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
}
