//! Which sites are connected, and by which session.
//!
//! A site has at most one session. A new one fences the old: its token is cancelled before the new one is entered, and
//! whatever still runs for it may no longer write.

use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use jiff::Timestamp;
use serde_json::Value;
use skerry_proto::SiteName;
use skerry_proto::link::{
    self, CloudControl, Goodbye, Heartbeat, Hello, OpenTunnel, ReportDrops, cloud_control, heartbeat,
};
use skerry_proto::object::Uid;
use skerry_transport::Lines;
use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;

use super::lives::{Evidence, Life, Lives, Verdict};
use super::reports::{Lanes, Reports};
use super::sync::{Proof, Tokens};
use super::tunnels::{Orders, SiteAway};
use crate::pki::{Revoked, SitePeer};

/// Most lanes and reasons of dropped reports that are kept of a site.
const MOST_DROPS: usize = 64;

/// What is known of a site's link.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LinkState {
    /// A session exists and is heard.
    pub online: bool,
    /// When `online` took its present value; the provider's start for a site never seen by this process.
    pub since: Timestamp,
    /// When anything was last heard; absent for a site never seen by this process.
    pub last_heard: Option<Timestamp>,
    /// The daemon's version, empty when never seen.
    pub version: String,
    /// The machine's boot id, empty when never seen.
    pub boot_id: String,
    /// Reports that the site has dropped since its store was made, by lane and reason, as far as it was told.
    pub drops: BTreeMap<(String, String), u64>,
    /// Bytes that the link has carried today.
    pub used_today: u64,
    /// Why what can wait must wait at the site.
    pub deferring: heartbeat::Deferring,
    /// The store's id, empty when never seen, and which daemon on it this is.
    pub store_id: String,
    /// See `store_id`.
    pub incarnation: u64,
    /// How far the site is known to hold what it should; [`Proof::Open`] while it is away.
    pub proof: Proof,
    /// When it was last known to.
    pub proven: Option<Timestamp>,
    /// The newest sign that its identity is used twice.
    pub conflict: Option<Conflict>,
}

/// A sign that a site's identity is used twice.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Conflict {
    /// When it was seen.
    pub at: Timestamp,
    /// What proves it.
    pub evidence: Evidence,
    /// The newcomer was refused, because the other one is connected.
    pub refused: bool,
}

impl fmt::Display for Conflict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let done = if self.refused {
            "the one that is connected is kept, the newcomer was refused"
        } else {
            "it was admitted, since no other one is connected"
        };
        write!(
            f,
            "the site's identity is used twice, or its store was put back from an older copy: {}; {done}. If there are two \
             machines, stop one of them, remove its data directory and enrol it as a Site of its own with skerry-edge join",
            self.evidence
        )
    }
}

impl Conflict {
    /// What the newcomer is told.
    pub fn goodbye(&self) -> Goodbye {
        Goodbye {
            reason: self.to_string(),
            retry_after_millis: 60_000,
        }
    }
}

/// One session, as its streams hold it.
#[derive(Clone)]
pub struct Session {
    /// Its unique name.
    pub id: String,
    /// The site and the certificate that it began with.
    pub peer: SitePeer,
    /// The certificate that keeps it: renewed by that one, or the same.
    kept_by: Arc<Mutex<SitePeer>>,
    /// Cancelled when the session ends, for whatever reason.
    pub over: CancellationToken,
    /// Cancelled when the first comparison of inventories has been sent: the dear part of the beginning is over.
    pub begun: CancellationToken,
    /// Its connections.
    pub lines: Lines,
    lanes: Arc<OnceLock<Lanes>>,
    /// Who is at the other end.
    pub life: Arc<Life>,
}

impl Session {
    /// The lanes of its reports, from whichever stream they come.
    pub(super) fn lanes(&self, reports: &Arc<Reports>) -> &Lanes {
        self.lanes.get_or_init(|| Lanes::start(reports, self))
    }

    /// A session that nobody knows yet.
    pub(super) fn new(peer: &SitePeer, life: Life) -> Self {
        Self {
            id: uuid::Uuid::new_v4().simple().to_string(),
            peer: peer.clone(),
            kept_by: Arc::new(Mutex::new(peer.clone())),
            over: CancellationToken::new(),
            begun: CancellationToken::new(),
            lines: Lines::default(),
            lanes: Arc::default(),
            life: Arc::new(life),
        }
    }

