//! What one site is sent: the provider's half of the bulk stream as a state machine without I/O.
//!
//! Level-based. What the edge holds (its inventory, then what was sent) is compared with what it should hold; the
//! difference waits in a queue and goes out, numbered, at most [`CHANGE_WINDOW`] ahead of the edge's acknowledgement.
//!
//! The edge tells its inventory as digests (`docs/link.md`). What is **believed** of it is then what it should hold by the
//! cluster, with the tokens that it was sent in earlier sessions; the entries of buckets that differ are asked for and
//! replace what was believed. An edge without digests tells every entry.
//!
//! What must always hold:
//! * `held` is what the edge holds once it has applied everything that was sent.
//! * No change is sent while entries are asked for: the answer would be older than the change.
//! * A pod goes out after what it refers to, and what it refers to is removed after it.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use skerry_proto::digest::{Buckets, Chosen, Entry, Group, Sum, buckets_for, buckets_of};
use skerry_proto::limits::CHANGE_WINDOW;
use skerry_proto::link::{
    Applied, Change, GroupDigest, Inventory, InventoryDigest, InventoryRequest, Kind, Remove, Synced, Upsert,
    change, cloud_bulk,
};
use skerry_proto::object::{ContentHash, ObjectKey, PackError, Uid, pack};

use crate::cluster::{Desired, DesiredToken, Object};
use crate::refs::tokens::{Minted, due};

/// Most objects that a site may say it holds: far above the 10,000 pods that one is built for.
const INVENTORY_LIMIT: usize = 200_000;
/// Token requests under way for one site.
pub(super) const MINTS: usize = 16;
/// A divergence that repairing has not cured is repaired again after this long, then twice as long, up to the last.
const FIRST_REPAIR: Duration = Duration::from_secs(60);
const LAST_REPAIR: Duration = Duration::from_secs(64 * 60);

/// Hash of an object that the edge cannot read: no object has it, so it is sent anew.
const UNREADABLE: ContentHash = ContentHash([0; 16]);

/// The tokens that a store was sent, with what is told of them.
pub type Tokens = BTreeMap<ObjectKey, Entry>;

/// The edge does not keep to the protocol; the session ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Violation {
    /// Reports and acknowledgements come after the inventory.
    #[error("Inventory or InventoryDigest must follow BulkHello")]
    NoInventory,
    /// It was not asked for.
    #[error("an inventory came that was not asked for")]
    Unasked,
    /// More than the provider can keep for a site.
    #[error("more than {INVENTORY_LIMIT} objects in the inventory")]
    TooMany,
    /// A digest cannot be read.
    #[error("malformed digest")]
    Digest,
    /// It cannot have applied that.
    #[error("Applied names a change that was never sent")]
    Unsent,
}

/// How far both sides are known to agree.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Proof {
    /// Not everything was sent, or not acknowledged yet.
    Open,
    /// The edge does not tell digests.
    Unsupported,
    /// At the last acknowledgement the store was what it must be, and complete.
    Equal,
    /// It was not.
    Different,
}

/// Where the exchange about the inventory stands.
#[derive(Clone, Debug)]
enum Phase {
    /// Nothing has come yet.
    Greeting,
    /// An edge without digests is telling everything.
    Telling,
    /// A new digest was asked for, to repair.
    Digesting,
    /// The entries of some buckets are on their way.
    Asking { objects: Chosen, tokens: Chosen },
    /// It is known what the edge holds.
    Sending,
}

/// One step of the queue.
enum Pending {
    Object(Arc<Object>),
    Token(Box<Upsert>, Entry),
    Remove,
}

/// A pod that the edge does not have and whose tokens are on their way: they come together.
struct Waiting {
    pod: Arc<Object>,
    tokens: BTreeSet<ObjectKey>,
}

