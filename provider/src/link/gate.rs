//! Fencing at the API server: the writes of a site's session are over before those of its successor begin.
//!
//! Cancelling a session does not take back a request that is on its way. Written late, it would put an older status over
//! a newer one. So a write, once begun, is carried to its end, and the next session's first write waits for it.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use skerry_proto::SiteName;
use tokio::sync::{OnceCell, OwnedRwLockReadGuard, RwLock};
use tokio_util::sync::CancellationToken;

/// One gate per site.
#[derive(Default)]
pub(super) struct Gates(Mutex<HashMap<SiteName, Arc<RwLock<()>>>>);

/// A site's gate, as one session sees it.
#[derive(Clone)]
pub(super) struct Gate {
    lock: Arc<RwLock<()>>,
    /// The earlier sessions' writes are known to be over.
    clear: Arc<OnceCell<()>>,
    over: CancellationToken,
}

/// A write under way.
pub(super) struct Writing(#[allow(dead_code)] OwnedRwLockReadGuard<()>);

impl Gates {
    /// The site's gate, for the session that ends with `over`.
    pub(super) fn of(&self, site: &SiteName, over: &CancellationToken) -> Gate {
        let mut gates = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        // A gate that nobody holds says nothing.
        gates.retain(|_, gate| Arc::strong_count(gate) > 1);
        let lock = gates.entry(site.clone()).or_default();
        Gate {
            lock: Arc::clone(lock),
            clear: Arc::default(),
            over: over.clone(),
        }
    }
}

impl Gate {
    /// Waits until no earlier session writes any more.
    pub(super) async fn wait(&self) {
        self.clear
            .get_or_init(|| async { drop(self.lock.write().await) })
            .await;
    }

    /// Begins a write; `None` when the session is over.
    pub(super) async fn begin(&self) -> Option<Writing> {
        let guard = Arc::clone(&self.lock).read_owned().await;
        // Looked at with the guard in hand: a successor waits for the guard, and cancels this session before that.
        (!self.over.is_cancelled()).then_some(Writing(guard))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn site() -> SiteName {
        "harbour".parse().unwrap()
    }

    #[tokio::test]
    async fn a_fenced_sessions_write_is_over_before_its_successors_begin() {
        let gates = Gates::default();
        let (old, new) = (CancellationToken::new(), CancellationToken::new());
        let first = gates.of(&site(), &old);
        let writing = first.begin().await.unwrap();
        old.cancel();
        let second = gates.of(&site(), &new);
        let mut waiting = Box::pin(second.wait());
        assert!(futures::poll!(&mut waiting).is_pending());
        drop(writing);
        waiting.await;
        assert!(second.begin().await.is_some());
        assert!(first.begin().await.is_none(), "a fenced session began a write");
    }

    #[tokio::test]
    async fn lanes_of_one_session_write_side_by_side_and_sites_do_not_wait_for_each_other() {
        let (gates, over) = (Gates::default(), CancellationToken::new());
        let gate = gates.of(&site(), &over);
        let _one = gate.begin().await.unwrap();
        let _two = gate.begin().await.unwrap();
        gates.of(&"mast".parse().unwrap(), &over).wait().await;
        drop(gates.of(&site(), &over));
        assert_eq!(
            gates.0.lock().unwrap().len(),
            1,
            "the gate of an idle site was kept"
        );
    }
}
