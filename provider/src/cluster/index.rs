//! Which objects concern which, by a key of the concern.

use std::collections::{BTreeSet, HashMap};
use std::hash::Hash;

use skerry_proto::object::Uid;

/// UIDs by key. Keys without UIDs do not stay.
pub(super) struct Index<K>(HashMap<K, BTreeSet<Uid>>);

impl<K> Default for Index<K> {
    fn default() -> Self {
        Self(HashMap::new())
    }
}

impl<K: Hash + Eq> Index<K> {
    pub(super) fn insert(&mut self, key: K, uid: &Uid) {
        self.0.entry(key).or_default().insert(uid.clone());
    }

    pub(super) fn remove(&mut self, key: &K, uid: &Uid) {
        if let Some(uids) = self.0.get_mut(key) {
            uids.remove(uid);
            if uids.is_empty() {
                self.0.remove(key);
            }
        }
    }

    /// The UIDs of a key, in order.
    pub(super) fn of<Q>(&self, key: &Q) -> impl Iterator<Item = &Uid>
    where
        K: std::borrow::Borrow<Q>,
        Q: Hash + Eq + ?Sized,
    {
        self.0.get(key).into_iter().flatten()
    }
}
