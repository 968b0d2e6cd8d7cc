//! Garbage collection of images.
//!
//! **In:** the runtime's images and their file system; what pods need. **Out:** images that nothing needs are removed,
//! the least recently used first, when the file system is nearly full; warnings on the Node when that is not enough.
//!
//! What must always hold:
//! * An image that a stored pod names is never removed, whether the pod runs, has ended or was not started yet: offline
//!   it could not be had again. Nor one that the runtime needs itself, nor that of any container.
//! * When anything of this cannot be found out, nothing is removed.
//!
//! Source: kubelet, image GC manager.

mod book;

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use nix::sys::statvfs::statvfs;
use skerry_proto::SiteName;
use tokio::sync::Mutex;
use tokio_util::sync::CancellationToken;

use crate::clock::Clock;
use crate::pods::{Level, NodeEvents};
use crate::runtime::{Image, Runtime, RuntimeError};
use crate::store::{Store, StoreError};
use book::{Book, Candidate};

/// The room's name for its record in the store.
const ROOM: &str = "images";
const RECORD: &str = "book";

/// When and what is removed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Policy {
    /// Removal begins when this share of the file system is used, in percent.
    pub high_percent: u8,
    /// Removal ends when no more than this share is used, in percent.
    pub low_percent: u8,
    /// Images that were seen for less than this stay.
    pub min_age: Duration,
    /// Images that nothing has needed for longer go also when there is room; zero = never.
    pub max_age: Duration,
    /// How often it is looked.
    pub every: Duration,
}

impl Default for Policy {
    fn default() -> Self {
        Self {
            high_percent: 85,
            low_percent: 80,
            min_age: Duration::from_secs(120),
            max_age: Duration::ZERO,
            every: Duration::from_secs(300),
        }
    }
}

/// Takes a list of the runtime's images, and forgets what is remembered of others.
pub type Forget = Box<dyn FnOnce(&[Image]) + Send>;

/// Tells which images pods need.
pub trait Needs: Send + Sync + 'static {
    /// Names of the images of every pod of this site, as their specs have them. Complete or an error.
    fn images(&self) -> Result<BTreeSet<String>, NeedsError>;

    /// Asked before the runtime's images are listed; what it answers takes the list, and forgets what is remembered of
    /// others.
    fn before_listing(&self) -> Forget {
        Box::new(|_| {})
    }
}

/// The pods' needs cannot be told. Nothing may be removed; the next look tries again.
#[derive(Debug, thiserror::Error)]
pub enum NeedsError {
    /// The store fails.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// A stored pod cannot be read.
    #[error("{0} of the stored pods cannot be read, so their images are not known")]
    Unreadable(usize),
    /// The static pods' files could not be read yet.
    #[error("the static pods are not known yet")]
    StaticPods,
}

/// Why a collection failed. The next one tries again.
#[derive(Debug, thiserror::Error)]
pub enum CollectError {
    /// The runtime refuses or does not answer.
    #[error(transparent)]
    Runtime(#[from] RuntimeError),
    /// What pods need cannot be told.
    #[error(transparent)]
    Needs(#[from] NeedsError),
    /// The images' file system cannot be measured.
    #[error("the images' file system {path} cannot be measured: {reason}")]
    FileSystem {
        /// Where it is.
        path: String,
        /// The system's words.
        reason: String,
    },
    /// The file system has no size.
    #[error("invalid capacity 0 on image filesystem")]
    NoCapacity,
    /// Everything that may go is gone, and it is not enough.
    #[error(
        "Insufficient free disk space on the node's image filesystem ({percent}% of {capacity} bytes used). Failed to \
         free sufficient space by deleting unused images (freed {freed} bytes). Investigate disk usage, as it could \
         be used by active images, logs, volumes, or other data."
    )]
    NotEnough {
        /// Percent in use before.
        percent: u64,
        /// Size of the file system.
        capacity: u64,
        /// Bytes freed.
        freed: u64,
    },
}

/// Removes images that nothing needs. Clones share one book.
#[derive(Clone)]
pub struct Collector {
    shared: Arc<Shared>,
}

struct Shared {
    policy: Policy,
    node: SiteName,
    runtime: Arc<dyn Runtime>,
    needs: Arc<dyn Needs>,
    store: Store,
    events: NodeEvents,
    clock: Arc<dyn Clock>,
    /// Held for a whole collection: two at a time would count the same bytes.
    book: Mutex<Book>,
}

