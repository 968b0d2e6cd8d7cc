//! One site's bulk stream: objects down, reports up.
//!
//! Level-based. What the edge holds (its inventory, then what was sent) is compared with what it should hold; the
//! difference goes out, numbered, at most [`CHANGE_WINDOW`] ahead of the edge's acknowledgement. A change of the
//! cluster only says "compare again", so a burst of changes to one object costs one message.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use skerry_proto::limits::CHANGE_WINDOW;
use skerry_proto::link::{
    Change, CloudBulk, EdgeBulk, Inventory, Kind, Remove, Synced, Upsert, change, cloud_bulk, edge_bulk,
};
use skerry_proto::object::{ContentHash, ObjectKey, Uid, pack};
use tokio::sync::{mpsc, watch};
use tonic::{Status, Streaming};

use super::reports::{Lanes, Reply};
use super::service::LinkDeps;
use super::sessions::Session;
use crate::cluster::{Desired, DesiredToken};
use crate::refs::tokens::{Minted, due, mint};

/// Most objects that a site may say it holds: far above the 10,000 pods that one is built for.
const INVENTORY_LIMIT: usize = 200_000;
/// How often tokens are checked for renewal and failed ones are asked for again.
const TOKEN_CHECK: Duration = Duration::from_secs(10);
/// Changes of the cluster that follow each other this closely are taken together.
const SETTLE: Duration = Duration::from_millis(1);
/// Token requests under way for one site.
const MINTS: usize = 16;

pub(super) struct Bulk {
    deps: Arc<LinkDeps>,
    session: Session,
    outbound: mpsc::Sender<Result<CloudBulk, Status>>,
    /// What the edge holds or is about to hold.
    held: BTreeMap<ObjectKey, ContentHash>,
    /// Expiry of the tokens in `held`.
    expiry: BTreeMap<ObjectKey, i64>,
    /// Tokens that came from the API server and were not sent yet.
    minted: BTreeMap<ObjectKey, Minted>,
    minting: BTreeSet<ObjectKey>,
    /// Tokens that could not be had; asked for again at the next check.
    failed: BTreeSet<ObjectKey>,
    mints: mpsc::Receiver<(ObjectKey, Result<Minted, kube::Error>)>,
    mint_results: mpsc::Sender<(ObjectKey, Result<Minted, kube::Error>)>,
    /// Number of the last change sent, and of the last one acknowledged.
    sent: u64,
    applied: u64,
    synced: bool,
}

/// What a comparison found, in the order in which it must travel.
struct Difference {
    changes: Vec<(ObjectKey, Step)>,
    /// Nothing is left out that a later comparison would add by itself.
    complete: bool,
}

enum Step {
    Upsert(Box<Upsert>, ContentHash),
    Remove,
}

impl Bulk {
    pub(super) fn new(
        deps: Arc<LinkDeps>,
        session: Session,
        outbound: mpsc::Sender<Result<CloudBulk, Status>>,
    ) -> Self {
        let (mint_results, mints) = mpsc::channel(MINTS);
        Self {
            deps,
            session,
            outbound,
            held: BTreeMap::new(),
            expiry: BTreeMap::new(),
            minted: BTreeMap::new(),
            minting: BTreeSet::new(),
            failed: BTreeSet::new(),
            mints,
            mint_results,
            sent: 0,
            applied: 0,
            synced: false,
        }
    }

    /// Serves the stream until either side ends it.
    pub(super) async fn run(mut self, mut inbound: Streaming<EdgeBulk>) -> Result<(), Status> {
        self.read_inventory(&mut inbound).await?;
        let mut changes = self.deps.mirror.changes(&self.session.peer.site);
        let session = self.session.clone();
        let lanes = session.lanes(&self.deps.reports);
        let mut token_check = tokio::time::interval(TOKEN_CHECK);
        let over = self.session.over.clone();
        let mut dirty = true;
        loop {
            if dirty && self.room() > 0 {
                changes.mark_unchanged();
                dirty = self.reconcile().await?;
                self.session.begun.cancel();
            }
            tokio::select! {
                () = over.cancelled() => return Ok(()),
                message = inbound.message() => match message? {
                    Some(message) => self.take(message, lanes).await?,
                    None => return Ok(()),
                },
                changed = settled(&mut changes) => {
                    if changed.is_err() {
                        return Err(Status::unavailable("the provider is stopping"));
                    }
                    dirty = true;
                }
                Some((key, result)) = self.mints.recv() => {
                    self.take_minted(key, result);
                    dirty = true;
                }
                _ = token_check.tick() => {
                    // Without tokens nothing comes of itself.
                    dirty |= !self.failed.is_empty() || !self.expiry.is_empty();
                    self.failed.clear();
                }
            }
        }
    }

