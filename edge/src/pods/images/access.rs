//! Who may use an image that was fetched with somebody's credentials.
//!
//! An image on the node's disk is as good as published to every pod of the node, unless it is remembered how it came
//! there. What was fetched with the credentials of a Secret may be used by pods that have the same Secret or the same
//! credentials; others must fetch it themselves. What was fetched without credentials, or was there before this daemon
//! fetched anything (imported by hand, part of the machine's own image), is everybody's. These are a kubelet's rules
//! (`NeverVerifyPreloadedImages`).
//!
//! A fetch is written down before it begins: an image that a crash left here is not taken for one that was there
//! before.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::{Mutex, PoisonError};

use serde::{Deserialize, Serialize};

use super::reference::normalised;
use crate::runtime::Image;
use crate::store::{Store, StoreError};

/// The rooms' names in the store: records by image id, intents by image name.
const RECORDS: &str = "image-access";
const INTENTS: &str = "image-intents";

/// Where credentials came from.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Source {
    /// UID of the Secret.
    pub(crate) uid: String,
    /// Its namespace.
    pub(crate) namespace: String,
    /// Its name.
    pub(crate) name: String,
    /// Hash of the credentials in it that fit the image.
    pub(crate) hash: String,
}

impl Source {
    fn is_same_secret(&self, other: &Self) -> bool {
        (&self.uid, &self.namespace, &self.name) == (&other.uid, &other.namespace, &other.name)
    }
}

/// How an image came here under one of its names.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Fetched {
    /// Without credentials: everybody's.
    everybody: bool,
    /// With these.
    sources: Vec<Source>,
}

#[derive(Clone, Debug, Default, Serialize, Deserialize)]
struct Record {
    /// By repository with its registry, without tag and digest.
    repositories: BTreeMap<String, Fetched>,
}

/// Remembers how images came here. Kept in the store.
pub(crate) struct Access {
    store: Store,
    fetches: Mutex<Fetches>,
}

#[derive(Default)]
struct Fetches {
    /// Those under way by image name.
    fetching: HashMap<String, usize>,
    /// How many there have been.
    begun: u64,
}

/// A time without fetches, as long as no other begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Round(u64);

impl Access {
    /// Over what the store holds.
    pub(crate) fn new(store: Store) -> Self {
        Self {
            store,
            fetches: Mutex::default(),
        }
    }

    /// Whether a pod with these credentials may use the image as it is here. Where nothing can be read, it may not.
    pub(crate) fn may_use(&self, image: &str, id: &str, sources: &[Source]) -> bool {
        let looked = self.looked_up(image, id, sources);
        looked.unwrap_or_else(|error| {
            tracing::error!(image, %error, "how an image came here cannot be read; it is fetched again");
            false
        })
    }

    fn looked_up(&self, image: &str, id: &str, sources: &[Source]) -> Result<bool, StoreError> {
        let Some(mut record) = self.store.state_get::<Record>(RECORDS, id)? else {
            return Ok(self.store.state_get::<bool>(INTENTS, image)?.is_none());
        };
        let Some(fetched) = record.repositories.get_mut(&normalised(image)) else {
            return Ok(false);
        };
        if fetched.everybody {
            return Ok(true);
        }
        let Some(fits) = sources.iter().find(|source| {
            fetched
                .sources
                .iter()
                .any(|known| known.hash == source.hash || known.is_same_secret(source))
        }) else {
            return Ok(false);
        };
        // The same Secret with new credentials, or another Secret with the same: each is good from now on.
        if !fetched.sources.contains(fits) {
            fetched.sources.retain(|known| !known.is_same_secret(fits));
            fetched.sources.push(fits.clone());
            self.store.state_put(RECORDS, id, &record)?;
        }
        Ok(true)
    }

    /// A fetch begins. Fails when that cannot be written down: then it must not begin.
    pub(crate) fn begin(&self, image: &str) -> Result<(), StoreError> {
        let mut fetches = self.fetches.lock().unwrap_or_else(PoisonError::into_inner);
        self.store.state_put(INTENTS, image, &true)?;
        *fetches.fetching.entry(image.to_owned()).or_default() += 1;
        fetches.begun += 1;
        Ok(())
    }

    /// A fetch is over; what it brought, where it succeeded.
    pub(crate) fn end(&self, image: &str, brought: Option<Brought<'_>>) {
        let mut fetches = self.fetches.lock().unwrap_or_else(PoisonError::into_inner);
        let fetching = &mut fetches.fetching;
        let recorded = match brought {
            Some(brought) => {
                // A name that nobody has fetched was there before, and stays everybody's.
                let fetched: Vec<String> = fetching.keys().map(|f| normalised(f)).collect();
                let names = brought.names.iter().map(|name| normalised(name));
                let before: Vec<String> = names.filter(|name| !fetched.contains(name)).collect();
                self.record(image, &brought, &before)
            }
            None => Ok(()),
        };
        let left = fetching.get_mut(image).map_or(0, |count| {
            *count = count.saturating_sub(1);
            *count
        });
        if left > 0 {
            return;
        }
        fetching.remove(image);
        let done = recorded.and_then(|()| self.store.state_delete(INTENTS, image));
        if let Err(error) = done {
            // The intent stays: the image is fetched again rather than given to the wrong pod.
            tracing::error!(image, %error, "how an image came here cannot be written down");
        }
    }

    /// The round before a list of images; `None` while something is fetched.
    pub(super) fn round(&self) -> Option<Round> {
        let fetches = self.fetches.lock().unwrap_or_else(PoisonError::into_inner);
        fetches.fetching.is_empty().then_some(Round(fetches.begun))
    }