/// What a [`Collector`] works with.
pub struct Deps {
    /// The Node, for its events.
    pub node: SiteName,
    /// Where images are.
    pub runtime: Arc<dyn Runtime>,
    /// What must stay.
    pub needs: Arc<dyn Needs>,
    /// Where the book is kept.
    pub store: Store,
    /// Where failures are told.
    pub events: NodeEvents,
    /// The time.
    pub clock: Arc<dyn Clock>,
}

impl Collector {
    /// A collector with the book of an earlier run.
    pub fn new(policy: Policy, deps: Deps) -> Self {
        let book = deps
            .store
            .state_get::<Book>(ROOM, RECORD)
            .unwrap_or_else(|error| {
                tracing::warn!(%error, "the ages of images are not known any more; all count as new");
                None
            });
        Self {
            shared: Arc::new(Shared {
                policy,
                node: deps.node,
                runtime: deps.runtime,
                needs: deps.needs,
                store: deps.store,
                events: deps.events,
                clock: deps.clock,
                book: Mutex::new(book.unwrap_or_default()),
            }),
        }
    }

    /// Collects every now and then until `stop`.
    pub async fn run(self, stop: CancellationToken) {
        let mut look = tokio::time::interval(self.shared.policy.every);
        look.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut failed = false;
        loop {
            tokio::select! {
                () = stop.cancelled() => return,
                _ = look.tick() => {}
            }
            match self.collect().await {
                Ok(_) => failed = false,
                Err(error) => {
                    self.tell(&error, failed).await;
                    failed = true;
                }
            }
        }
    }

    /// A first failure may pass by itself, as with an engine that starts; the second is worth an event.
    async fn tell(&self, error: &CollectError, again: bool) {
        tracing::warn!(%error, "images could not be collected; it is tried again");
        let message = error.to_string();
        let reason = match error {
            CollectError::NotEnough { .. } => Some("FreeDiskSpaceFailed"),
            CollectError::NoCapacity => Some("InvalidDiskCapacity"),
            _ => None,
        };
        for reason in reason.into_iter().chain(again.then_some("ImageGCFailed")) {
            let events = &self.shared.events;
            events
                .emit(&self.shared.node, Level::Warning, reason, message.clone())
                .await;
        }
    }

    /// Frees space when the file system is nearly full, and drops what is too old; answers the bytes of removed images.
    pub async fn collect(&self) -> Result<u64, CollectError> {
        let policy = self.shared.policy;
        let mut book = self.shared.book.lock().await;
        let now = self.shared.clock.now();
        let (mut candidates, names) = self.candidates(&mut book).await?;
        let mut freed = 0;
        if !policy.max_age.is_zero() {
            let old = |c: &Candidate| {
                let since = c.last_used.map(|used| now.duration_since(used));
                since.is_some_and(|since| Duration::try_from(since).unwrap_or_default() > policy.max_age)
            };
            let (old, rest): (Vec<_>, Vec<_>) = candidates.into_iter().partition(old);
            freed += self.remove(&old, &names, u64::MAX).await?;
            candidates = rest;
        }
        let Some(fs) = self.shared.runtime.image_fs_info().await?.into_iter().next() else {
            return Ok(freed);
        };
        let size = statvfs(&fs.mountpoint).map_err(|error| CollectError::FileSystem {
            path: fs.mountpoint.display().to_string(),
            reason: error.to_string(),
        })?;
        let capacity = size.blocks() * size.fragment_size();
        let available = (size.blocks_available() * size.fragment_size()).min(capacity);
        let (percent, excess) = excess(policy, capacity, available)?;
        if excess == 0 {
            return Ok(freed);
        }
        let more = self.remove(&candidates, &names, excess).await?;
        freed += more;
        if more < excess {
            return Err(CollectError::NotEnough {
                percent,
                capacity,
                freed,
            });
        }
        Ok(freed)
    }

    /// Removes everything that nothing needs, whatever room there is: under pressure. Answers the bytes.
    pub async fn remove_unused(&self) -> Result<u64, CollectError> {
        let mut book = self.shared.book.lock().await;
        let (candidates, names) = self.candidates(&mut book).await?;
        self.remove(&candidates, &names, u64::MAX).await
    }

