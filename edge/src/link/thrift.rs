//! Links that cost money: a budget of bytes a day, and hours in which the link rests.
//!
//! In: `spec.link` of the Site, from the store; what the session's connections have carried. Out: whether what can wait must wait
//! ([`Deferring`]). What goes on in either case: heartbeats, orders, objects from the cloud, the Node's own status, and statuses of
//! critical pods. What waits: all other reports, in the outbox, where newer ones replace older ones; streams (logs, exec) of
//! pods that are not critical are refused, with the reason. What the container engine pulls is not the link's, and neither counted nor held back.
//!
//! A day is a day of UTC, and so are quiet hours. The count is kept in the store once a minute; what TCP and IP add is not in it.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use jiff::Timestamp;
use jiff::civil::{Date, Time};
use jiff::tz::TimeZone;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use skerry_proto::SiteName;
use skerry_proto::link::{Kind, heartbeat};
use tokio::time::Instant;

use crate::store::Store;

/// The room's name in the store, and its one key.
const ROOM: &str = "link";
const KEY: &str = "usage";
/// How often the count is stored.
const SAVE: Duration = Duration::from_secs(60);
/// How often the Site is read.
const READ: Duration = Duration::from_secs(5);

/// Why what can wait must wait.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Deferring {
    /// It need not.
    #[default]
    Not,
    /// The day's budget is used up.
    Budget,
    /// These are quiet hours.
    QuietHours,
}

impl Deferring {
    /// For people: why, and until when.
    pub(crate) fn reason(self) -> &'static str {
        match self {
            Self::Not => "nothing is deferred",
            Self::Budget => "the day's budget of the link is used up, until midnight UTC",
            Self::QuietHours => "these are quiet hours of the link",
        }
    }
}

impl From<Deferring> for heartbeat::Deferring {
    fn from(deferring: Deferring) -> Self {
        match deferring {
            Deferring::Not => Self::Not,
            Deferring::Budget => Self::Budget,
            Deferring::QuietHours => Self::QuietHours,
        }
    }
}

/// `spec.link` of a Site.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Profile {
    /// Bytes a day, both ways.
    daily_budget: Option<u64>,
    /// From, to; over midnight when the former is later.
    quiet: Vec<(Time, Time)>,
}

impl Profile {
    /// What the schema does not let through counts as absent.
    fn of_site(site: &Value) -> Self {
        let link = &site["spec"]["link"];
        let budget = link["dailyBudget"].as_str();
        let time = |value: &Value| {
            let (hours, minutes) = value.as_str()?.split_once(':')?;
            Time::new(hours.parse().ok()?, minutes.parse().ok()?, 0, 0).ok()
        };
        let quiet = link["quietHours"].as_array().into_iter().flatten();
        Self {
            daily_budget: budget
                .and_then(crate::pods::quantity_milli)
                .and_then(|milli| u64::try_from(milli / 1000).ok()),
            quiet: quiet
                .filter_map(|hours| Some((time(&hours["from"])?, time(&hours["to"])?)))
                .collect(),
        }
    }

    fn deferring(&self, used: u64, now: Time) -> Deferring {
        let within = |(from, to): &(Time, Time)| {
            if from <= to {
                (*from..*to).contains(&now)
            } else {
                now >= *from || now < *to
            }
        };
        if self.quiet.iter().any(within) {
            return Deferring::QuietHours;
        }
        match self.daily_budget {
            Some(budget) if used >= budget => Deferring::Budget,
            _ => Deferring::Not,
        }
    }
}

/// Bytes of one day.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Usage {
    day: Date,
    bytes: u64,
}

impl Usage {
    fn add(&mut self, bytes: u64, day: Date) {
        if self.day != day {
            *self = Self { day, bytes: 0 };
        }
        self.bytes += bytes;
    }
}

/// What the link may cost. Clones share the count.
#[derive(Clone)]
pub(super) struct Thrift {
    site: SiteName,
    store: Store,
    state: Arc<Mutex<State>>,
}

