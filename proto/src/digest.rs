//! Digests of what a site holds.
//!
//! An entry is one object that the site holds: its kind, UID, content hash, and for tokens the time of expiry. The
//! digest of a set of entries is the sum of their 128-bit hashes modulo 2^128: the order does not matter, and an entry is
//! added or taken away without looking at the others. Entries fall into buckets by kind and UID alone, so that a changed
//! object stays in its bucket and shows which one to look into.
//!
//! A digest finds damage and mistakes; it is no protection against a peer, which is authenticated.

use sha2::{Digest as _, Sha256};

use crate::limits::MAX_BUCKETS;
use crate::link::{BucketSet, GroupDigest, Kind};
use crate::object::ContentHash;

/// Entries that one bucket may hold before more are made.
const ENTRIES_PER_BUCKET: u64 = 32;
/// Up to this many entries are told as one bucket.
const ONE_BUCKET: u64 = 64;

/// The two sets that are compared apart from each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Group {
    /// What the provider can compute from the cluster.
    Objects,
    /// ServiceAccount tokens.
    Tokens,
}

impl Group {
    /// Both.
    pub const ALL: [Self; 2] = [Self::Objects, Self::Tokens];

    /// The group of a kind, which may be one that this build does not know.
    pub fn of(kind: i32) -> Self {
        if kind == i32::from(Kind::ServiceAccountToken) {
            Self::Tokens
        } else {
            Self::Objects
        }
    }
}

/// What is told of one object that a site holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Hash as the provider sent it; zero for an object that the site cannot read, which no object has.
    pub hash: ContentHash,
    /// For tokens: seconds since the Unix epoch. 0 = never.
    pub expires_unix: i64,
}

/// The digest of a set of entries. The default is that of none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Sum(u128);

impl Sum {
    /// The digest of one entry alone.
    pub fn of(kind: i32, uid: &str, entry: &Entry) -> Self {
        let mut hasher = Sha256::new();
        hasher.update(kind.to_be_bytes());
        hasher.update(entry.hash.0);
        hasher.update(entry.expires_unix.to_be_bytes());
        hasher.update(uid.as_bytes());
        let mut bytes = [0; 16];
        bytes.copy_from_slice(&hasher.finalize()[..16]);
        Self(u128::from_be_bytes(bytes))
    }

    /// Takes entries in, that are told by their sum.
    pub fn add(&mut self, other: Self) {
        self.0 = self.0.wrapping_add(other.0);
    }

    /// Takes entries out.
    pub fn remove(&mut self, other: Self) {
        self.0 = self.0.wrapping_sub(other.0);
    }

    /// As it travels and is stored.
    pub fn to_bytes(self) -> [u8; 16] {
        self.0.to_be_bytes()
    }

    /// Reads one from the link; `None` when the length is wrong.
    pub fn from_slice(bytes: &[u8]) -> Option<Self> {
        bytes
            .try_into()
            .ok()
            .map(|bytes| Self(u128::from_be_bytes(bytes)))
    }

    #[allow(clippy::cast_possible_truncation)]
    fn short(self) -> u64 {
        (self.0 >> 64) as u64
    }
}

/// Into how many buckets that many entries are divided.
pub fn buckets_for(entries: u64) -> u32 {
    if entries <= ONE_BUCKET {
        return 1;
    }
    let wanted = (entries / ENTRIES_PER_BUCKET).next_power_of_two();
    u32::try_from(wanted).map_or(MAX_BUCKETS, |wanted| wanted.min(MAX_BUCKETS))
}

/// The bucket of an object among `of`.
///
/// FNV-1a over kind and UID, folded: fixed for ever, since both sides must agree.
pub fn bucket(kind: i32, uid: &str, of: u32) -> u32 {
    let mut hash = 0xcbf2_9ce4_8422_2325_u64;
    for byte in kind.to_be_bytes().iter().chain(uid.as_bytes()) {
        hash = (hash ^ u64::from(*byte)).wrapping_mul(0x0000_0100_0000_01b3);
    }
    let folded = (hash >> 32) ^ (hash & 0xffff_ffff);
    u32::try_from(folded % u64::from(of.max(1))).unwrap_or(0)
}