/// See the module's documentation.
pub struct SiteSync {
    phase: Phase,
    digests: bool,
    /// Tokens of earlier sessions, until the inventory is known.
    remembered: Tokens,
    held: BTreeMap<ObjectKey, Entry>,
    /// What the edge holds of kinds that this build does not know; it counts in the digest.
    foreign: BTreeMap<(i32, String), Entry>,
    /// Sums of `held` and `foreign`, by group.
    sums: [Sum; 2],
    pending: VecDeque<(ObjectKey, Pending)>,
    waiting: BTreeMap<Uid, Waiting>,
    /// Tokens to be asked for, in order.
    wanted: VecDeque<(ObjectKey, DesiredToken)>,
    /// Tokens whose request is under way.
    minting: BTreeMap<ObjectKey, DesiredToken>,
    /// Tokens that could not be had; asked for again by [`SiteSync::forgive`].
    failed: BTreeSet<ObjectKey>,
    /// Number of the last change sent, and of the last one acknowledged.
    sent: u64,
    applied: u64,
    /// What the digests must be after each change that is not acknowledged.
    expected: VecDeque<(u64, [Sum; 2])>,
    /// With which change the store is complete, once Synced has said so.
    synced: Option<u64>,
    proof: Proof,
    /// When a divergence may be repaired again, and how long the pause after that is.
    repair_from: Duration,
    repair_pause: Duration,
}

impl SiteSync {
    /// The state at the start of a session; `remembered` are the tokens that an earlier session has sent to this store.
    pub fn new(remembered: Tokens) -> Self {
        Self {
            phase: Phase::Greeting,
            digests: false,
            remembered,
            held: BTreeMap::new(),
            foreign: BTreeMap::new(),
            sums: [Sum::default(); 2],
            pending: VecDeque::new(),
            waiting: BTreeMap::new(),
            wanted: VecDeque::new(),
            minting: BTreeMap::new(),
            failed: BTreeSet::new(),
            sent: 0,
            applied: 0,
            expected: VecDeque::new(),
            synced: None,
            proof: Proof::Open,
            repair_from: Duration::ZERO,
            repair_pause: FIRST_REPAIR,
        }
    }

    /// The tokens that the store is believed to hold, for the next session; all that was remembered while nothing is known.
    pub fn tokens(&self) -> Tokens {
        if matches!(self.phase, Phase::Greeting) {
            return self.remembered.clone();
        }
        let tokens = self.held.iter().filter(|(key, _)| is_token(key));
        tokens.map(|(key, entry)| (key.clone(), *entry)).collect()
    }

    /// How far both sides are known to agree.
    pub fn proof(&self) -> Proof {
        self.proof
    }

    /// Tokens may become due, or are to be asked for again.
    pub fn has_tokens(&self) -> bool {
        !self.failed.is_empty() || self.held.keys().any(is_token)
    }

    /// What the edge holds is known, and changes may go out.
    pub fn is_sending(&self) -> bool {
        matches!(self.phase, Phase::Sending)
    }

    /// How many more changes may go out before the edge acknowledges some.
    pub fn room(&self) -> u64 {
        CHANGE_WINDOW.saturating_sub(self.sent - self.applied)
    }

    /// Takes a digest: the first message of a session, or the answer to a repair. Answers what to ask for, if anything.
    pub fn take_digest(
        &mut self,
        digest: &InventoryDigest,
        desired: &Desired,
    ) -> Result<Option<cloud_bulk::Message>, Violation> {
        match self.phase {
            Phase::Greeting => {
                self.digests = true;
                for (key, object) in &desired.objects {
                    self.hold(key.clone(), entry(object.hash));
                }
                for (key, entry) in std::mem::take(&mut self.remembered) {
                    self.hold(key, entry);
                }
            }
            // Everything that was sent is applied by now: the answer came behind its acknowledgement.
            Phase::Digesting => {}
            _ => return Err(Violation::Unasked),
        }
        let mut request = InventoryRequest::default();
        for (group, told) in [(Group::Objects, &digest.objects), (Group::Tokens, &digest.tokens)] {
            let told = told.clone().unwrap_or_else(nothing);
            let of = buckets_of(&told).ok_or(Violation::Digest)?;
            let differing = self.buckets(group, of).differing(&told);
            if differing.buckets.is_empty() {
                continue;
            }
            match group {
                Group::Objects => request.objects = Some(differing),
                Group::Tokens => request.tokens = Some(differing),
            }
        }
        if request == InventoryRequest::default() {
            self.begin_sending();
            return Ok(None);
        }
        let chosen = |set: &Option<_>| set.as_ref().map(Chosen::new).unwrap_or_default();
        let (objects, tokens) = (chosen(&request.objects), chosen(&request.tokens));
        self.forget_chosen(&objects, &tokens);
        self.phase = Phase::Asking { objects, tokens };
        Ok(Some(cloud_bulk::Message::InventoryRequest(request)))
    }

