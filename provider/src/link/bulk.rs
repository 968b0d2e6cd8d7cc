//! One site's bulk stream: carries out what [`SiteSync`] decides, and hands reports to their lanes.

use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use skerry_proto::link::{CloudBulk, EdgeBulk, cloud_bulk, edge_bulk};
use skerry_proto::object::ObjectKey;
use tokio::sync::{mpsc, watch};
use tokio::time::Instant;
use tonic::{Status, Streaming};

use super::reports::{Lanes, Reply};
use super::service::LinkDeps;
use super::sessions::Session;
use super::sync::{MINTS, Proof, SiteSync, Tokens, Violation};
use crate::refs::tokens::{Minted, mint};

/// How often tokens are checked for renewal, failed ones are asked for again, and a divergence is repaired again.
const CHECK: Duration = Duration::from_secs(10);
/// Changes of the cluster that follow each other this closely are taken together; more closely than a comparison takes
/// they are never looked at.
const SETTLE: Duration = Duration::from_millis(1);

pub(super) struct Bulk {
    deps: Arc<LinkDeps>,
    session: Session,
    outbound: mpsc::Sender<Result<CloudBulk, Status>>,
    sync: SiteSync,
    mints: mpsc::Receiver<(ObjectKey, Result<Minted, kube::Error>)>,
    mint_results: mpsc::Sender<(ObjectKey, Result<Minted, kube::Error>)>,
    began: Instant,
    /// How long the last comparison took.
    comparing: Duration,
}

impl From<Violation> for Status {
    fn from(violation: Violation) -> Self {
        match violation {
            Violation::TooMany => Self::resource_exhausted(violation.to_string()),
            _ => Self::invalid_argument(violation.to_string()),
        }
    }
}

impl Bulk {
    pub(super) fn new(
        deps: Arc<LinkDeps>,
        session: Session,
        remembered: Tokens,
        outbound: mpsc::Sender<Result<CloudBulk, Status>>,
    ) -> Self {
        let (mint_results, mints) = mpsc::channel(MINTS);
        Self {
            deps,
            session,
            outbound,
            sync: SiteSync::new(remembered),
            mints,
            mint_results,
            began: Instant::now(),
            comparing: Duration::ZERO,
        }
    }

    /// Serves the stream until either side ends it. Answers the tokens that the store is believed to hold.
    pub(super) async fn run(mut self, inbound: Streaming<EdgeBulk>) -> (Tokens, Result<(), Status>) {
        let ended = self.serve(inbound).await;
        (self.sync.tokens(), ended)
    }

    async fn serve(&mut self, mut inbound: Streaming<EdgeBulk>) -> Result<(), Status> {
        let mut changes = self.deps.mirror.changes(&self.session.peer.site);
        let session = self.session.clone();
        let lanes = session.lanes(&self.deps.reports);
        let mut check = tokio::time::interval(CHECK);
        let over = self.session.over.clone();
        let mut dirty = true;
        loop {
            if dirty && self.sync.is_sending() {
                changes.mark_unchanged();
                self.compare();
                dirty = false;
            }
            self.flush().await?;
            if self.sync.is_sending() {
                self.session.begun.cancel();
            }
            tokio::select! {
                () = over.cancelled() => return Ok(()),
                message = inbound.message() => match message? {
                    Some(message) => dirty |= self.take(message, lanes).await?,
                    None => return Ok(()),
                },
                changed = settled(&mut changes, self.comparing) => {
                    if changed.is_err() {
                        return Err(Status::unavailable("the provider is stopping"));
                    }
                    dirty = true;
                }
                Some((key, result)) = self.mints.recv() => self.take_minted(&key, result),
                _ = check.tick() => {
                    // Without tokens nothing comes of itself.
                    dirty |= self.sync.has_tokens();
                    self.sync.forgive();
                    if let Some(request) = self.sync.repair(self.began.elapsed()) {
                        self.send(request).await?;
                    }
                }
            }
        }
    }

