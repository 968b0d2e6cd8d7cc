//! Which sites are connected, and by which session.
//!
//! A site has at most one session. A new one fences the old: its token is cancelled before the new one is entered, and
//! whatever still runs for it may no longer write.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use jiff::Timestamp;
use skerry_proto::SiteName;
use skerry_proto::link::{
    self, CloudControl, Heartbeat, Hello, OpenTunnel, ReportDrops, cloud_control, heartbeat,
};
use skerry_proto::object::Uid;
use skerry_transport::Lines;
use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;

use super::reports::{Lanes, Reports};
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
}

impl Session {
    /// The lanes of its reports, from whichever stream they come.
    pub(super) fn lanes(&self, reports: &Arc<Reports>) -> &Lanes {
        self.lanes.get_or_init(|| Lanes::start(reports, self))
    }

    /// A session that nobody knows yet.
    pub(super) fn new(peer: &SitePeer) -> Self {
        Self {
            id: uuid::Uuid::new_v4().simple().to_string(),
            peer: peer.clone(),
            kept_by: Arc::new(Mutex::new(peer.clone())),
            over: CancellationToken::new(),
            begun: CancellationToken::new(),
            lines: Lines::default(),
            lanes: Arc::default(),
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
    store_id: String,
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
}

impl Sessions {
    /// An empty registry; `now` is the provider's start.
    pub fn new(now: Timestamp) -> Self {
        Self {
            inner: Arc::new(Inner {
                started: now,
                entries: Mutex::default(),
                states: Mutex::default(),
            }),
        }
    }

    /// Starts a session and ends the site's older one, if any.
    pub fn begin(
        &self,
        peer: &SitePeer,
        hello: &Hello,
        orders: mpsc::Sender<Result<CloudControl, tonic::Status>>,
        now: Timestamp,
    ) -> Session {
        let site = &peer.site;
        let session = Session::new(peer);
        let entry = Entry {
            session: session.clone(),
            orders,
            store_id: hello.store_id.clone(),
        };
        let older = self.entries().insert(site.clone(), entry);
        if let Some(older) = older {
            older.session.over.cancel();
            if older.store_id != hello.store_id {
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
            state.version.clone_from(&hello.version);
            state.boot_id.clone_from(&hello.boot_id);
        });
        session
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
        Sessions::new(Timestamp::UNIX_EPOCH).begin(&peer(), &hello(), orders, Timestamp::UNIX_EPOCH)
    }

    #[test]
    fn a_new_session_fences_the_old_and_the_late_end_of_the_old_changes_nothing() {
        let now = Timestamp::UNIX_EPOCH;
        let sessions = Sessions::new(now);
        let (sender, _receiver) = mpsc::channel(1);
        let old = sessions.begin(&peer(), &hello(), sender.clone(), now);
        let new = sessions.begin(&peer(), &hello(), sender, now);
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
        let session = sessions.begin(&peer(), &hello(), sender, now);
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
        let session = sessions.begin(&first, &hello(), sender, now);
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
    fn a_session_ends_when_its_site_is_declared_anew() {
        let now = Timestamp::UNIX_EPOCH;
        let sessions = Sessions::new(now);
        let (sender, _receiver) = mpsc::channel(1);
        let session = sessions.begin(&peer(), &hello(), sender, now);
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