    /// Forgets what came here but is not among the images that are `there`. Does nothing when a fetch was under way
    /// since `round`: an image without a record counts as one that was there before, and is everybody's.
    pub(super) fn prune(&self, round: Option<Round>, there: &[Image]) {
        let fetches = self.fetches.lock().unwrap_or_else(PoisonError::into_inner);
        if round != Some(Round(fetches.begun)) {
            return;
        }
        let there: HashSet<&str> = there.iter().map(|image| image.id.as_str()).collect();
        let pruned = self.store.state_list::<Record>(RECORDS).and_then(|records| {
            let gone = records.iter().filter(|(id, _)| !there.contains(id.as_str()));
            gone.into_iter()
                .try_for_each(|(id, _)| self.store.state_delete(RECORDS, id))
        });
        if let Err(error) = pruned {
            tracing::warn!(%error, "how images came here that are gone is not forgotten yet");
        }
    }

    fn record(&self, image: &str, brought: &Brought<'_>, before: &[String]) -> Result<(), StoreError> {
        let mut record = self
            .store
            .state_get::<Record>(RECORDS, brought.id)?
            .unwrap_or_default();
        for name in before {
            record.repositories.entry(name.clone()).or_insert(Fetched {
                everybody: true,
                sources: Vec::new(),
            });
        }
        let fetched = record.repositories.entry(normalised(image)).or_default();
        match brought.source {
            None => {
                *fetched = Fetched {
                    everybody: true,
                    sources: Vec::new(),
                }
            }
            Some(_) if fetched.everybody => {}
            Some(source) => {
                fetched.sources.retain(|known| !known.is_same_secret(source));
                fetched.sources.push(source.clone());
            }
        }
        self.store.state_put(RECORDS, brought.id, &record)
    }
}

/// What a fetch brought.
pub(crate) struct Brought<'a> {
    /// The image's id.
    pub(crate) id: &'a str,
    /// Every name that the image has now.
    pub(crate) names: &'a [String],
    /// The credentials that it took, if any.
    pub(crate) source: Option<&'a Source>,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn source(name: &str, hash: &str) -> Source {
        Source {
            uid: format!("uid-{name}"),
            namespace: "default".into(),
            name: name.into(),
            hash: hash.into(),
        }
    }

    fn brought(source: Option<&Source>) -> Option<Brought<'_>> {
        static NAMES: std::sync::LazyLock<[String; 2]> =
            std::sync::LazyLock::new(|| ["r/a:1".to_owned(), "imported:1".to_owned()]);
        Some(Brought {
            id: "sha256:1",
            names: &*NAMES,
            source,
        })
    }

    fn access(dir: &tempfile::TempDir) -> Access {
        Access::new(Store::open(dir.path()).unwrap())
    }

    #[test]
    fn an_image_fetched_with_a_secret_is_for_pods_with_it_or_the_same_credentials() {
        let dir = tempfile::tempdir().unwrap();
        let access = access(&dir);
        access.begin("r/a:1").unwrap();
        access.end("r/a:1", brought(Some(&source("mine", "h1"))));
        // The same bytes were imported under this name.
        assert!(access.may_use("imported:1", "sha256:1", &[]));
        assert!(!access.may_use("r/a:1", "sha256:1", &[]));
        assert!(!access.may_use("r/a:1", "sha256:1", &[source("other", "h2")]));
        assert!(access.may_use("r/a:2", "sha256:1", &[source("other", "h1")]));
        assert!(access.may_use("r/a:1", "sha256:1", &[source("mine", "rotated")]));
        // The other Secret has proved itself; what it is rotated to is good as well.
        assert!(access.may_use("r/a:1", "sha256:1", &[source("other", "h3")]));
        assert!(!access.may_use("s/b:1", "sha256:1", &[source("mine", "h1")]));
    }

    fn image(id: &str) -> Image {
        Image {
            id: id.into(),
            tags: vec![],
            digests: vec![],
            size_bytes: 1,
            uid: None,
            username: String::new(),
        }
    }

    #[test]
    fn how_an_image_came_here_is_forgotten_with_the_image_but_not_beside_a_fetch() {
        let dir = tempfile::tempdir().unwrap();
        let access = access(&dir);
        let records = || access.store.state_list::<Record>(RECORDS).unwrap().len();
        let before = access.round();
        access.begin("r/a:1").unwrap();
        assert_eq!(access.round(), None);
        access.end("r/a:1", brought(Some(&source("mine", "h1"))));
        // Listed before the fetch: the list says nothing of what it brought.
        access.prune(before, &[]);
        access.prune(None, &[]);
        assert_eq!(records(), 1);
        access.prune(access.round(), &[image("sha256:1"), image("sha256:2")]);
        assert_eq!(records(), 1);
        assert!(!access.may_use("r/a:1", "sha256:1", &[]));
        access.prune(access.round(), &[image("sha256:2")]);
        assert_eq!(records(), 0);
    }

    #[test]
    fn an_image_that_was_there_before_or_came_without_credentials_is_everybody_s() {
        let dir = tempfile::tempdir().unwrap();
        let access = access(&dir);
        assert!(access.may_use("r/a:1", "sha256:1", &[]));
        access.begin("r/a:1").unwrap();
        access.end("r/a:1", brought(None));
        assert!(access.may_use("r/a:1", "sha256:1", &[]));
    }

    #[test]
    fn an_image_of_a_fetch_that_was_cut_off_is_not_taken_for_one_that_was_there_before() {
        let dir = tempfile::tempdir().unwrap();
        let access = access(&dir);
        access.begin("r/a:1").unwrap();
        let after_the_crash = Access::new(access.store.clone());
        assert!(!after_the_crash.may_use("r/a:1", "sha256:1", &[]));
        access.end("r/a:1", None);
        assert!(access.may_use("r/a:1", "sha256:1", &[]));
    }
}