    /// Takes entries, all of them or those that were asked for.
    pub fn take_inventory(&mut self, inventory: Inventory) -> Result<(), Violation> {
        match self.phase {
            Phase::Greeting => self.phase = Phase::Telling,
            Phase::Telling | Phase::Asking { .. } => {}
            _ => return Err(Violation::Unasked),
        }
        for told in inventory.entries {
            if let Phase::Asking { objects, tokens } = &self.phase {
                let chosen = match Group::of(told.kind) {
                    Group::Objects => objects,
                    Group::Tokens => tokens,
                };
                if !chosen.has(told.kind, &told.uid) {
                    return Err(Violation::Unasked);
                }
            }
            let entry = Entry {
                hash: ContentHash::from_slice(&told.hash).unwrap_or(UNREADABLE),
                expires_unix: told.expires_unix,
            };
            match told.kind() {
                Kind::Unspecified => self.hold_foreign(told.kind, told.uid, entry),
                kind => {
                    let uid = Uid::from(told.uid);
                    self.hold(ObjectKey { kind, uid }, entry);
                }
            }
        }
        if self.held.len() + self.foreign.len() > INVENTORY_LIMIT {
            return Err(Violation::TooMany);
        }
        if inventory.last {
            self.begin_sending();
        }
        Ok(())
    }

    /// Takes an acknowledgement. `now` is any clock that does not go back. Answers what to ask for, when the store is not
    /// what it must be.
    pub fn take_applied(
        &mut self,
        applied: &Applied,
        now: Duration,
    ) -> Result<Option<cloud_bulk::Message>, Violation> {
        if applied.seq > self.sent {
            return Err(Violation::Unsent);
        }
        self.applied = self.applied.max(applied.seq);
        let mut must = None;
        while let Some((seq, sums)) = self.expected.front().copied() {
            if seq > applied.seq {
                break;
            }
            must = (seq == applied.seq).then_some(sums);
            self.expected.pop_front();
        }
        let unchanged = applied.seq == self.sent && self.is_sending();
        let must = must.or(unchanged.then_some(self.sums));
        if !self.digests || applied.objects_sum.is_empty() {
            if self.synced.is_some() {
                self.proof = Proof::Unsupported;
            }
            return Ok(None);
        }
        // While entries are under way, what they say counts, and not what was believed before.
        let (Some(must), true) = (must, self.is_sending()) else {
            return Ok(None);
        };
        let sum = |bytes: &[u8]| Sum::from_slice(bytes).ok_or(Violation::Digest);
        if [sum(&applied.objects_sum)?, sum(&applied.tokens_sum)?] == must {
            if self.synced.is_some_and(|synced| applied.seq >= synced) {
                self.proof = Proof::Equal;
                self.repair_pause = FIRST_REPAIR;
            }
            return Ok(None);
        }
        self.proof = Proof::Different;
        Ok(self.repair(now))
    }

    /// Tries again to repair a divergence that the last repair has not cured, once its pause is over.
    pub fn repair(&mut self, now: Duration) -> Option<cloud_bulk::Message> {
        if self.proof != Proof::Different || !self.is_sending() || now < self.repair_from {
            return None;
        }
        self.repair_from = now + self.repair_pause;
        self.repair_pause = (self.repair_pause * 2).min(LAST_REPAIR);
        self.phase = Phase::Digesting;
        self.expected.clear();
        self.synced = None;
        Some(cloud_bulk::Message::InventoryRequest(InventoryRequest {
            digest: true,
            ..InventoryRequest::default()
        }))
    }

    /// Compares what is held with what should be, and queues the difference.
    ///
    /// References travel before the pods that need them, pods leave before what they refer to.
    pub fn compare(&mut self, desired: &Desired, now_unix: i64) {
        if !self.is_sending() {
            return;
        }
        let ready: BTreeMap<ObjectKey, Pending> = std::mem::take(&mut self.pending)
            .into_iter()
            .filter(|(key, step)| matches!(step, Pending::Token(..)) && desired.tokens.contains_key(key))
            .collect();
        self.want_tokens(desired, &ready, now_unix);
        let missing = self.missing_tokens(desired, &ready);
        self.waiting.clear();
        let (mut references, mut users) = (Vec::new(), Vec::new());
        for (key, object) in &desired.objects {
            let held = self.held.get(key);
            if held.is_some_and(|held| held.hash == object.hash) {
                continue;
            }
            if held.is_none()
                && let Some(tokens) = missing.get(&key.uid)
                && key.kind == Kind::Pod
            {
                let waiting = Waiting {
                    pod: Arc::clone(object),
                    tokens: tokens.clone(),
                };
                self.waiting.insert(key.uid.clone(), waiting);
                continue;
            }
            let list = if is_user(key) { &mut users } else { &mut references };
            list.push((key.clone(), Pending::Object(Arc::clone(object))));
        }
        let gone = self
            .held
            .keys()
            .filter(|key| !desired.objects.contains_key(key) && !desired.tokens.contains_key(key));
        let (first, last): (Vec<_>, Vec<_>) = gone
            .map(|key| (key.clone(), Pending::Remove))
            .partition(|(key, _)| is_user(key));
        self.pending.extend(ready);
        self.pending.extend(references);
        self.pending.extend(first);
        self.pending.extend(users);
        self.pending.extend(last);
    }

