//! How many pods are taken in at one time.
//!
//! A site that is given thousands of pods at once, or starts with thousands in its store, must not hold all of them in
//! memory to find that most are not for it to run. A pod's worker is begun when one of a few places is free, in the order
//! in which the pods came, and gives its place back once it is decided what becomes of the pod.

use std::collections::{HashSet, VecDeque};
use std::sync::Arc;

use skerry_proto::object::Uid;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// Pods that are being decided about at one time: more than a machine starts at once.
const PLACES: usize = 64;

/// A place; dropping it gives it back.
pub(super) type Place = OwnedSemaphorePermit;

/// The pods that wait for a place.
pub(super) struct Intake {
    places: Arc<Semaphore>,
    queue: VecDeque<Uid>,
    /// The same as in `queue`.
    queued: HashSet<Uid>,
}

impl Intake {
    pub(super) fn new() -> Self {
        Self {
            places: Arc::new(Semaphore::new(PLACES)),
            queue: VecDeque::new(),
            queued: HashSet::new(),
        }
    }

    /// A place for the pod at once, or `None`: then it waits for its turn, if it does not already.
    pub(super) fn enter(&mut self, uid: &Uid) -> Option<Place> {
        if self.queue.is_empty()
            && let Ok(place) = Arc::clone(&self.places).try_acquire_owned()
        {
            return Some(place);
        }
        if self.queued.insert(uid.clone()) {
            self.queue.push_back(uid.clone());
        }
        None
    }

    pub(super) fn waits(&self, uid: &Uid) -> bool {
        self.queued.contains(uid)
    }

    /// The next pod's turn. Never answers while none waits. Cancellation safe.
    pub(super) async fn next(&mut self) -> (Uid, Place) {
        loop {
            if !self.queue.is_empty()
                && let Ok(place) = Arc::clone(&self.places).acquire_owned().await
                && let Some(uid) = self.queue.pop_front()
            {
                self.queued.remove(&uid);
                return (uid, place);
            }
            // The semaphore is never closed: nobody waits.
            std::future::pending::<()>().await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn uid(number: usize) -> Uid {
        Uid::from(format!("u{number}"))
    }

    #[tokio::test]
    async fn pods_beyond_the_places_wait_in_their_order_and_once_each() {
        let mut intake = Intake::new();
        let mut places: Vec<Place> = (0..PLACES).map(|n| intake.enter(&uid(n)).unwrap()).collect();
        for number in [PLACES, PLACES + 1, PLACES] {
            assert!(intake.enter(&uid(number)).is_none());
        }
        assert!(futures::FutureExt::now_or_never(intake.next()).is_none());
        assert!(
            intake.waits(&uid(PLACES)),
            "a turn that was not taken is not lost"
        );
        places.truncate(PLACES - 2);
        let (first, _one) = intake.next().await;
        // One that comes later does not overtake.
        assert!(intake.enter(&uid(0)).is_none());
        let (second, _other) = intake.next().await;
        assert_eq!([first, second], [uid(PLACES), uid(PLACES + 1)]);
        assert!(!intake.waits(&uid(PLACES)) && !intake.waits(&uid(PLACES + 1)));
    }
}
