//! The connections of one session.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use skerry_proto::Class;

use crate::{Handle, Lane, LifeSigns};

/// The connections of one session, to be changed and asked together. Clones share them.
#[derive(Clone, Default)]
pub struct Lines(Arc<Mutex<Vec<(Lane, Handle)>>>);

impl Lines {
    /// Adds a connection and makes it what its lane and the class ask for.
    pub fn add(&self, lane: Lane, handle: Handle, class: Class, signs: LifeSigns) {
        handle.set(lane, class, signs);
        self.each(|all| all.push((lane, handle)));
    }

    /// The class has changed.
    pub fn set(&self, class: Class, signs: LifeSigns) {
        self.each(|all| {
            for (lane, handle) in all.iter() {
                handle.set(*lane, class, signs);
            }
        });
    }

    /// Bytes read and written so far by all of them.
    pub fn bytes(&self) -> (u64, u64) {
        self.each(|all| {
            all.iter().fold((0, 0), |(read, written), (_, handle)| {
                let (r, w) = handle.bytes();
                (read + r, written + w)
            })
        })
    }

    /// Since how long bulk has had more to write than the line took.
    pub fn held_back(&self) -> Duration {
        self.each(|all| {
            let bulk = all.iter().filter(|(lane, _)| *lane == Lane::Bulk);
            bulk.map(|(_, handle)| handle.held_back())
                .max()
                .unwrap_or_default()
        })
    }

    fn each<T>(&self, act: impl FnOnce(&mut Vec<(Lane, Handle)>) -> T) -> T {
        act(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}
