//! When each image was first seen and last needed. Kept on disk: a restart must not make all images equally old.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::runtime::Image;

/// Every image that the runtime has, by id.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Book {
    images: BTreeMap<String, Entry>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Entry {
    first_seen: Timestamp,
    need: Need,
}

/// Whether something needs an image.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
enum Need {
    /// A pod, a container or the runtime does.
    Now,
    /// Nothing does any more, since about then.
    Until(Timestamp),
    /// Nothing ever did.
    Never,
}

/// An image that may go.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Candidate {
    pub(super) id: String,
    pub(super) size_bytes: u64,
    /// When it was last needed; `None` if never.
    pub(super) last_used: Option<Timestamp>,
}

impl Book {
    /// Notes what is there and which of it is needed; answers whether the book has changed.
    pub(super) fn note(&mut self, there: &[Image], needed: &BTreeSet<String>, now: Timestamp) -> bool {
        let before = self.images.len();
        let ids: BTreeSet<&str> = there.iter().map(|image| image.id.as_str()).collect();
        self.images.retain(|id, _| ids.contains(id.as_str()));
        let mut changed = self.images.len() != before;
        for id in ids {
            let entry = self.images.entry(id.to_owned()).or_insert_with(|| {
                changed = true;
                Entry {
                    first_seen: now,
                    need: Need::Never,
                }
            });
            let need = match (&entry.need, needed.contains(id)) {
                (_, true) => Need::Now,
                (Need::Now, false) => Need::Until(now),
                (other, false) => other.clone(),
            };
            changed |= entry.need != need;
            entry.need = need;
        }
        changed
    }

    /// The images that nothing needs and that are older than `min_age`, the least recently used first.
    pub(super) fn candidates(&self, there: &[Image], min_age: Duration, now: Timestamp) -> Vec<Candidate> {
        let mut found: Vec<(Timestamp, Candidate)> = there
            .iter()
            .filter_map(|image| {
                let entry = self.images.get(&image.id)?;
                let last_used = match entry.need {
                    Need::Now => return None,
                    Need::Until(time) => Some(time),
                    Need::Never => None,
                };
                // A clock that was set back makes nothing old.
                let age = Duration::try_from(now.duration_since(entry.first_seen)).unwrap_or_default();
                let candidate = Candidate {
                    id: image.id.clone(),
                    size_bytes: image.size_bytes,
                    last_used,
                };
                (age >= min_age).then_some((entry.first_seen, candidate))
            })
            .collect();
        found.sort_by(|(a_seen, a), (b_seen, b)| {
            (a.last_used, a_seen, &a.id).cmp(&(b.last_used, b_seen, &b.id))
        });
        found.dedup_by(|(_, a), (_, b)| a.id == b.id);
        found.into_iter().map(|(_, candidate)| candidate).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(1_700_000_000 + second).unwrap()
    }

    fn image(id: &str) -> Image {
        Image {
            id: id.into(),
            tags: vec![],
            digests: vec![],
            size_bytes: 10,
            uid: None,
            username: String::new(),
        }
    }

    fn set(ids: &[&str]) -> BTreeSet<String> {
        ids.iter().map(|id| (*id).to_owned()).collect()
    }

    fn ids(candidates: &[Candidate]) -> Vec<&str> {
        candidates.iter().map(|c| c.id.as_str()).collect()
    }

    #[test]
    fn the_least_recently_used_comes_first_and_what_is_needed_never() {
        let there = ["a", "b", "c", "d"].map(image);
        let mut book = Book::default();
        assert!(book.note(&there, &set(&["a", "b", "d"]), at(0)));
        assert!(!book.note(&there, &set(&["a", "b", "d"]), at(10)), "nothing new");
        assert!(book.note(&there, &set(&["b", "d"]), at(20)));
        assert!(book.note(&there, &set(&["d"]), at(30)));
        let found = book.candidates(&there, Duration::ZERO, at(40));
        assert_eq!(ids(&found), ["c", "a", "b"]);
        assert_eq!(found[1].last_used, Some(at(20)));
    }

    #[test]
    fn a_young_image_stays_also_when_the_clock_was_set_back() {
        let there = [image("a")];
        let mut book = Book::default();
        book.note(&there, &set(&[]), at(0));
        let age = Duration::from_secs(120);
        assert!(book.candidates(&there, age, at(119)).is_empty());
        assert!(book.candidates(&there, age, at(-9999)).is_empty());
        assert_eq!(ids(&book.candidates(&there, age, at(120))), ["a"]);
    }

    #[test]
    fn an_image_that_went_and_came_back_is_new() {
        let mut book = Book::default();
        book.note(&[image("a")], &set(&[]), at(0));
        assert!(book.note(&[], &set(&[]), at(100)));
        book.note(&[image("a")], &set(&[]), at(200));
        assert!(
            book.candidates(&[image("a")], Duration::from_secs(120), at(300))
                .is_empty()
        );
    }
}
