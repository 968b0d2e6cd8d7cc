//! Who has been here under one identity: telling a disk that exists twice from a machine that was started again.
//!
//! A daemon's life on a machine is named by its store, its incarnation (the store counts its daemons), the boot of the
//! machine, and an id of its own. Lives follow each other; boot ids never come again and incarnations only rise. A life that lies before one
//! that was seen proves that the identity is used twice, or that its store was put back from an older copy.

use std::collections::VecDeque;
use std::fmt;

use serde_json::Value;
use skerry_proto::link::Hello;

/// Lives that are remembered of a site.
const MOST: usize = 16;

/// One daemon on one store on one boot of a machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Life {
    /// The store's id.
    pub store: String,
    /// Which daemon on that store it is; 0: an edge that does not count.
    pub incarnation: u64,
    /// The machine's boot id.
    pub boot: String,
    /// The daemon's own id; empty where it is not known.
    pub instance: String,
}

impl Life {
    /// The same daemon, as far as is known.
    fn is(&self, other: &Self) -> bool {
        let same = |a: &str, b: &str| a == b || a.is_empty() || b.is_empty();
        self.store == other.store
            && self.incarnation == other.incarnation
            && self.boot == other.boot
            && same(&self.instance, &other.instance)
    }
}

impl From<&Hello> for Life {
    fn from(hello: &Hello) -> Self {
        Self {
            store: hello.store_id.clone(),
            incarnation: hello.incarnation,
            boot: hello.boot_id.clone(),
            instance: hello.instance.clone(),
        }
    }
}

/// What proves that an identity is used twice.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Evidence {
    /// A store came back after another was used in its place.
    Store,
    /// A store came with a lower number than before, or with the same one from another daemon.
    Incarnation,
    /// A boot of the machine came back after a later one.
    Boot,
}

impl fmt::Display for Evidence {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Store => "a store came back after another one had taken its place",
            Self::Incarnation => "a store came back older than it was",
            Self::Boot => "a machine came back that another one had followed",
        })
    }
}

/// How a life relates to those before it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It is the last one, connecting again.
    Same,
    /// It follows the last one.
    Successor,
    /// It lies before one that was seen.
    Conflict(Evidence),
}

/// The lives of one site, oldest first.
#[derive(Clone, Debug, Default)]
pub struct Lives(VecDeque<Life>);

impl Lives {
    /// What a Site's status tells of the last one, for a provider that has no memory of its own.
    pub fn of_status(status: &Value) -> Self {
        let text = |field: &str| status[field].as_str().map(str::to_owned);
        let life = text("storeID").zip(text("bootID")).map(|(store, boot)| Life {
            store,
            incarnation: status["incarnation"].as_u64().unwrap_or(0),
            boot,
            instance: String::new(),
        });
        Self(life.into_iter().collect())
    }

    /// Nobody has been here.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// How a life that wants to begin relates to these.
    pub fn judge(&self, life: &Life) -> Verdict {
        let Some(last) = self.0.back() else {
            return Verdict::Successor;
        };
        if life.is(last) {
            return Verdict::Same;
        }
        let of_store = || self.0.iter().rev().filter(|other| other.store == life.store);
        let Some(before) = of_store().next() else {
            return Verdict::Successor;
        };
        if last.store != life.store {
            return Verdict::Conflict(Evidence::Store);
        }
        let counted = of_store()
            .map(|other| other.incarnation)
            .find(|number| *number > 0);
        if let Some(counted) = counted
            && life.incarnation > 0
            && life.incarnation <= counted
        {
            return Verdict::Conflict(Evidence::Incarnation);
        }
        if life.boot != before.boot && of_store().any(|other| other.boot == life.boot) {
            return Verdict::Conflict(Evidence::Boot);
        }
        Verdict::Successor
    }

