//! A Site's status: what is written of it, and when.

use std::collections::BTreeMap;
use std::time::Duration;

use jiff::Timestamp;
use kube::Client;
use serde_json::{Map, Value, json};
use skerry_proto::link::{EventReport, heartbeat};
use skerry_proto::{Class, SiteName};
use tokio::time::Instant;

use super::conditions::{self, Condition};
use super::writes::version;
use crate::cluster::Object;
use crate::link::sessions::LinkState;
use crate::pods::events;
use crate::sites;

/// Changes that do not matter at once, such as the count of pods, are written together, this long after the last write.
const TOGETHER: Duration = Duration::from_secs(5);

/// What the keeper of a Site remembers of its writes.
#[derive(Default)]
pub(super) struct SiteStatus {
    written: Option<Written>,
}

struct Written {
    at: Instant,
    version: u64,
    status: Value,
}

/// What a look at a Site's status came to.
#[derive(Debug, PartialEq)]
enum Look {
    /// It says what it should.
    Same,
    /// Something is to be written now, and what has become worse is to be said.
    Write(Map<String, Value>, Vec<Condition>),
    /// Something is to be written, but not before then.
    Later(Instant),
}

impl SiteStatus {
    /// Brings the status up to date; answers when to look again, if something waits.
    pub(super) async fn write(
        &mut self,
        client: &Client,
        name: &SiteName,
        site: &Object,
        facts: &Facts<'_>,
    ) -> Result<Option<Instant>, kube::Error> {
        let (status, warnings) = match self.look(site, facts, Timestamp::now(), Instant::now()) {
            Look::Same => return Ok(None),
            Look::Later(at) => return Ok(Some(at)),
            Look::Write(status, warnings) => (status, warnings),
        };
        let answer = sites::patch_status(client, name, Value::Object(status)).await?;
        self.written = answer.map(|answer| Written {
            at: Instant::now(),
            version: version(answer.metadata.resource_version.as_deref()),
            status: answer.data.get("status").cloned().unwrap_or_default(),
        });
        for warning in warnings {
            warn(client, name, site, warning).await;
        }
        Ok(None)
    }

    fn look(&self, site: &Object, facts: &Facts<'_>, now: Timestamp, instant: Instant) -> Look {
        let mirrored = version(site.value["metadata"]["resourceVersion"].as_str());
        // The watch may not show our own last write yet.
        let current = match &self.written {
            Some(written) if written.version > mirrored => &written.status,
            _ => &site.value["status"],
        };
        let mut status = facts.differences(current);
        let news = conditions::news(&current["conditions"], facts.link, facts.away, now);
        let (list, warnings) = news.map_or((None, Vec::new()), |news| (Some(news.list), news.warnings));
        status.extend(list.map(|list| ("conditions".to_owned(), list)));
        let written = current["lastSeen"]
            .as_str()
            .and_then(|t| t.parse::<Timestamp>().ok());
        let age = written.map(|time| Duration::try_from(now.duration_since(time)).unwrap_or_default());
        let stale = facts.link.online && age.is_none_or(|age| age >= facts.last_seen);
        if status.is_empty() && !stale {
            return Look::Same;
        }
        let urgent = stale
            || status
                .keys()
                .any(|field| !matches!(field.as_str(), "pods" | "drops"));
        let free = self.written.as_ref().map(|written| written.at + TOGETHER);
        if let Some(free) = free.filter(|free| !urgent && *free > instant) {
            return Look::Later(free);
        }
        if let Some(heard) = facts.link.last_heard {
            let text = heard.strftime("%Y-%m-%dT%H:%M:%SZ").to_string();
            status.insert("lastSeen".to_owned(), Value::from(text));
            status.insert("link".to_owned(), link_use(facts.link));
            conditions::beside(facts.link, &mut status);
        }
        if status.is_empty() {
            Look::Same
        } else {
            Look::Write(status, warnings)
        }
    }
}

/// An event about the Site. One that cannot be had is no reason to write the status again.
async fn warn(client: &Client, name: &SiteName, site: &Object, warning: Condition) {
    let nanos = i64::try_from(Timestamp::now().as_nanosecond()).unwrap_or_default();
    let kind = sites::resource();
    let event = EventReport {
        kind: kind.kind,
        api_version: kind.api_version,
        name: site.name.clone(),
        uid: site.key.uid.to_string(),
        r#type: "Warning".to_owned(),
        reason: match warning.status {
            "False" => warning.reason.to_owned(),
            _ => warning.kind.to_owned(),
        },
        message: warning.message,
        count: 1,
        first_unix_nanos: nanos,
        last_unix_nanos: nanos,
        ..EventReport::default()
    };
    let outcome = events::write(client, name, &event).await;
    tracing::debug!(site = %name, reason = event.reason, ?outcome, "an event about the Site");
}

/// What a Site's status shall say.
pub(super) struct Facts<'a> {
    /// Its link.
    pub(super) link: &'a LinkState,
    /// Its class.
    pub(super) class: Class,
    /// How many pods are bound to it.
    pub(super) pods: usize,
    /// It was silent for longer than its deadline.
    pub(super) away: bool,
    /// How old `lastSeen` may become.
    pub(super) last_seen: Duration,
}