    async fn read_inventory(&mut self, inbound: &mut Streaming<EdgeBulk>) -> Result<(), Status> {
        loop {
            let message = inbound.message().await?.and_then(|m| m.message);
            let Some(edge_bulk::Message::Inventory(Inventory { entries, last })) = message else {
                return Err(Status::invalid_argument("Inventory must follow BulkHello"));
            };
            for entry in entries {
                let kind = entry.kind();
                if kind == Kind::Unspecified {
                    continue;
                }
                let key = ObjectKey {
                    kind,
                    uid: Uid::from(entry.uid),
                };
                if kind == Kind::ServiceAccountToken {
                    self.expiry.insert(key.clone(), entry.expires_unix);
                }
                // An entry without a hash is one that the edge cannot read: no object has this hash, so it is sent anew.
                let hash = ContentHash::from_slice(&entry.hash).unwrap_or(ContentHash([0; 16]));
                self.held.insert(key, hash);
            }
            if self.held.len() > INVENTORY_LIMIT {
                return Err(Status::resource_exhausted(format!(
                    "more than {INVENTORY_LIMIT} objects in the inventory"
                )));
            }
            if last {
                return Ok(());
            }
        }
    }

    async fn take(&mut self, message: EdgeBulk, lanes: &Lanes) -> Result<(), Status> {
        match message.message {
            Some(edge_bulk::Message::Applied(applied)) => {
                if applied.seq > self.sent {
                    return Err(Status::invalid_argument(
                        "Applied names a change that was never sent",
                    ));
                }
                self.applied = self.applied.max(applied.seq);
            }
            Some(edge_bulk::Message::Report(report)) => {
                lanes.take(report, Reply::Bulk(self.outbound.clone())).await;
            }
            _ => {}
        }
        Ok(())
    }

    fn take_minted(&mut self, key: ObjectKey, result: Result<Minted, kube::Error>) {
        self.minting.remove(&key);
        match result {
            Ok(minted) => {
                self.minted.insert(key, minted);
            }
            Err(error) => {
                tracing::warn!(site = %self.session.peer.site, token = %key.uid, %error, "a ServiceAccount token could not be had; it is asked for again");
                self.failed.insert(key);
            }
        }
    }

    fn room(&self) -> u64 {
        CHANGE_WINDOW.saturating_sub(self.sent - self.applied)
    }

    /// Compares and sends as much as the window allows. Answers whether something is left to send.
    async fn reconcile(&mut self) -> Result<bool, Status> {
        let desired = self.deps.mirror.desired(&self.session.peer.site);
        self.mint(&desired);
        let Difference { changes, complete } = self.difference(&desired);
        let total = changes.len();
        let room = usize::try_from(self.room()).unwrap_or(usize::MAX);
        for (key, step) in changes.into_iter().take(room) {
            self.sent += 1;
            let change = match step {
                Step::Upsert(upsert, hash) => {
                    if key.kind == Kind::ServiceAccountToken {
                        self.expiry.insert(key.clone(), upsert.expires_unix);
                        self.minted.remove(&key);
                    }
                    self.held.insert(key, hash);
                    change::Change::Upsert(*upsert)
                }
                Step::Remove => {
                    self.held.remove(&key);
                    self.expiry.remove(&key);
                    change::Change::Remove(Remove {
                        kind: key.kind.into(),
                        uid: key.uid.to_string(),
                    })
                }
            };
            self.send(cloud_bulk::Message::Change(Change {
                seq: self.sent,
                change: Some(change),
            }))
            .await?;
        }
        let more = total > room;
        if !self.synced && !more && complete {
            self.synced = true;
            self.send(cloud_bulk::Message::Synced(Synced { seq: self.sent }))
                .await?;
        }
        Ok(more)
    }

    /// Starts requests for tokens that the edge lacks or that are due.
    fn mint(&mut self, desired: &Desired) {
        let now = Timestamp::now().as_second();
        for (key, token) in &desired.tokens {
            let fresh = self
                .expiry
                .get(key)
                .is_some_and(|expires| !due(*expires, &token.need, now));
            let busy =
                self.minting.contains(key) || self.minted.contains_key(key) || self.failed.contains(key);
            if fresh || busy || token.leaving || self.minting.len() >= MINTS {
                continue;
            }
            self.minting.insert(key.clone());
            let (client, results, key) = (self.deps.client.clone(), self.mint_results.clone(), key.clone());
            let DesiredToken { owner, need, .. } = token;
            let (owner, need) = (owner.clone(), need.clone());
            tokio::spawn(async move {
                let result = mint(&client, &owner, &need).await;
                // The session may be over; then nobody needs the token.
                let _ = results.send((key, result)).await;
            });
        }
    }

