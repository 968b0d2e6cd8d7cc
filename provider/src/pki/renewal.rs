//! Renewal of a site's certificate by proof of the old one's key, also when the old one has expired meanwhile.

use std::sync::Arc;
use std::time::Duration;

use skerry_proto::link::{JoinResponse, RenewRequest};
use tonic::Status;

use super::audit::{Audit, Matter};
use super::enrolment::{answer, issue};
use super::ledger::{CertificateRecord, Ledger};
use super::standing::{Standing, renewable, standing};
use super::{Authority, Issued, Revoked, SitePeer};
use crate::clock::Clock;

/// How often a record is written anew when something else changed the Site meanwhile.
const TRIES: usize = 5;

/// Renews certificates.
pub struct Renewals {
    /// Issues them.
    pub authority: Authority,
    /// Which certificate of a site counts.
    pub ledger: Arc<dyn Ledger>,
    /// Tells people.
    pub audit: Arc<dyn Audit>,
    /// The time.
    pub clock: Arc<dyn Clock>,
    /// How long after its end a certificate may be renewed.
    pub grace: Duration,
}

impl Renewals {
    /// Issues a new certificate for the site that the presented one names.
    ///
    /// Who calls has proven in the handshake to hold the presented certificate's key. The new certificate is recorded
    /// before it is answered; until it is used, the old one may be presented again, since the answer may be lost. After
    /// that a copy of the old one renews nothing.
    pub async fn renew(
        &self,
        peer: &SitePeer,
        request: &RenewRequest,
    ) -> Result<(JoinResponse, Issued), Status> {
        let site = &peer.site;
        if let Err(late) = renewable(peer, self.clock.now(), self.grace) {
            self.audit.note(peer, Matter::TooLate, &late.to_string()).await;
            return Err(Status::permission_denied(late.to_string()));
        }
        for _ in 0..TRIES {
            let page = self.ledger.read(site).await.map_err(Status::unavailable)?;
            let Some(page) = page.filter(|page| page.uid == peer.uid) else {
                return Err(Status::permission_denied(format!(
                    "the Site {site} that the certificate was issued for is gone; join again with a new token"
                )));
            };
            if page.revoked.covers(peer) {
                let message = Revoked::refusal(peer);
                self.audit.note(peer, Matter::Revoked, &message).await;
                return Err(Status::permission_denied(message));
            }
            if page.record.supersedes(peer) {
                let message = format!(
                    "an old copy of the site's certificate (serial {}) tried to renew itself, though the site has used a newer one: somebody has a copy of the machine's disk, or the disk was put back from a backup. If it was you, join again with a new token",
                    peer.serial
                );
                self.audit.note(peer, Matter::OldCopy, &message).await;
                return Err(Status::permission_denied(message));
            }
            let issued = issue(&self.authority, &request.csr_der, site, &peer.uid)?;
            let record = CertificateRecord::new(&issued, Some(&peer.serial));
            let written = self.ledger.write(site, &page.version, &record).await;
            if !written.map_err(Status::unavailable)? {
                continue;
            }
            let late = standing(peer, self.clock.now(), self.grace) != Standing::Current;
            let (matter, how) = if late {
                (Matter::RenewedLate, " after it had expired, by proof of its key")
            } else {
                (Matter::Renewed, "")
            };
            let message = format!(
                "the certificate with serial {}, good until {}, was renewed{how}: serial {}, good until {}",
                peer.serial, peer.not_after, issued.serial, issued.not_after
            );
            tracing::info!(%site, old = %peer.serial, serial = %issued.serial, late, "a site's certificate was renewed");
            self.audit.note(peer, matter, &message).await;
            return Ok((answer(&self.authority, &issued), issued));
        }
        Err(Status::unavailable(
            "the Site is changing all the time; try again",
        ))
    }

    /// Notes that a site was admitted with that certificate: what came before it has had its time.
    pub async fn used(&self, peer: &SitePeer) -> Result<(), String> {
        for _ in 0..TRIES {
            let Some(page) = self.ledger.read(&peer.site).await? else {
                return Ok(());
            };
            if page.uid != peer.uid || !page.record.first_use(peer) {
                return Ok(());
            }
            let record = CertificateRecord {
                previous: None,
                ..page.record
            };
            if self.ledger.write(&peer.site, &page.version, &record).await? {
                return Ok(());
            }
        }
        Err("the Site is changing all the time".to_owned())
    }
}

#[cfg(test)]
#[path = "renewal_tests.rs"]
mod tests;