    /// Looks at what is there, keeps the book, and answers what may go, as far as pods need the given names.
    async fn candidates(&self, book: &mut Book) -> Result<(Vec<Candidate>, BTreeSet<String>), CollectError> {
        let shared = &self.shared;
        // Before the list: what is pulled in between is young, and young images stay.
        let names = shared.needs.images()?;
        let in_use = shared.runtime.images_in_use().await?;
        let forget_others = shared.needs.before_listing();
        let there = shared.runtime.list_images().await?;
        forget_others(&there);
        let mut needed = BTreeSet::new();
        for name in &names {
            // The runtime completes a short name by its own rules.
            let known = shared.runtime.image_status(name).await?;
            needed.extend(known.map(|image| image.id));
        }
        needed.extend(there.iter().filter(|i| is_used(i, &in_use)).map(|i| i.id.clone()));
        let now = shared.clock.now();
        if book.note(&there, &needed, now)
            && let Err(error) = shared.store.state_put(ROOM, RECORD, &*book)
        {
            tracing::warn!(%error, "the ages of images could not be written down");
        }
        Ok((book.candidates(&there, shared.policy.min_age, now), names))
    }

    /// Removes images in order until `enough` bytes are freed. One that cannot be removed is left; the error comes
    /// when nothing was freed at all.
    async fn remove(
        &self,
        candidates: &[Candidate],
        names: &BTreeSet<String>,
        enough: u64,
    ) -> Result<u64, CollectError> {
        let (mut freed, mut failure) = (0_u64, None);
        for candidate in candidates {
            if freed >= enough {
                break;
            }
            if self.is_needed_now(candidate, names).await? {
                continue;
            }
            match self.shared.runtime.remove_image(&candidate.id).await {
                Ok(()) => {
                    tracing::info!(
                        image = candidate.id,
                        bytes = candidate.size_bytes,
                        "an unused image was removed"
                    );
                    freed += candidate.size_bytes;
                }
                Err(error) => {
                    tracing::warn!(image = candidate.id, %error, "an unused image cannot be removed");
                    failure = Some(error);
                }
            }
        }
        match failure {
            Some(error) if freed == 0 => Err(error.into()),
            _ => Ok(freed),
        }
    }

    /// Whether a pod that came since the candidates were chosen needs this one.
    async fn is_needed_now(
        &self,
        candidate: &Candidate,
        names: &BTreeSet<String>,
    ) -> Result<bool, CollectError> {
        for name in self.shared.needs.images()?.difference(names) {
            let known = self.shared.runtime.image_status(name).await?;
            if known.is_some_and(|image| image.id == candidate.id) {
                return Ok(true);
            }
        }
        Ok(false)
    }
}

/// Whether an id or name of the image is among the references.
fn is_used(image: &Image, references: &BTreeSet<String>) -> bool {
    references.contains(&image.id)
        || image
            .tags
            .iter()
            .chain(&image.digests)
            .any(|name| references.contains(name))
}

/// The share in use, and the bytes above the low mark once the high mark is reached.
fn excess(policy: Policy, capacity: u64, available: u64) -> Result<(u64, u64), CollectError> {
    let free = u128::from(available) * 100;
    let percent = match free.checked_div(u128::from(capacity)) {
        Some(free) => 100 - u64::try_from(free).unwrap_or(100).min(100),
        None => return Err(CollectError::NoCapacity),
    };
    if percent < u64::from(policy.high_percent) {
        return Ok((percent, 0));
    }
    let wanted = u128::from(capacity) * u128::from(100 - policy.low_percent.min(100)) / 100;
    let excess = wanted.saturating_sub(u128::from(available));
    Ok((percent, u64::try_from(excess).unwrap_or(u64::MAX)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn removal_begins_at_the_high_mark_and_aims_at_the_low_one() {
        let policy = Policy::default();
        assert_eq!(excess(policy, 1000, 160).unwrap(), (84, 0));
        assert_eq!(excess(policy, 1000, 150).unwrap(), (85, 50));
        assert_eq!(excess(policy, 1000, 0).unwrap(), (100, 200));
        assert_eq!(excess(policy, 1000, 5000).unwrap(), (0, 0));
        assert!(matches!(excess(policy, 0, 0), Err(CollectError::NoCapacity)));
    }
}