    /// Waits until the session has begun for good, or is over.
    pub(super) async fn settled(self) {
        tokio::select! {
            () = self.over.cancelled() => {}
            () = self.begun.cancelled() => {}
        }
    }
}

impl Session {
    /// When the session must end: with the certificate that keeps it.
    pub fn expires(&self) -> Timestamp {
        self.keeper().not_after
    }

    /// Whether that is the certificate with which the session began.
    pub fn began_with(&self, peer: &SitePeer) -> bool {
        self.peer == *peer
    }

    fn keeper(&self) -> std::sync::MutexGuard<'_, SitePeer> {
        self.kept_by.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

struct Entry {
    session: Session,
    orders: mpsc::Sender<Result<CloudControl, tonic::Status>>,
}

/// What is kept of a site between its sessions.
#[derive(Default)]
struct Memory {
    lives: Lives,
    /// The store that was sent these tokens.
    store: String,
    tokens: Tokens,
}

/// The registry. Clones share it.
#[derive(Clone)]
pub struct Sessions {
    inner: Arc<Inner>,
}

struct Inner {
    started: Timestamp,
    entries: Mutex<HashMap<SiteName, Entry>>,
    states: Mutex<HashMap<SiteName, watch::Sender<LinkState>>>,
    memories: Mutex<HashMap<SiteName, Memory>>,
}

impl Sessions {
    /// An empty registry; `now` is the provider's start.
    pub fn new(now: Timestamp) -> Self {
        Self {
            inner: Arc::new(Inner {
                started: now,
                entries: Mutex::default(),
                states: Mutex::default(),
                memories: Mutex::default(),
            }),
        }
    }

    /// Starts a session and ends the site's older one, if any. `status` is that of the Site.
    ///
    /// # Errors
    /// When the identity is used twice and the other one is connected.
    pub fn begin(
        &self,
        peer: &SitePeer,
        hello: &Hello,
        status: &Value,
        orders: mpsc::Sender<Result<CloudControl, tonic::Status>>,
        now: Timestamp,
    ) -> Result<Session, Conflict> {
        let site = &peer.site;
        let life = Life::from(hello);
        let conflict = self.judge(site, &life, status, now);
        if let Some(conflict) = &conflict {
            self.state(site)
                .send_modify(|state| state.conflict = Some(conflict.clone()));
        }
        if let Some(conflict) = conflict.filter(|conflict| conflict.refused) {
            return Err(conflict);
        }
        let session = Session::new(peer, life);
        let entry = Entry {
            session: session.clone(),
            orders,
        };
        let older = self.entries().insert(site.clone(), entry);
        if let Some(older) = older {
            older.session.over.cancel();
            if older.session.life.store != hello.store_id {
                tracing::warn!(
                    %site,
                    "a daemon with another store took over the site's session: is its disk cloned, or was the store reset?"
                );
            }
        }
        self.state(site).send_modify(|state| {
            if !state.online {
                state.online = true;
                state.since = now;
            }
            state.last_heard = Some(now);
            state.proof = Proof::Open;
            state.version.clone_from(&hello.version);
            state.boot_id.clone_from(&hello.boot_id);
            state.store_id.clone_from(&hello.store_id);
            state.incarnation = hello.incarnation;
        });
        Ok(session)
    }

    /// Whether a newcomer proves that the identity is used twice. Unless it is refused, it is the last life from now on.
    fn judge(&self, site: &SiteName, life: &Life, status: &Value, now: Timestamp) -> Option<Conflict> {
        let connected = self.entries().contains_key(site);
        let mut memories = self.memories();
        let memory = memories.entry(site.clone()).or_default();
        if memory.lives.is_empty() {
            memory.lives = Lives::of_status(status);
        }
        let conflict = match memory.lives.judge(life) {
            Verdict::Same | Verdict::Successor => None,
            Verdict::Conflict(evidence) => Some(Conflict {
                at: now,
                evidence,
                refused: connected,
            }),
        };
        if conflict.as_ref().is_none_or(|conflict| !conflict.refused) {
            memory.lives.begin(life.clone());
        }
        conflict
    }

