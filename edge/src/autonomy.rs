//! How long the site has been without its cloud, and what its pods may do then.
//!
//! In: the link's state, the Site object in the store. Out: the time alone and the Site's policy, to the pods, which stop by it
//! (`pods::alone`). All of it works without the cloud.
//!
//! **Time alone** is counted by the machine's monotonic clock, which no setting of the wall clock moves, from the last moment
//! with a session, or from the first start of a site that never had one. It is kept in the store, and goes on from there after a restart of the daemon, the time in
//! between included (`CLOCK_BOOTTIME`), as long as the machine has not booted. A boot cannot tell how long the machine was off: that time does not count. So no clock, whatever it says,
//! stops a pod early.

use std::time::Duration;

use serde::{Deserialize, Serialize};
use serde_json::Value;
use skerry_proto::SiteName;
use skerry_proto::autonomy::Autonomy;
use skerry_proto::link::Kind;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::link::LinkStatus;
use crate::pods::Pods;
use crate::store::{Store, StoreError};

/// The room's name in the store, and its one key.
const ROOM: &str = "autonomy";
const KEY: &str = "alone";
/// How often the pods are looked at while the site is alone.
const LOOK: Duration = Duration::from_secs(1);
/// How often the time alone is stored: so much a power cut may add.
const SAVE: Duration = Duration::from_secs(60);

/// Time alone, as stored.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Stored {
    /// How much there was.
    alone_seconds: u64,
    /// In which boot of the machine that was noted.
    boot_id: String,
    /// When, by the clock of that boot.
    boot_seconds: u64,
}

/// Counts time alone.
struct Count {
    boot_id: String,
    /// What had come together before `since`.
    before: Duration,
    /// Reading of the boot's clock.
    since: Duration,
}

impl Count {
    /// Goes on from what was stored.
    fn resume(stored: Option<Stored>, boot_id: String, now: Duration) -> Self {
        let Some(stored) = stored else {
            return Self {
                boot_id,
                before: Duration::ZERO,
                since: now,
            };
        };
        // In the same boot the daemon's own absence counts.
        let same_boot = stored.boot_id == boot_id && !boot_id.is_empty();
        let noted = Duration::from_secs(stored.boot_seconds);
        let meanwhile = if same_boot {
            now.saturating_sub(noted)
        } else {
            Duration::ZERO
        };
        Self {
            boot_id,
            before: Duration::from_secs(stored.alone_seconds) + meanwhile,
            since: now,
        }
    }

    fn restart(&mut self, now: Duration) {
        self.before = Duration::ZERO;
        self.since = now;
    }

    fn alone(&self, now: Duration) -> Duration {
        self.before + now.saturating_sub(self.since)
    }

    fn stored(&self, now: Duration) -> Stored {
        Stored {
            alone_seconds: self.alone(now).as_secs(),
            boot_id: self.boot_id.clone(),
            boot_seconds: now.as_secs(),
        }
    }
}

/// The room, ready to run.
pub struct Watch {
    site: SiteName,
    store: Store,
    pods: Pods,
    count: Count,
}

impl Watch {
    /// Reads what is stored and tells the pods, before any of them starts.
    pub fn open(site: SiteName, store: Store, pods: Pods, boot_id: String) -> Result<Self, StoreError> {
        let stored = store.state_get::<Stored>(ROOM, KEY).unwrap_or_else(|error| {
            tracing::error!(%error, "the time without the cloud cannot be read; it is counted anew");
            None
        });
        let count = Count::resume(stored, boot_id, since_boot());
        let this = Self {
            site,
            store,
            pods,
            count,
        };
        this.tell();
        Ok(this)
    }

    /// Counts, and tells the pods, until `stop`.
    pub async fn run(mut self, mut link: watch::Receiver<LinkStatus>, stop: CancellationToken) {
        let mut changes = self.store.changes();
        let mut look = tokio::time::interval(LOOK);
        look.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut online = false;
        let mut saved = None;
        loop {
            tokio::select! {
                () = stop.cancelled() => break,
                changed = link.changed() => if changed.is_err() { break },
                // Missed notices mean to look, too.
                notice = changes.recv() => if notice.is_ok_and(|n| n.key.kind != Kind::Site) { continue },
                _ = look.tick(), if !online => {}
            }
            let was_online = std::mem::replace(&mut online, link.borrow_and_update().online);
            let now = since_boot();
            if online || was_online {
                self.count.restart(now);
            }
            self.tell();
            let due = saved.is_none_or(|at| now.saturating_sub(at) >= SAVE);
            if online != was_online || (!online && due) {
                saved = Some(now);
                self.save(now);
            }
        }
        // While a session is up nothing has come together.
        if online {
            self.count.restart(since_boot());
        }
        self.save(since_boot());
    }

    fn tell(&self) {
        let site = self.store.find(Kind::Site, "", self.site.as_str()).ok().flatten();
        let site = site
            .and_then(|object| object.decode::<Value>().ok())
            .unwrap_or_default();
        self.pods
            .set_alone(self.count.alone(since_boot()), Autonomy::of_site(&site));
    }

    fn save(&self, now: Duration) {
        let written = self.store.queue_state(ROOM, KEY, &self.count.stored(now));
        if let Err(error) = written {
            tracing::error!(%error, "the time without the cloud cannot be stored");
        }
    }
}

/// The machine's clock that runs from its boot, sleep included, and that nobody sets.
fn since_boot() -> Duration {
    match nix::time::clock_gettime(nix::time::ClockId::CLOCK_BOOTTIME) {
        Ok(time) => Duration::from(time),
        Err(_) => Duration::ZERO,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seconds(n: u64) -> Duration {
        Duration::from_secs(n)
    }

    #[test]
    fn a_restart_of_the_daemon_counts_and_the_time_switched_off_does_not() {
        let mut count = Count::resume(None, "one".to_owned(), seconds(100));
        assert_eq!(count.alone(seconds(160)), seconds(60));
        let stored = count.stored(seconds(160));
        let same = Count::resume(Some(stored.clone()), "one".to_owned(), seconds(200));
        assert_eq!(same.alone(seconds(210)), seconds(110));
        let other = Count::resume(Some(stored), "two".to_owned(), seconds(5));
        assert_eq!(other.alone(seconds(15)), seconds(70));
        count.restart(seconds(300));
        assert_eq!(count.alone(seconds(301)), seconds(1));
    }

    #[test]
    fn a_clock_that_goes_backwards_adds_nothing() {
        let stored = Stored {
            alone_seconds: 10,
            boot_id: "one".to_owned(),
            boot_seconds: 500,
        };
        let count = Count::resume(Some(stored), "one".to_owned(), seconds(400));
        assert_eq!(count.alone(seconds(300)), seconds(10));
    }
}