impl Facts<'_> {
    fn differences(&self, current: &Value) -> Map<String, Value> {
        let mut status = Map::new();
        let mut set = |field: &str, value: Value| {
            if current.get(field) != Some(&value) {
                status.insert(field.to_owned(), value);
            }
        };
        set(
            "state",
            Value::from(if self.link.online { "Online" } else { "Offline" }),
        );
        set("pods", Value::from(self.pods));
        set("class", Value::from(self.class.as_str()));
        if !self.link.version.is_empty() {
            set("version", Value::from(self.link.version.clone()));
            set("bootID", Value::from(self.link.boot_id.clone()));
            set("storeID", Value::from(self.link.store_id.clone()));
            set("incarnation", Value::from(self.link.incarnation));
        }
        if !self.link.drops.is_empty() {
            set("drops", drops(&self.link.drops));
        }
        // The use alone travels with `lastSeen`.
        let link = link_use(self.link);
        if link["deferring"] != current["link"]["deferring"] {
            status.insert("link".to_owned(), link);
        }
        status
    }
}

/// What the link costs, and whether it rests.
fn link_use(link: &LinkState) -> Value {
    json!({
        "usedToday": link.used_today,
        "deferring": match link.deferring {
            heartbeat::Deferring::Not => Value::Null,
            heartbeat::Deferring::Budget => "Budget".into(),
            heartbeat::Deferring::QuietHours => "QuietHours".into(),
        },
    })
}

/// Dropped reports, by lane.
fn drops(drops: &BTreeMap<(String, String), u64>) -> Value {
    let line = |((lane, reason), count): (&(String, String), &u64)| json!({"lane": lane, "reason": reason, "count": count});
    Value::from(drops.iter().map(line).collect::<Vec<_>>())
}

#[cfg(test)]
mod tests {
    use skerry_proto::link::Kind;

    use super::*;

    const NOW: &str = "2026-01-01T00:10:00Z";

    fn site(version: &str, status: Value) -> Object {
        let value = json!({"metadata": {"name": "harbour", "uid": "u", "resourceVersion": version}, "status": status});
        Object::new(Kind::Site, value).unwrap()
    }

    fn online() -> LinkState {
        LinkState {
            used_today: 0,
            deferring: heartbeat::Deferring::Not,
            online: true,
            since: Timestamp::UNIX_EPOCH,
            last_heard: Some(NOW.parse().unwrap()),
            version: "1".to_owned(),
            boot_id: "b".to_owned(),
            drops: BTreeMap::new(),
            store_id: "s".to_owned(),
            incarnation: 1,
            proof: crate::link::sync::Proof::Open,
            proven: None,
            conflict: None,
        }
    }

    fn told(pods: usize) -> Value {
        json!({"state": "Online", "class": "standard", "pods": pods, "version": "1", "bootID": "b", "storeID": "s", "incarnation": 1,
            "conditions": [{"type": "Synced", "status": "Unknown", "reason": "Syncing",
                "message": "the site has not confirmed yet that it holds what it should", "lastTransitionTime": "2026-01-01T00:00:00Z"}],
            "lastSeen": "2026-01-01T00:09:30Z"})
    }

    fn look(status: &SiteStatus, site: &Object, link: &LinkState, pods: usize) -> Look {
        let facts = Facts {
            class: Class::Standard,
            link,
            pods,
            away: false,
            last_seen: Duration::from_secs(60),
        };
        status.look(site, &facts, NOW.parse().unwrap(), Instant::now())
    }

    #[tokio::test(start_paused = true)]
    async fn the_count_of_pods_waits_for_the_next_write_and_a_change_of_state_does_not() {
        let status = SiteStatus {
            written: Some(Written {
                at: Instant::now(),
                version: 7,
                status: told(1),
            }),
        };
        // The mirror still shows what was before our own write.
        let shown = site("6", told(0));
        assert_eq!(look(&status, &shown, &online(), 1), Look::Same);
        assert_eq!(
            look(&status, &shown, &online(), 2),
            Look::Later(Instant::now() + TOGETHER)
        );
        let mut offline = online();
        offline.online = false;
        let Look::Write(fields, _) = look(&status, &shown, &offline, 2) else {
            panic!("nothing is written")
        };
        assert_eq!(fields["state"], "Offline");
        assert_eq!(fields["pods"], 2);
        tokio::time::advance(TOGETHER).await;
        let Look::Write(fields, _) = look(&status, &shown, &online(), 2) else {
            panic!("nothing is written")
        };
        let names: Vec<&str> = fields.keys().map(String::as_str).collect();
        assert_eq!(names, ["lastSeen", "link", "pods"]);
    }

    #[tokio::test]
    async fn a_link_that_begins_to_rest_is_told_at_once_and_its_mere_use_is_not() {
        let status = SiteStatus::default();
        let mut link = online();
        link.used_today = 7;
        assert_eq!(look(&status, &site("1", told(1)), &link, 1), Look::Same);
        link.deferring = heartbeat::Deferring::QuietHours;
        let Look::Write(fields, _) = look(&status, &site("1", told(1)), &link, 1) else {
            panic!("nothing is written")
        };
        assert_eq!(fields["link"], json!({"usedToday": 7, "deferring": "QuietHours"}));
    }

    #[tokio::test]
    async fn last_seen_is_written_when_it_is_old_or_something_else_is_written() {
        let mut old = told(1);
        let status = SiteStatus::default();
        assert_eq!(look(&status, &site("1", old.clone()), &online(), 1), Look::Same);
        old["lastSeen"] = Value::from("2026-01-01T00:08:59Z");
        let Look::Write(fields, _) = look(&status, &site("1", old), &online(), 1) else {
            panic!("nothing is written")
        };
        assert_eq!(
            Value::Object(fields),
            json!({"lastSeen": NOW, "link": {"usedToday": 0, "deferring": null}})
        );
    }
}
