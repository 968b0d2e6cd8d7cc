//! The Site's conditions: what is known of its link beyond being up or down.
//!
//! `Synced`: the site holds exactly what it should. `IdentityConflict`: two machines use its identity. They are written
//! at transitions only. The list may hold conditions of others, which are kept.

use jiff::{SignedDuration, Timestamp};
use serde_json::{Map, Value, json};

use crate::link::sessions::LinkState;
use crate::link::sync::Proof;

/// The site holds what it should.
pub(super) const SYNCED: &str = "Synced";
/// Two machines use the site's identity.
pub(super) const IDENTITY_CONFLICT: &str = "IdentityConflict";

/// How long after the last sign of a conflict it is said to be over.
const CONFLICT_OVER: SignedDuration = SignedDuration::from_mins(5);
/// How long a session may take to agree before that is said: most take a second, and are not worth a write.
const AGREEING: SignedDuration = SignedDuration::from_secs(10);

/// A condition as it should be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Condition {
    pub(super) kind: &'static str,
    pub(super) status: &'static str,
    pub(super) reason: &'static str,
    pub(super) message: String,
}

/// What is to be written.
#[derive(Debug, PartialEq)]
pub(super) struct News {
    /// The whole new list.
    pub(super) list: Value,
    /// What has become worse and is worth an event.
    pub(super) warnings: Vec<Condition>,
}

/// Compares the Site's conditions with the state of its link; `None` when nothing is to be written.
pub(super) fn news(current: &Value, state: &LinkState, away: bool, now: Timestamp) -> Option<News> {
    let mut list = current.as_array().cloned().unwrap_or_default();
    let mut warnings = Vec::new();
    let mut changed = false;
    let wanted = [synced(state, away, now), conflict(state, &list, now)];
    for condition in wanted.into_iter().flatten() {
        let place = list.iter().position(|c| c["type"] == condition.kind);
        let old = place
            .and_then(|place| list.get(place))
            .cloned()
            .unwrap_or_default();
        let same_status = old["status"] == condition.status;
        if same_status && old["reason"] == condition.reason && old["message"] == condition.message.as_str() {
            continue;
        }
        changed = true;
        let since = match old["lastTransitionTime"].as_str() {
            Some(since) if same_status => since.to_owned(),
            _ => time(now),
        };
        let new = json!({
            "type": condition.kind, "status": condition.status, "reason": condition.reason,
            "message": condition.message, "lastTransitionTime": since,
        });
        match place.and_then(|place| list.get_mut(place)) {
            Some(old) => *old = new,
            None => list.push(new),
        }
        if !same_status && is_bad(&condition) {
            warnings.push(condition);
        }
    }
    changed.then_some(News {
        list: Value::Array(list),
        warnings,
    })
}

/// What the Site's status tells beside its conditions, to be written when something else is.
pub(super) fn beside(state: &LinkState, status: &mut Map<String, Value>) {
    if let Some(proven) = state.proven {
        status.insert("syncedAt".to_owned(), Value::from(time(proven)));
    }
}

fn is_bad(condition: &Condition) -> bool {
    match condition.kind {
        SYNCED => condition.status == "False",
        _ => condition.status == "True",
    }
}

fn synced(state: &LinkState, away: bool, now: Timestamp) -> Option<Condition> {
    let condition = |status, reason, message: &str| {
        Some(Condition {
            kind: SYNCED,
            status,
            reason,
            message: message.to_owned(),
        })
    };
    if !state.online {
        let message = "the site is away; what it holds is not known";
        return away
            .then(|| condition("Unknown", "EdgeDisconnected", message))
            .flatten();
    }
    match state.proof {
        Proof::Equal => condition("True", "Proven", "the site holds exactly what it should"),
        Proof::Different => condition(
            "False",
            "Diverged",
            "the site holds something else than it should; the difference is looked for and sent again",
        ),
        Proof::Unsupported => condition(
            "Unknown",
            "NotSupported",
            "the site's edge daemon does not tell a digest of what it holds; upgrade it",
        ),
        Proof::Open if now.duration_since(state.since) >= AGREEING => condition(
            "Unknown",
            "Syncing",
            "the site has not confirmed yet that it holds what it should",
        ),
        Proof::Open => None,
    }
}