    /// The tokens that this session's store is known to hold.
    pub fn recall(&self, session: &Session) -> Tokens {
        let memories = self.memories();
        let memory = memories.get(&session.peer.site);
        memory
            .filter(|memory| memory.store == session.life.store)
            .map(|memory| memory.tokens.clone())
            .unwrap_or_default()
    }

    /// Keeps what a session's store is known to hold, unless a newer session has begun.
    pub fn remember(&self, session: &Session, tokens: Tokens) {
        let newer = self
            .entries()
            .get(&session.peer.site)
            .is_some_and(|entry| entry.session.id != session.id);
        if !newer {
            let mut memories = self.memories();
            let memory = memories.entry(session.peer.site.clone()).or_default();
            memory.store.clone_from(&session.life.store);
            memory.tokens = tokens;
        }
    }

    /// Forgets a site whose Site was deleted.
    pub fn forget(&self, site: &SiteName) {
        self.memories().remove(site);
    }

    /// Notes whether the site holds what it should. Answers whether that is news.
    pub fn note_proof(&self, session: &Session, proof: Proof, now: Timestamp) -> bool {
        if session.over.is_cancelled() {
            return false;
        }
        self.state(&session.peer.site).send_if_modified(|state| {
            if proof == Proof::Equal {
                state.proven = Some(now);
            }
            std::mem::replace(&mut state.proof, proof) != proof
        })
    }

    /// Notes that the site was heard, unless the session is over.
    pub fn heard(&self, session: &Session, now: Timestamp) {
        if !session.over.is_cancelled() {
            // Quietly: watchers wait for changes of state, not for each heartbeat.
            self.state(&session.peer.site).send_if_modified(|state| {
                state.last_heard = Some(now);
                false
            });
        }
    }

    /// Notes what the site says that it has dropped, unless the session is over.
    pub fn dropped(&self, session: &Session, drops: Vec<ReportDrops>) {
        if drops.is_empty() || session.over.is_cancelled() {
            return;
        }
        self.state(&session.peer.site).send_modify(|state| {
            for drop in drops.into_iter().take(MOST_DROPS) {
                state.drops.insert((drop.lane, drop.reason), drop.count);
            }
            // A site that makes up names must not fill this process.
            while state.drops.len() > MOST_DROPS {
                state.drops.pop_last();
            }
        });
    }

    /// Notes what a heartbeat says of the link's use.
    pub fn note_use(&self, session: &Session, beat: &Heartbeat) {
        self.state(&session.peer.site).send_if_modified(|state| {
            state.used_today = beat.used_today;
            let before = std::mem::replace(&mut state.deferring, beat.deferring());
            before != state.deferring
        });
    }

    /// Asks a connected site for its Node's status.
    pub fn ask_for_node(&self, site: &SiteName) {
        if let Some(entry) = self.entries().get(site) {
            let message = Some(cloud_control::Message::ReportNode(link::ReportNode {}));
            // A full queue is a slow link: it is asked again.
            let _ = entry.orders.try_send(Ok(CloudControl { message }));
        }
    }

    /// Ends a session. Has no effect on a newer one of the same site.
    pub fn end(&self, session: &Session, now: Timestamp) {
        session.over.cancel();
        let removed = {
            let mut entries = self.entries();
            let current = entries
                .get(&session.peer.site)
                .is_some_and(|entry| entry.session.id == session.id);
            current.then(|| entries.remove(&session.peer.site)).flatten()
        };
        if removed.is_some() {
            self.state(&session.peer.site).send_modify(|state| {
                state.online = false;
                state.since = now;
                state.proof = Proof::Open;
            });
        }
    }

    /// The site's current session, if it is the named one.
    pub fn current(&self, site: &SiteName, id: &str) -> Option<Session> {
        self.entries()
            .get(site)
            .filter(|entry| entry.session.id == id)
            .map(|entry| entry.session.clone())
    }