/// A group's digest under construction: entry by entry, in any order.
#[derive(Clone, Debug)]
pub struct Buckets {
    count: u64,
    sum: Sum,
    buckets: Vec<Sum>,
}

impl Buckets {
    /// No entries in that many buckets, at least one and at most [`MAX_BUCKETS`].
    pub fn new(of: u32) -> Self {
        let of = of.clamp(1, MAX_BUCKETS);
        Self {
            count: 0,
            sum: Sum::default(),
            buckets: vec![Sum::default(); usize::try_from(of).unwrap_or(1)],
        }
    }

    /// How many buckets there are.
    pub fn of(&self) -> u32 {
        u32::try_from(self.buckets.len()).unwrap_or(1)
    }

    /// Takes an entry in.
    pub fn add(&mut self, kind: i32, uid: &str, entry: &Entry) {
        let sum = Sum::of(kind, uid, entry);
        let place = bucket(kind, uid, self.of());
        self.count += 1;
        self.sum.add(sum);
        if let Some(bucket) = usize::try_from(place)
            .ok()
            .and_then(|place| self.buckets.get_mut(place))
        {
            bucket.add(sum);
        }
    }

    /// As it travels.
    pub fn message(&self) -> GroupDigest {
        let mut message = GroupDigest {
            count: self.count,
            sum: self.sum.to_bytes().to_vec().into(),
            buckets: Default::default(),
        };
        if self.buckets.len() > 1 {
            let bytes: Vec<u8> = self
                .buckets
                .iter()
                .flat_map(|b| b.short().to_be_bytes())
                .collect();
            message.buckets = bytes.into();
        }
        message
    }

    /// The buckets in which the other side's digest differs from this one, which must have as many. Equal in every
    /// bucket and yet not as a whole: all of them.
    pub fn differing(&self, other: &GroupDigest) -> BucketSet {
        let of = self.of();
        let all = || BucketSet {
            of,
            buckets: (0..of).collect(),
        };
        let same = Sum::from_slice(&other.sum) == Some(self.sum) && other.count == self.count;
        if same {
            return BucketSet {
                of,
                buckets: Vec::new(),
            };
        }
        if self.buckets.len() <= 1 || other.buckets.len() != self.buckets.len() * 8 {
            return all();
        }
        let theirs = other.buckets.chunks_exact(8);
        let differing: Vec<u32> = (0..of)
            .zip(self.buckets.iter().zip(theirs))
            .filter(|(_, (ours, theirs))| ours.short().to_be_bytes() != **theirs)
            .map(|(place, _)| place)
            .collect();
        if differing.is_empty() {
            return all();
        }
        BucketSet {
            of,
            buckets: differing,
        }
    }
}

/// Into how many buckets a digest from the link is divided; `None` when it is malformed.
pub fn buckets_of(digest: &GroupDigest) -> Option<u32> {
    if digest.sum.len() != 16 || !digest.buckets.len().is_multiple_of(8) {
        return None;
    }
    let of = u32::try_from(digest.buckets.len() / 8).ok()?.max(1);
    (of <= MAX_BUCKETS).then_some(of)
}

/// Tells which objects are in a set of buckets.
#[derive(Clone, Debug, Default)]
pub struct Chosen {
    of: u32,
    chosen: Vec<bool>,
}

impl Chosen {
    /// Reads a set from the link; buckets that cannot exist are left out, and a set that is divided into too many is empty.
    pub fn new(set: &BucketSet) -> Self {
        if set.of == 0 || set.of > MAX_BUCKETS {
            return Self::default();
        }
        let mut chosen = vec![false; usize::try_from(set.of).unwrap_or(0)];
        for place in &set.buckets {
            if let Some(place) = usize::try_from(*place)
                .ok()
                .and_then(|place| chosen.get_mut(place))
            {
                *place = true;
            }
        }
        Self { of: set.of, chosen }
    }