    /// Tokens that the edge lacks or that are due, beyond those that are on their way.
    fn want_tokens(&mut self, desired: &Desired, ready: &BTreeMap<ObjectKey, Pending>, now_unix: i64) {
        self.wanted.clear();
        // One that nobody needs any more is not sent when it comes.
        self.minting.retain(|key, _| desired.tokens.contains_key(key));
        for (key, token) in &desired.tokens {
            let held = self.held.get(key).filter(|entry| entry.hash != UNREADABLE);
            let fresh = held.is_some_and(|entry| !due(entry.expires_unix, &token.need, now_unix));
            let busy = self.minting.contains_key(key) || ready.contains_key(key) || self.failed.contains(key);
            if !fresh && !busy && !token.leaving {
                self.wanted.push_back((key.clone(), token.clone()));
            }
        }
    }

    /// By pod, the tokens that the edge does not have and that are on their way.
    fn missing_tokens(
        &self,
        desired: &Desired,
        ready: &BTreeMap<ObjectKey, Pending>,
    ) -> BTreeMap<Uid, BTreeSet<ObjectKey>> {
        let mut missing = BTreeMap::<Uid, BTreeSet<ObjectKey>>::new();
        for (key, token) in &desired.tokens {
            let here = self.held.contains_key(key) || ready.contains_key(key) || self.failed.contains(key);
            if !here && !token.leaving {
                missing
                    .entry(token.owner.uid.clone())
                    .or_default()
                    .insert(key.clone());
            }
        }
        missing
    }

    /// The next token to ask the API server for, if there is one and not too many requests are under way. Its answer
    /// goes to [`SiteSync::take_minted`].
    pub fn next_mint(&mut self) -> Option<(ObjectKey, DesiredToken)> {
        if self.minting.len() >= MINTS {
            return None;
        }
        let (key, token) = self.wanted.pop_front()?;
        self.minting.insert(key.clone(), token.clone());
        Some((key, token))
    }

    /// Takes a token from the API server; `None` when it could not be had. The pod goes out without it then.
    pub fn take_minted(&mut self, key: &ObjectKey, minted: Option<&Minted>) -> Result<(), PackError> {
        let Some(token) = self.minting.remove(key) else {
            return Ok(());
        };
        let packed = minted.map(|minted| token_upsert(key, &token, minted)).transpose();
        match &packed {
            Ok(Some((upsert, entry))) => {
                let step = Pending::Token(Box::new(upsert.clone()), *entry);
                self.pending.push_back((key.clone(), step));
            }
            _ => {
                self.failed.insert(key.clone());
            }
        }
        let pod = &token.owner.uid;
        if let Some(waiting) = self.waiting.get_mut(pod) {
            waiting.tokens.remove(key);
            if waiting.tokens.is_empty()
                && let Some(Waiting { pod: object, .. }) = self.waiting.remove(pod)
            {
                self.pending
                    .push_back((object.key.clone(), Pending::Object(object)));
            }
        }
        packed.map(drop)
    }

    /// Lets tokens that could not be had be asked for again, by the next comparison.
    pub fn forgive(&mut self) {
        self.failed.clear();
    }