    /// Notes that a site has renewed `old`: its session goes on under the new certificate, and need not be begun anew.
    pub fn renewed(&self, old: &SitePeer, new: &SitePeer) {
        if let Some(entry) = self.entries().get(&old.site) {
            let mut keeper = entry.session.keeper();
            if *keeper == *old {
                *keeper = new.clone();
            }
        }
    }

    /// Ends the site's session if the certificate that it began with, or the one that keeps it, is revoked.
    pub fn dismiss_revoked(&self, site: &SiteName, revoked: &Revoked) {
        let hit = |entry: &Entry| {
            let session = &entry.session;
            revoked.covers(&session.peer) || revoked.covers(&session.keeper())
        };
        if self.entries().get(site).is_some_and(hit) {
            self.dismiss(
                site,
                "the site's certificate was revoked; join again with a new token",
                60_000,
            );
        }
    }

    /// Asks the site to renew its certificate; nothing happens when it is away or busy.
    pub fn ask_to_renew(&self, site: &SiteName) {
        if let Some(entry) = self.entries().get(site) {
            let order = cloud_control::Message::RenewCertificate(skerry_proto::link::RenewCertificate {});
            let _ = entry.orders.try_send(Ok(CloudControl { message: Some(order) }));
        }
    }

    /// Whether the site has a session here.
    pub fn is_online(&self, site: &SiteName) -> bool {
        self.entries().contains_key(site)
    }

    /// Ends the site's session from this side, telling the edge why.
    pub fn dismiss(&self, site: &SiteName, reason: &str, retry_after_millis: u32) {
        if let Some(entry) = self.entries().get(site) {
            let goodbye = skerry_proto::link::Goodbye {
                reason: reason.to_owned(),
                retry_after_millis,
            };
            let _ = entry.orders.try_send(Ok(CloudControl {
                message: Some(cloud_control::Message::Goodbye(goodbye)),
            }));
            entry.session.over.cancel();
        }
    }

    /// Ends the site's session if it was opened for another Site object than the one with this UID.
    pub fn dismiss_earlier(&self, site: &SiteName, uid: &Uid) {
        let earlier = |entry: &Entry| entry.session.peer.uid != *uid;
        if self.entries().get(site).is_some_and(earlier) {
            self.dismiss(site, "the Site was deleted and declared anew; join again", 60_000);
        }
    }

    /// Says goodbye to every site; used at shutdown.
    pub fn dismiss_all(&self, reason: &str) {
        let sites: Vec<SiteName> = self.entries().keys().cloned().collect();
        for site in sites {
            self.dismiss(&site, reason, 1_000);
        }
    }

    /// How many sites are connected.
    pub fn online(&self) -> usize {
        self.entries().len()
    }

    /// The state of a site's link, to be watched.
    pub fn watch(&self, site: &SiteName) -> watch::Receiver<LinkState> {
        self.state(site).subscribe()
    }

    /// Since when the site is away; `None` when this process never saw it.
    fn away_since(&self, site: &SiteName) -> Option<Timestamp> {
        let state = self.state(site).borrow().clone();
        state.last_heard.map(|_| state.since)
    }