    /// Whether an object is in one of them.
    pub fn has(&self, kind: i32, uid: &str) -> bool {
        usize::try_from(bucket(kind, uid, self.of))
            .ok()
            .and_then(|place| self.chosen.get(place))
            .is_some_and(|chosen| *chosen)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn entry(version: u8) -> Entry {
        Entry {
            hash: ContentHash([version; 16]),
            expires_unix: 0,
        }
    }

    fn digest(of: u32, held: &[(String, u8)]) -> Buckets {
        let mut buckets = Buckets::new(of);
        for (uid, version) in held {
            buckets.add(1, uid, &entry(*version));
        }
        buckets
    }

    #[test]
    fn the_hash_of_an_entry_and_its_bucket_are_fixed_for_ever() {
        let sum = Sum::of(1, "u", &entry(7));
        assert_eq!(
            crate::token::hex(&sum.to_bytes()),
            "0d02d4a28a807cc14029ea8a21b9baa5"
        );
        assert_eq!(bucket(1, "u", 1024), 428);
        assert_eq!(bucket(3, "0b6a58e7-3d0a-4a53-8b50-7f7ff1d0a0f4", 1024), 632);
    }

    #[test]
    fn a_small_site_is_one_bucket_and_ten_thousand_pods_fit_into_the_most() {
        assert_eq!(buckets_for(0), 1);
        assert_eq!(buckets_for(64), 1);
        assert_eq!(buckets_for(65), 2);
        assert_eq!(buckets_for(30_000), 1024);
        assert_eq!(buckets_for(u64::MAX / 4), MAX_BUCKETS);
        let large = digest(1024, &[("a".to_owned(), 1)]).message();
        assert!(large.buckets.len() + large.sum.len() <= 10 * 1024);
    }

    #[test]
    fn buckets_that_agree_by_accident_are_all_asked_for() {
        let ours = digest(4, &[("a".to_owned(), 1)]);
        let mut theirs = ours.message();
        theirs.sum = vec![0; 16].into();
        assert_eq!(ours.differing(&theirs).buckets, [0, 1, 2, 3]);
    }

    #[test]
    fn malformed_digests_and_sets_are_refused() {
        let good = digest(4, &[]).message();
        assert_eq!(buckets_of(&good), Some(4));
        for (sum, buckets) in [(15, 0), (16, 9), (16, 8 * 1025)] {
            let bad = GroupDigest {
                count: 0,
                sum: vec![0; sum].into(),
                buckets: vec![0; buckets].into(),
            };
            assert_eq!(buckets_of(&bad), None);
        }
        let set = BucketSet {
            of: u32::MAX,
            buckets: vec![0],
        };
        assert!(!Chosen::new(&set).has(1, "a"));
        let set = BucketSet {
            of: 1,
            buckets: vec![7, 0],
        };
        assert!(Chosen::new(&set).has(1, "a"));
    }

    proptest! {
        #[test]
        fn order_does_not_matter_and_what_was_taken_out_leaves_nothing(
            held in proptest::collection::vec(("[a-f]{1,4}", 0..4u8), 0..30), more in "[a-f]{1,4}"
        ) {
            let forth = digest(4, &held);
            let mut back: Vec<_> = held.clone();
            back.reverse();
            prop_assert_eq!(forth.message(), digest(4, &back).message());
            let mut sum = forth.sum;
            sum.add(Sum::of(1, &more, &entry(1)));
            prop_assert_ne!(sum, forth.sum);
            sum.remove(Sum::of(1, &more, &entry(1)));
            prop_assert_eq!(sum, forth.sum);
        }

        #[test]
        fn exactly_the_buckets_with_a_difference_are_named(
            held in proptest::collection::btree_map("[a-f]{1,6}", 0..4u8, 0..60),
            change in proptest::collection::btree_map("[a-f]{1,6}", 0..4u8, 0..4),
        ) {
            let ours: Vec<_> = held.clone().into_iter().collect();
            let mut other = held.clone();
            other.extend(change.clone());
            let theirs: Vec<_> = other.clone().into_iter().collect();
            let named = digest(16, &ours).differing(&digest(16, &theirs).message()).buckets;
            let mut expected: Vec<u32> = change
                .iter()
                .filter(|(uid, version)| held.get(*uid) != Some(version))
                .map(|(uid, _)| bucket(1, uid, 16))
                .collect();
            expected.sort_unstable();
            expected.dedup();
            prop_assert_eq!(named, expected);
        }
    }
}