    /// Takes a message. Answers whether what the site should hold must be compared with what it holds.
    async fn take(&mut self, message: EdgeBulk, lanes: &Lanes) -> Result<bool, Status> {
        match message.message {
            Some(edge_bulk::Message::InventoryDigest(digest)) => {
                let desired = self.deps.mirror.desired(&self.session.peer.site);
                if let Some(request) = self.sync.take_digest(&digest, &desired)? {
                    self.send(request).await?;
                }
                return Ok(true);
            }
            Some(edge_bulk::Message::Inventory(inventory)) => {
                self.sync.take_inventory(inventory)?;
                return Ok(true);
            }
            Some(edge_bulk::Message::Applied(applied)) => {
                let request = self.sync.take_applied(&applied, self.began.elapsed())?;
                self.note_proof();
                if let Some(request) = request {
                    self.send(request).await?;
                    return Ok(true);
                }
            }
            Some(edge_bulk::Message::Report(report)) => {
                lanes.take(report, Reply::Bulk(self.outbound.clone())).await;
            }
            _ => {}
        }
        Ok(false)
    }

    fn note_proof(&self) {
        let site = &self.session.peer.site;
        let proof = self.sync.proof();
        let now = Timestamp::now();
        let news = self.deps.sessions.note_proof(&self.session, proof, now);
        match proof {
            Proof::Equal => self.deps.metrics.set_synced(site, now),
            Proof::Different if news => {
                self.deps.metrics.count_divergence(site);
                tracing::warn!(%site, "the site's store is not what it must be; the difference is looked for and sent again");
            }
            _ => {}
        }
    }

    fn take_minted(&mut self, key: &ObjectKey, result: Result<Minted, kube::Error>) {
        let site = &self.session.peer.site;
        let minted = match result {
            Ok(minted) => Some(minted),
            Err(error) => {
                tracing::warn!(%site, token = %key.uid, %error, "a ServiceAccount token could not be had; it is asked for again");
                None
            }
        };
        if let Err(error) = self.sync.take_minted(key, minted.as_ref()) {
            tracing::error!(%site, token = %key.uid, %error, "a token cannot be packed");
        }
    }

    fn compare(&mut self) {
        let began = Instant::now();
        let desired = self.deps.mirror.desired(&self.session.peer.site);
        self.sync.compare(&desired, Timestamp::now().as_second());
        self.comparing = began.elapsed();
    }

    /// Sends as much as the window allows, and asks for tokens.
    async fn flush(&mut self) -> Result<(), Status> {
        while let Some((key, token)) = self.sync.next_mint() {
            let (client, results) = (self.deps.client.clone(), self.mint_results.clone());
            tokio::spawn(async move {
                let result = mint(&client, &token.owner, &token.need).await;
                // The session may be over; then nobody needs the token.
                let _ = results.send((key, result)).await;
            });
        }
        while let Some(message) = self.sync.next_message() {
            self.send(message).await?;
        }
        Ok(())
    }

    async fn send(&self, message: cloud_bulk::Message) -> Result<(), Status> {
        let message = Ok(CloudBulk {
            message: Some(message),
        });
        tokio::select! {
            () = self.session.over.cancelled() => Err(Status::aborted("the session is over")),
            sent = self.outbound.send(message) => sent.map_err(|_| Status::cancelled("the edge is gone")),
        }
    }
}

/// Waits for a change, and a moment for those that follow it. Cancellation safe: a change that was not answered for is
/// found again.
async fn settled(
    changes: &mut watch::Receiver<u64>,
    comparing: Duration,
) -> Result<(), watch::error::RecvError> {
    changes.changed().await?;
    changes.mark_changed();
    tokio::time::sleep(SETTLE.max(comparing)).await;
    changes.mark_unchanged();
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_change_is_not_lost_to_a_message_that_comes_just_after_it() {
        let (sender, mut changes) = watch::channel(0);
        sender.send_replace(1);
        // What happens when another branch of the select is ready while this one waits for more.
        tokio::select! {
            biased;
            _ = settled(&mut changes, Duration::ZERO) => panic!("the change must settle first"),
            () = tokio::task::yield_now() => {}
        }
        tokio::time::timeout(SETTLE * 2, settled(&mut changes, Duration::ZERO))
            .await
            .expect("the change is still there")
            .unwrap();
        assert!(!changes.has_changed().unwrap());
    }
}