fn conflict(state: &LinkState, list: &[Value], now: Timestamp) -> Option<Condition> {
    let recent = state
        .conflict
        .as_ref()
        .filter(|conflict| now.duration_since(conflict.at) < CONFLICT_OVER);
    if let Some(conflict) = recent {
        return Some(Condition {
            kind: IDENTITY_CONFLICT,
            status: "True",
            reason: "UsedTwice",
            message: conflict.to_string(),
        });
    }
    let said = list.iter().any(|c| c["type"] == IDENTITY_CONFLICT);
    said.then(|| Condition {
        kind: IDENTITY_CONFLICT,
        status: "False",
        reason: "UsedOnce",
        message: "one daemon uses the site's identity".to_owned(),
    })
}

fn time(at: Timestamp) -> String {
    at.strftime("%Y-%m-%dT%H:%M:%SZ").to_string()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::link::lives::Evidence;
    use crate::link::sessions::{Conflict, Sessions};

    fn state(proof: Proof) -> LinkState {
        let fresh = Sessions::new(Timestamp::UNIX_EPOCH)
            .watch(&"harbour".parse().unwrap())
            .borrow()
            .clone();
        LinkState {
            online: true,
            proof,
            ..fresh
        }
    }

    fn later(seconds: i64) -> Timestamp {
        Timestamp::UNIX_EPOCH + SignedDuration::from_secs(seconds)
    }

    #[test]
    fn a_proof_is_written_once_and_its_time_of_transition_stays() {
        let first = news(&Value::Null, &state(Proof::Equal), false, later(5)).unwrap();
        assert_eq!(first.list[0]["status"], "True");
        assert_eq!(first.list[0]["lastTransitionTime"], "1970-01-01T00:00:05Z");
        assert!(first.warnings.is_empty());
        assert_eq!(news(&first.list, &state(Proof::Equal), false, later(99)), None);
        let diverged = news(&first.list, &state(Proof::Different), false, later(99)).unwrap();
        assert_eq!(diverged.list[0]["lastTransitionTime"], "1970-01-01T00:01:39Z");
        assert_eq!(diverged.warnings.len(), 1);
    }

    #[test]
    fn a_session_that_agrees_at_once_writes_nothing_before_it_does() {
        assert_eq!(news(&Value::Null, &state(Proof::Open), false, later(9)), None);
        let slow = news(&Value::Null, &state(Proof::Open), false, later(10)).unwrap();
        assert_eq!(slow.list[0]["reason"], "Syncing");
    }

    #[test]
    fn a_site_that_is_away_is_unknown_but_not_before_its_deadline() {
        let gone = LinkState {
            online: false,
            ..state(Proof::Open)
        };
        assert_eq!(news(&Value::Null, &gone, false, later(100)), None);
        let away = news(&Value::Null, &gone, true, later(100)).unwrap();
        assert_eq!(away.list[0]["status"], "Unknown");
    }

    #[test]
    fn a_conflict_warns_ends_and_leaves_the_conditions_of_others() {
        let others = json!([{"type": "Foreign", "status": "True"}]);
        let conflict = Conflict {
            at: later(0),
            evidence: Evidence::Boot,
            refused: true,
        };
        let two = LinkState {
            conflict: Some(conflict),
            ..state(Proof::Open)
        };
        let said = news(&others, &two, false, later(5)).unwrap();
        assert_eq!(said.list[0], others[0]);
        assert_eq!(said.list[1]["status"], "True");
        assert_eq!(said.warnings[0].kind, IDENTITY_CONFLICT);
        let over = news(&said.list, &two, false, later(301)).unwrap();
        let conditions = over.list.as_array().unwrap();
        let after = conditions
            .iter()
            .find(|c| c["type"] == IDENTITY_CONFLICT)
            .unwrap();
        assert_eq!(after["status"], "False");
        assert!(over.warnings.is_empty());
    }
}