    /// The next message to send: a change, as long as the window has room, or Synced when all is sent.
    pub fn next_message(&mut self) -> Option<cloud_bulk::Message> {
        if !self.is_sending() {
            return None;
        }
        while self.room() > 0 {
            let Some((key, step)) = self.pending.pop_front() else {
                break;
            };
            let change = match step {
                Pending::Object(object) => match object.upsert() {
                    Ok(upsert) => {
                        self.hold(key, entry(object.hash));
                        change::Change::Upsert(upsert)
                    }
                    Err(error) => {
                        tracing::error!(name = %object.name, namespace = %object.namespace, %error, "an object cannot be packed");
                        continue;
                    }
                },
                Pending::Token(upsert, entry) => {
                    self.hold(key, entry);
                    change::Change::Upsert(*upsert)
                }
                Pending::Remove => {
                    self.release(&key);
                    change::Change::Remove(Remove {
                        kind: key.kind.into(),
                        uid: key.uid.to_string(),
                    })
                }
            };
            self.sent += 1;
            if self.digests {
                self.expected.push_back((self.sent, self.sums));
            }
            return Some(cloud_bulk::Message::Change(Change {
                seq: self.sent,
                change: Some(change),
            }));
        }
        let complete = self.pending.is_empty() && self.waiting.is_empty();
        if complete && self.synced.is_none() {
            self.synced = Some(self.sent);
            return Some(cloud_bulk::Message::Synced(Synced { seq: self.sent }));
        }
        None
    }

    fn begin_sending(&mut self) {
        self.phase = Phase::Sending;
        self.remembered.clear();
    }

    fn hold(&mut self, key: ObjectKey, entry: Entry) {
        let kind = i32::from(key.kind);
        let sum = &mut self.sums[index(Group::of(kind))];
        sum.add(Sum::of(kind, key.uid.as_str(), &entry));
        if let Some(older) = self.held.get(&key) {
            sum.remove(Sum::of(kind, key.uid.as_str(), older));
        }
        self.held.insert(key, entry);
    }

    fn hold_foreign(&mut self, kind: i32, uid: String, entry: Entry) {
        let sum = &mut self.sums[index(Group::of(kind))];
        sum.add(Sum::of(kind, &uid, &entry));
        if let Some(older) = self.foreign.get(&(kind, uid.clone())) {
            sum.remove(Sum::of(kind, &uid, older));
        }
        self.foreign.insert((kind, uid), entry);
    }

    fn release(&mut self, key: &ObjectKey) {
        if let Some(older) = self.held.remove(key) {
            let kind = i32::from(key.kind);
            self.sums[index(Group::of(kind))].remove(Sum::of(kind, key.uid.as_str(), &older));
        }
    }

    fn forget_chosen(&mut self, objects: &Chosen, tokens: &Chosen) {
        let chosen = |kind: i32, uid: &str| match Group::of(kind) {
            Group::Objects => objects.has(kind, uid),
            Group::Tokens => tokens.has(kind, uid),
        };
        let keys: Vec<ObjectKey> = self
            .held
            .keys()
            .filter(|key| chosen(key.kind.into(), key.uid.as_str()))
            .cloned()
            .collect();
        for key in keys {
            self.release(&key);
        }
        let foreign = std::mem::take(&mut self.foreign);
        for ((kind, uid), entry) in foreign {
            self.sums[index(Group::of(kind))].remove(Sum::of(kind, &uid, &entry));
            if !chosen(kind, &uid) {
                self.hold_foreign(kind, uid, entry);
            }
        }
    }

    fn buckets(&self, group: Group, of: u32) -> Buckets {
        let mut buckets = Buckets::new(of);
        for (key, entry) in &self.held {
            let kind = i32::from(key.kind);
            if Group::of(kind) == group {
                buckets.add(kind, key.uid.as_str(), entry);
            }
        }
        for ((kind, uid), entry) in &self.foreign {
            if Group::of(*kind) == group {
                buckets.add(*kind, uid, entry);
            }
        }
        buckets
    }
}

fn index(group: Group) -> usize {
    match group {
        Group::Objects => 0,
        Group::Tokens => 1,
    }
}

fn is_token(key: &ObjectKey) -> bool {
    key.kind == Kind::ServiceAccountToken
}

/// What refers to other objects.
fn is_user(key: &ObjectKey) -> bool {
    matches!(key.kind, Kind::Pod | Kind::Device)
}

fn entry(hash: ContentHash) -> Entry {
    Entry {
        hash,
        expires_unix: 0,
    }
}

/// The digest of a group that the edge leaves out.
fn nothing() -> GroupDigest {
    Buckets::new(buckets_for(0)).message()
}

fn token_upsert(
    key: &ObjectKey,
    token: &DesiredToken,
    minted: &Minted,
) -> Result<(Upsert, Entry), PackError> {
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
    let entry = Entry {
        hash,
        expires_unix: minted.expires_unix,
    };
    Ok((upsert, entry))
}