    /// References travel before the pods that need them, pods leave before what they refer to.
    fn difference(&self, desired: &Desired) -> Difference {
        let mut complete = true;
        let (mut references, mut users) = (Vec::new(), Vec::new());
        for (key, minted) in &self.minted {
            if let Some(token) = desired.tokens.get(key) {
                match token_upsert(key, token, minted) {
                    Ok((upsert, hash)) => {
                        references.push((key.clone(), Step::Upsert(Box::new(upsert), hash)))
                    }
                    Err(error) => tracing::error!(token = %key.uid, %error, "a token cannot be packed"),
                }
            }
        }
        let waiting = self.pods_waiting_for_tokens(desired);
        for (key, object) in &desired.objects {
            if self.held.get(key) == Some(&object.hash) {
                continue;
            }
            if waiting.contains(&key.uid) && !self.held.contains_key(key) {
                complete = false;
                continue;
            }
            let step = match object.upsert() {
                Ok(upsert) => Step::Upsert(Box::new(upsert), object.hash),
                Err(error) => {
                    tracing::error!(name = %object.name, namespace = %object.namespace, %error, "an object cannot be packed");
                    continue;
                }
            };
            let list = if matches!(key.kind, Kind::Pod | Kind::Device) {
                &mut users
            } else {
                &mut references
            };
            list.push((key.clone(), step));
        }
        let gone = self
            .held
            .keys()
            .filter(|key| !desired.objects.contains_key(key) && !desired.tokens.contains_key(key));
        let (mut first, mut last): (Vec<_>, Vec<_>) = gone
            .map(|key| (key.clone(), Step::Remove))
            .partition(|(key, _)| matches!(key.kind, Kind::Pod | Kind::Device));
        let mut changes = references;
        changes.append(&mut first);
        changes.append(&mut users);
        changes.append(&mut last);
        Difference { changes, complete }
    }

    /// Pods that the edge does not have yet and whose tokens are on their way: they come together.
    fn pods_waiting_for_tokens(&self, desired: &Desired) -> BTreeSet<Uid> {
        desired
            .tokens
            .iter()
            .filter(|(key, token)| {
                let coming = self.minted.contains_key(key) || self.failed.contains(key);
                !token.leaving && !coming && !self.expiry.contains_key(key)
            })
            .map(|(_, token)| token.owner.uid.clone())
            .collect()
    }

    async fn send(&self, message: cloud_bulk::Message) -> Result<(), Status> {
        let message = Ok(CloudBulk {
            message: Some(message),
        });
        tokio::select! {
            () = self.session.over.cancelled() => Err(Status::aborted("the session is over")),
            sent = self.outbound.send(message) => sent.map_err(|_| Status::cancelled("the edge is gone")),
        }
    }
}

/// Waits for a change, and a moment for those that follow it. Cancellation safe: a change that was not answered for is
/// found again.
async fn settled(changes: &mut watch::Receiver<u64>) -> Result<(), watch::error::RecvError> {
    changes.changed().await?;
    changes.mark_changed();
    tokio::time::sleep(SETTLE).await;
    changes.mark_unchanged();
    Ok(())
}

fn token_upsert(
    key: &ObjectKey,
    token: &DesiredToken,
    minted: &Minted,
) -> Result<(Upsert, ContentHash), skerry_proto::object::PackError> {
    let hash = ContentHash::of(&minted.object);
    let upsert = Upsert {
        kind: key.kind.into(),
        uid: key.uid.to_string(),
        namespace: token.owner.namespace.clone(),
        name: format!("{}/{}/{}", token.owner.pod, token.need.volume, token.need.path),
        hash: bytes::Bytes::copy_from_slice(&hash.0),
        json_zstd: pack(&minted.object)?.into(),
        expires_unix: minted.expires_unix,
    };
    Ok((upsert, hash))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_change_is_not_lost_to_a_message_that_comes_just_after_it() {
        let (sender, mut changes) = watch::channel(0);
        sender.send_replace(1);
        // What happens when another branch of the select is ready while this one waits for more.
        tokio::select! {
            biased;
            _ = settled(&mut changes) => panic!("the change must settle first"),
            () = tokio::task::yield_now() => {}
        }
        tokio::time::timeout(SETTLE * 2, settled(&mut changes))
            .await
            .expect("the change is still there")
            .unwrap();
        assert!(!changes.has_changed().unwrap());
    }
}