    /// A life has begun.
    pub fn begin(&mut self, life: Life) {
        if let Some(last) = self.0.back_mut()
            && last.is(&life)
        {
            *last = life;
            return;
        }
        self.0.push_back(life);
        while self.0.len() > MOST {
            self.0.pop_front();
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn life(store: &str, incarnation: u64, boot: &str) -> Life {
        Life {
            store: store.to_owned(),
            incarnation,
            boot: boot.to_owned(),
            instance: String::new(),
        }
    }

    fn judged(lives: &[(&str, u64, &str)]) -> Verdict {
        let mut seen = Lives::default();
        let mut verdict = Verdict::Same;
        for (store, incarnation, boot) in lives {
            let next = life(store, *incarnation, boot);
            verdict = seen.judge(&next);
            seen.begin(next);
        }
        verdict
    }

    #[test]
    fn restarts_reboots_and_a_new_store_follow_each_other() {
        assert_eq!(judged(&[("s", 1, "a")]), Verdict::Successor);
        assert_eq!(judged(&[("s", 1, "a"), ("s", 1, "a")]), Verdict::Same);
        assert_eq!(judged(&[("s", 1, "a"), ("s", 2, "a")]), Verdict::Successor);
        assert_eq!(judged(&[("s", 1, "a"), ("s", 2, "b")]), Verdict::Successor);
        assert_eq!(judged(&[("s", 9, "a"), ("t", 1, "a")]), Verdict::Successor);
        // An edge that does not count, and one that begins to.
        assert_eq!(
            judged(&[("s", 0, "a"), ("s", 0, "b"), ("s", 1, "b")]),
            Verdict::Successor
        );
        assert_eq!(
            judged(&[("s", 3, "a"), ("s", 0, "a"), ("s", 4, "a")]),
            Verdict::Successor
        );
    }

    #[test]
    fn a_life_before_one_that_was_seen_proves_two() {
        use Evidence::{Boot, Incarnation, Store};
        for (lives, evidence) in [
            (&[("s", 1, "a"), ("s", 2, "b"), ("s", 1, "a")][..], Incarnation),
            (&[("s", 2, "a"), ("s", 2, "b")], Incarnation),
            (&[("s", 0, "a"), ("s", 0, "b"), ("s", 0, "a")], Boot),
            (&[("s", 1, "a"), ("s", 2, "b"), ("s", 3, "a")], Boot),
            (&[("s", 1, "a"), ("t", 1, "b"), ("s", 1, "a")], Store),
            (&[("s", 1, "a"), ("t", 1, "b"), ("s", 2, "c")], Store),
        ] {
            assert_eq!(judged(lives), Verdict::Conflict(evidence), "{lives:?}");
        }
    }

    #[test]
    fn two_daemons_with_one_number_are_told_apart_on_one_boot() {
        let daemon = |instance: &str| Life {
            instance: instance.to_owned(),
            ..life("s", 2, "a")
        };
        let mut seen = Lives::default();
        seen.begin(life("s", 2, "a"));
        // The first is the one that the Site's status tells of, as far as is known.
        assert_eq!(seen.judge(&daemon("x")), Verdict::Same);
        seen.begin(daemon("x"));
        assert_eq!(seen.judge(&daemon("x")), Verdict::Same);
        assert_eq!(seen.judge(&daemon("y")), Verdict::Conflict(Evidence::Incarnation));
    }

    #[test]
    fn a_store_that_was_put_back_goes_on_from_there_once_it_was_admitted() {
        let lives = [("s", 7, "b"), ("s", 6, "c"), ("s", 7, "c")];
        assert_eq!(judged(&lives[..2]), Verdict::Conflict(Evidence::Incarnation));
        assert_eq!(judged(&lives), Verdict::Successor);
    }

    #[test]
    fn the_last_life_is_found_in_the_status() {
        let status = json!({"storeID": "s", "incarnation": 4, "bootID": "b"});
        let lives = Lives::of_status(&status);
        assert_eq!(lives.judge(&life("s", 4, "b")), Verdict::Same);
        assert_eq!(
            lives.judge(&life("s", 4, "a")),
            Verdict::Conflict(Evidence::Incarnation)
        );
        assert!(Lives::of_status(&json!({"bootID": "b"})).is_empty());
    }
}
