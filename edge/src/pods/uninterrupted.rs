//! Calls of the runtime that are not broken off.
//!
//! Deletion interrupts whatever a worker does, and dropping a call cancels it in the engine. A start that is cancelled
//! halfway kills what was being started, and the container then shows a failure of the engine instead of its own end.

use tokio::sync::watch;

/// Whether its owner is in such a call.
#[derive(Clone, Debug)]
pub(super) struct Uninterrupted {
    calling: watch::Sender<bool>,
}

impl Uninterrupted {
    pub(super) fn new() -> Self {
        Self {
            calling: watch::Sender::new(false),
        }
    }

    /// Makes a call that [`Self::idle`] waits for.
    pub(super) async fn call<T>(&self, work: impl Future<Output = T>) -> T {
        self.calling.send_replace(true);
        let result = work.await;
        self.calling.send_replace(false);
        result
    }

    /// Waits until no call is under way. Cancellation safe.
    pub(super) async fn idle(&self) {
        // The sender is ours: it cannot have gone.
        let _ = self.calling.subscribe().wait_for(|calling| !calling).await;
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use tokio::sync::oneshot;

    use super::*;

    #[tokio::test]
    async fn an_interruption_waits_for_the_call_and_for_nothing_after_it() {
        let (end, ended) = oneshot::channel::<()>();
        let (interrupt, interrupted) = oneshot::channel::<()>();
        let uninterrupted = Uninterrupted::new();
        let called = Cell::new(false);
        let work = async {
            uninterrupted.call(ended).await.unwrap();
            called.set(true);
            std::future::pending::<()>().await;
        };
        let interruption = async {
            interrupted.await.unwrap();
            assert!(!called.get());
            end.send(()).unwrap();
            uninterrupted.idle().await;
        };
        interrupt.send(()).unwrap();
        tokio::select! {
            biased;
            () = work => unreachable!("it waits for ever"),
            () = interruption => {}
        }
        assert!(called.get());
    }
}