struct State {
    usage: Usage,
    /// What the session's connections had carried at the last look.
    counted: u64,
    profile: Profile,
    read: Option<Instant>,
    saved: Instant,
}

impl Thrift {
    pub(super) fn new(site: SiteName, store: Store) -> Self {
        let stored = store.state_get::<Usage>(ROOM, KEY).unwrap_or_else(|error| {
            tracing::error!(%error, "what the link has carried today cannot be read; it is counted anew");
            None
        });
        let state = State {
            usage: stored.unwrap_or(Usage {
                day: today(Timestamp::now()).0,
                bytes: 0,
            }),
            counted: 0,
            profile: Profile::default(),
            read: None,
            saved: Instant::now(),
        };
        Self {
            site,
            store,
            state: Arc::new(Mutex::new(state)),
        }
    }

    /// Bytes of today, both ways.
    pub(super) fn used_today(&self) -> u64 {
        self.state().usage.bytes
    }

    /// A new session: its connections have carried nothing yet.
    pub(super) fn begin(&self) {
        self.state().counted = 0;
    }

    /// Counts what the session's connections have carried in all; answers what must wait now.
    pub(super) fn look(&self, carried: u64) -> Deferring {
        let (day, time) = today(Timestamp::now());
        let now = Instant::now();
        let mut state = self.state();
        let news = carried.saturating_sub(state.counted);
        state.counted = carried;
        state.usage.add(news, day);
        if state.read.is_none_or(|at| now.duration_since(at) >= READ) {
            state.read = Some(now);
            let site = self.store.find(Kind::Site, "", self.site.as_str()).ok().flatten();
            let site = site.and_then(|object| object.decode::<Value>().ok());
            state.profile = Profile::of_site(&site.unwrap_or_default());
        }
        if now.duration_since(state.saved) >= SAVE {
            state.saved = now;
            if let Err(error) = self.store.queue_state(ROOM, KEY, &state.usage) {
                tracing::error!(%error, "what the link has carried today cannot be stored");
            }
        }
        state.profile.deferring(state.usage.bytes, time)
    }

    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn today(now: Timestamp) -> (Date, Time) {
    let now = now.to_zoned(TimeZone::UTC);
    (now.date(), now.time())
}

#[cfg(test)]
mod tests {
    use jiff::civil::{date, time};
    use serde_json::json;

    use super::*;

    #[test]
    fn quiet_hours_may_lie_over_midnight() {
        let site = json!({"spec": {"link": {"quietHours": [
            {"from": "22:00", "to": "06:30"}, {"from": "12:00", "to": "13:00"},
        ]}}});
        let profile = Profile::of_site(&site);
        for (hour, minute, quiet) in [
            (22, 0, true),
            (23, 59, true),
            (0, 0, true),
            (6, 29, true),
            (6, 30, false),
            (12, 59, true),
            (13, 0, false),
        ] {
            let found = profile.deferring(0, time(hour, minute, 0, 0)) == Deferring::QuietHours;
            assert_eq!(found, quiet, "{hour}:{minute}");
        }
    }

    #[test]
    fn a_budget_is_a_days() {
        let profile = Profile::of_site(&json!({"spec": {"link": {"dailyBudget": "2Mi"}}}));
        let noon = time(12, 0, 0, 0);
        let mut usage = Usage {
            day: date(2026, 1, 1),
            bytes: 0,
        };
        usage.add((2 << 20) - 1, date(2026, 1, 1));
        assert_eq!(profile.deferring(usage.bytes, noon), Deferring::Not);
        usage.add(1, date(2026, 1, 1));
        assert_eq!(profile.deferring(usage.bytes, noon), Deferring::Budget);
        usage.add(1, date(2026, 1, 2));
        assert_eq!(
            (usage.bytes, profile.deferring(usage.bytes, noon)),
            (1, Deferring::Not)
        );
    }

    #[test]
    fn a_site_without_a_profile_defers_nothing() {
        let profile = Profile::of_site(&json!({"spec": {}}));
        assert_eq!(profile.deferring(u64::MAX, time(0, 0, 0, 0)), Deferring::Not);
    }
}