    fn entries(&self) -> std::sync::MutexGuard<'_, HashMap<SiteName, Entry>> {
        self.inner.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn memories(&self) -> std::sync::MutexGuard<'_, HashMap<SiteName, Memory>> {
        self.inner.memories.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn state(&self, site: &SiteName) -> watch::Sender<LinkState> {
        let mut states = self.inner.states.lock().unwrap_or_else(PoisonError::into_inner);
        let fresh = || {
            watch::Sender::new(LinkState {
                online: false,
                since: self.inner.started,
                last_heard: None,
                version: String::new(),
                boot_id: String::new(),
                drops: BTreeMap::new(),
                used_today: 0,
                deferring: heartbeat::Deferring::Not,
                store_id: String::new(),
                incarnation: 0,
                proof: Proof::Open,
                proven: None,
                conflict: None,
            })
        };
        states.entry(site.clone()).or_insert_with(fresh).clone()
    }
}

impl Orders for Sessions {
    fn send(&self, site: &SiteName, order: OpenTunnel) -> Result<(), SiteAway> {
        let entries = self.entries();
        let message = CloudControl {
            message: Some(cloud_control::Message::OpenTunnel(order)),
        };
        let sent = entries
            .get(site)
            .is_some_and(|entry| entry.orders.try_send(Ok(message)).is_ok());
        if sent {
            return Ok(());
        }
        Err(SiteAway {
            site: site.clone(),
            since: self.away_since(site),
        })
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    fn hello() -> Hello {
        Hello {
            version: "1".to_owned(),
            store_id: "s".to_owned(),
            ..Default::default()
        }
    }

    fn site() -> SiteName {
        "harbour".parse().unwrap()
    }

    fn peer() -> SitePeer {
        SitePeer {
            site: site(),
            uid: Uid::from("first".to_owned()),
            serial: "1".to_owned(),
            not_before: Timestamp::MIN,
            not_after: Timestamp::MAX,
        }
    }

    /// A session of its own registry.
    pub(in crate::link) fn session() -> Session {
        let (orders, _) = mpsc::channel(1);
        Sessions::new(Timestamp::UNIX_EPOCH)
            .begin(&peer(), &hello(), &Value::Null, orders, Timestamp::UNIX_EPOCH)
            .unwrap()
    }

    #[test]
    fn a_new_session_fences_the_old_and_the_late_end_of_the_old_changes_nothing() {
        let now = Timestamp::UNIX_EPOCH;
        let sessions = Sessions::new(now);
        let (sender, _receiver) = mpsc::channel(1);
        let old = sessions
            .begin(&peer(), &hello(), &Value::Null, sender.clone(), now)
            .unwrap();
        let new = sessions
            .begin(&peer(), &hello(), &Value::Null, sender, now)
            .unwrap();
        assert!(old.over.is_cancelled());
        assert!(!new.over.is_cancelled());
        sessions.end(&old, now);
        assert!(sessions.watch(&site()).borrow().online);
        assert!(sessions.current(&site(), &old.id).is_none());
        assert!(sessions.current(&site(), &new.id).is_some());
        sessions.end(&new, now);
        assert!(!sessions.watch(&site()).borrow().online);
    }

    #[test]
    fn what_a_site_dropped_is_known_by_lane_and_reason_and_survives_its_session() {
        let now = Timestamp::UNIX_EPOCH;
        let sessions = Sessions::new(now);
        let (sender, _receiver) = mpsc::channel(1);
        let session = sessions
            .begin(&peer(), &hello(), &Value::Null, sender, now)
            .unwrap();
        let drop = |reason: &str, count| ReportDrops {
            lane: "events".to_owned(),
            reason: reason.to_owned(),
            count,
        };
        sessions.dropped(&session, vec![drop("age", 1), drop("refused", 2)]);
        sessions.dropped(&session, vec![drop("age", 5)]);
        sessions.end(&session, now);
        sessions.dropped(&session, vec![drop("age", 9)]);
        let known = sessions.watch(&site()).borrow().drops.clone();
        let count = |reason: &str| known[&("events".to_owned(), reason.to_owned())];
        assert_eq!((known.len(), count("age"), count("refused")), (2, 5, 2));
    }

    #[test]
    fn a_session_is_kept_by_the_certificates_that_followed_its_own_and_ends_when_one_is_revoked() {
        let now = Timestamp::UNIX_EPOCH;
        let sessions = Sessions::new(now);
        let (sender, _receiver) = mpsc::channel(1);
        let made = |serial: &str, not_after: i64| SitePeer {
            serial: serial.to_owned(),
            not_after: Timestamp::from_second(not_after).unwrap(),
            ..peer()
        };
        let (first, second, third) = (made("1", 10), made("2", 20), made("3", 30));
        let session = sessions
            .begin(&first, &hello(), &Value::Null, sender, now)
            .unwrap();
        // Another machine's renewal keeps nothing.
        sessions.renewed(&second, &third);
        assert_eq!(session.expires(), first.not_after);
        sessions.renewed(&first, &second);
        sessions.renewed(&second, &third);
        assert_eq!(session.expires(), third.not_after);
        assert!(session.began_with(&first) && !session.began_with(&third));
        let revoked = |serial: &str| Revoked {
            before: None,
            serials: vec![serial.to_owned()],
        };
        sessions.dismiss_revoked(&site(), &revoked("2"));
        assert!(!session.over.is_cancelled());
        sessions.dismiss_revoked(&site(), &revoked("3"));
        assert!(session.over.is_cancelled());
    }

    #[test]
    fn a_clone_is_refused_while_the_other_is_connected_and_admitted_when_it_is_not() {
        let now = Timestamp::UNIX_EPOCH;
        let sessions = Sessions::new(now);
        let (sender, _receiver) = mpsc::channel(1);
        let begin = |incarnation: u64, boot: &str| {
            let hello = Hello {
                incarnation,
                boot_id: boot.to_owned(),
                ..hello()
            };
            sessions.begin(&peer(), &hello, &Value::Null, sender.clone(), now)
        };
        begin(1, "a").unwrap();
        let kept = begin(2, "b").unwrap();
        let refused = begin(1, "a").map(|s| s.id).unwrap_err();
        assert!(refused.refused && !kept.over.is_cancelled());
        assert!(refused.goodbye().reason.contains("skerry-edge join"));
        assert_eq!(sessions.watch(&site()).borrow().conflict, Some(refused));
        sessions.end(&kept, now);
        let admitted = begin(1, "a").unwrap();
        let conflict = sessions.watch(&site()).borrow().conflict.clone();
        assert!(conflict.is_some_and(|conflict| !conflict.refused));
        assert!(begin(2, "b").is_err() && !admitted.over.is_cancelled());
    }

    #[test]
    fn a_provider_without_memory_judges_by_the_sites_status() {
        let now = Timestamp::UNIX_EPOCH;
        let sessions = Sessions::new(now);
        let (sender, _receiver) = mpsc::channel(1);
        let hello = Hello {
            incarnation: 3,
            boot_id: "a".to_owned(),
            ..hello()
        };
        let status = serde_json::json!({"storeID": "s", "incarnation": 4, "bootID": "b"});
        sessions.begin(&peer(), &hello, &status, sender, now).unwrap();
        assert!(sessions.watch(&site()).borrow().conflict.is_some());
    }

    #[test]
    fn tokens_are_remembered_for_the_same_store_and_not_by_a_fenced_session() {
        let now = Timestamp::UNIX_EPOCH;
        let sessions = Sessions::new(now);
        let (sender, _receiver) = mpsc::channel(1);
        let begin = |store: &str| {
            let hello = Hello {
                store_id: store.to_owned(),
                ..Default::default()
            };
            sessions
                .begin(&peer(), &hello, &Value::Null, sender.clone(), now)
                .unwrap()
        };
        let key = skerry_proto::object::ObjectKey {
            kind: skerry_proto::link::Kind::ServiceAccountToken,
            uid: Uid::from("u/v/p"),
        };
        let entry = skerry_proto::digest::Entry {
            hash: skerry_proto::object::ContentHash([1; 16]),
            expires_unix: 1,
        };
        let tokens = Tokens::from([(key, entry)]);
        let first = begin("s");
        sessions.remember(&first, tokens.clone());
        let second = begin("s");
        assert_eq!(sessions.recall(&second), tokens);
        sessions.remember(&first, Tokens::new());
        assert_eq!(sessions.recall(&second), tokens);
        assert!(sessions.recall(&begin("t")).is_empty());
    }

    #[test]
    fn a_session_ends_when_its_site_is_declared_anew() {
        let now = Timestamp::UNIX_EPOCH;
        let sessions = Sessions::new(now);
        let (sender, _receiver) = mpsc::channel(1);
        let session = sessions
            .begin(&peer(), &hello(), &Value::Null, sender, now)
            .unwrap();
        sessions.dismiss_earlier(&site(), &peer().uid);
        assert!(!session.over.is_cancelled());
        sessions.dismiss_earlier(&site(), &Uid::from("second".to_owned()));
        assert!(session.over.is_cancelled());
    }

    #[test]
    fn an_order_for_a_site_that_is_away_is_refused() {
        let sessions = Sessions::new(Timestamp::UNIX_EPOCH);
        assert!(sessions.send(&site(), OpenTunnel::default()).is_err());
    }
}
