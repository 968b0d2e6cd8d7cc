//! Renewal of the certificate, with a new key each time.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use jiff::{SignedDuration, Timestamp};
use rustls::pki_types::CertificateDer;
use sha2::{Digest, Sha256};
use skerry_proto::limits::CERTIFICATE_BACKDATE;
use skerry_proto::link::link_client::LinkClient;
use skerry_proto::link::{ConfirmRequest, JoinResponse, RenewRequest};
use tokio::sync::{Notify, watch};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::{Identity, TrustedTime, files, join, tls};
use crate::link::Dial;
use crate::link::backoff::Backoff;

/// How often the certificate's age is looked at.
const LOOK: Duration = Duration::from_secs(600);
const ANSWER_LIMIT: Duration = Duration::from_secs(30);
/// Pauses after a refusal by the provider.
const REFUSED_FIRST: Duration = Duration::from_secs(2);
const REFUSED_CAP: Duration = Duration::from_secs(600);

/// Renews the certificate at two thirds of its life, and at once when the provider or the clock leaves no other way.
pub struct Renewer {
    /// Where the identity is kept.
    pub data_dir: PathBuf,
    /// Where the renewed identity goes.
    pub identity: watch::Sender<Arc<Identity>>,
    /// To the provider.
    pub dial: Arc<dyn Dial>,
    /// What time it is, and whether that is in doubt.
    pub time: Arc<TrustedTime>,
    /// Notified when only a renewal helps.
    pub urge: Arc<Notify>,
}

/// Why a certificate could not be renewed.
#[derive(Debug, thiserror::Error)]
enum RenewError {
    /// The provider was not reached: whoever dials next says so.
    #[error("{0}")]
    Unreachable(String),
    /// It was reached, and refused or answered nonsense.
    #[error("{0}")]
    Refused(String),
}

impl Renewer {
    /// Renews until `stop`. The new certificate is on disk before it is used.
    pub async fn run(self, stop: CancellationToken) {
        let mut refused = Backoff::new(REFUSED_FIRST, REFUSED_CAP);
        let mut earliest = Instant::now();
        let mut said = String::new();
        loop {
            let current = Arc::clone(&self.identity.borrow());
            let mut urged = self.time.doubt().is_some() || due(&current, self.time.now());
            if !urged {
                tokio::select! {
                    () = stop.cancelled() => return,
                    () = tokio::time::sleep(LOOK) => continue,
                    () = self.urge.notified() => urged = true,
                }
            }
            debug_assert!(urged);
            tokio::select! {
                () = stop.cancelled() => return,
                () = tokio::time::sleep_until(earliest) => {}
            }
            match self.renew(&current).await {
                Ok(renewed) => {
                    tracing::info!(not_after = %renewed.not_after, "the site's certificate was renewed");
                    self.identity.send_replace(Arc::new(renewed));
                    self.confirm().await;
                    refused.reset();
                    said.clear();
                    // Whoever urges meanwhile has not seen the new one.
                    earliest = Instant::now() + REFUSED_FIRST;
                }
                Err(error) => {
                    let reason = error.to_string();
                    if said == reason {
                        tracing::debug!(%reason, "the site's certificate could still not be renewed");
                    } else {
                        tracing::warn!(%reason, not_after = %current.not_after, "the site's certificate could not be renewed; it is tried again");
                    }
                    said = reason;
                    // Without a provider there is nothing to be in a hurry for, until the link finds one.
                    match error {
                        RenewError::Refused(_) => earliest = Instant::now() + refused.next(),
                        RenewError::Unreachable(_) => {
                            tokio::select! {
                                () = stop.cancelled() => return,
                                () = tokio::time::sleep(LOOK) => {}
                                () = self.urge.notified() => {}
                            }
                        }
                    }
                }
            }
        }
    }

    /// Shows the new certificate, so that the old one is worth nothing any more. The next session does the same, so a
    /// failure is of no account; an older provider does not know this.
    async fn confirm(&self) {
        let shown = async {
            let channel = self.dial.dial().await?;
            let confirmed = LinkClient::new(channel).confirm(ConfirmRequest {}).await;
            confirmed.map_err(|status| status.message().to_owned())
        };
        match tokio::time::timeout(ANSWER_LIMIT, shown).await {
            Ok(Ok(_)) => {}
            Ok(Err(reason)) => tracing::debug!(%reason, "the new certificate is shown with the next session"),
            Err(_) => tracing::debug!("the new certificate is shown with the next session"),
        }
    }

    async fn renew(&self, current: &Identity) -> Result<Identity, RenewError> {
        let refused = RenewError::Refused;
        let (key, csr_der) = join::new_key().map_err(refused)?;
        let doubt = self.time.doubt();
        let channel = match doubt {
            Some(_) => self.dial.dial_for_renewal().await,
            None => self.dial.dial().await,
        };
        let channel = channel.map_err(RenewError::Unreachable)?;
        let mut answer = tokio::time::timeout(
            ANSWER_LIMIT,
            LinkClient::new(channel).renew(RenewRequest { csr_der }),
        )
        .await
        .map_err(|_| RenewError::Refused("the provider did not answer".to_owned()))?
        .map_err(|status| match status.code() {
            tonic::Code::Unavailable | tonic::Code::Unknown => {
                RenewError::Unreachable(status.message().to_owned())
            }
            _ => RenewError::Refused(format!("the provider says: {}", status.message())),
        })?
        .into_inner();
        join::check(&answer, &current.site).map_err(refused)?;
        let chain = list(&answer.certificates_der);
        let public_key = rcgen::PublicKeyData::subject_public_key_info(&key);
        if doubt.is_some() {
            // Whom it trusts, a site learns only from who has shown a certificate that is in its time, or from a CA that
            // it trusts already and that has signed the next one's key.
            tls::issued_for(&chain, &public_key, &current.roots).map_err(refused)?;
            let vouched = tls::vouched(&chain, &list(&answer.roots_der));
            let roots = current.roots.iter().chain(&vouched);
            answer.roots_der = roots.map(|root| root.to_vec().into()).collect();
            answer.trust_domain = current.trust_domain.to_string();
        } else {
            tls::issued_for(&chain, &public_key, &list(&answer.roots_der)).map_err(refused)?;
        }
        if let Some(doubt) = doubt {
            self.prove(&chain, &doubt.to_string()).map_err(refused)?;
        }
        self.keep(current, &key, &answer)
    }

    /// A certificate that was signed a moment ago tells the CA's time.
    fn prove(&self, chain: &[CertificateDer<'_>], doubt: &str) -> Result<(), String> {
        let leaf = chain.first().ok_or("it holds no certificate")?;
        let (not_before, _) = files::validity(leaf)?;
        let backdate = SignedDuration::try_from(CERTIFICATE_BACKDATE).unwrap_or_default();
        let now = not_before.saturating_add(backdate).unwrap_or(not_before);
        tracing::warn!(%doubt, proven = %now, "this machine's clock was not relied on; the CA has proven the time");
        self.time.attest(now);
        Ok(())
    }

    fn keep(
        &self,
        current: &Identity,
        key: &rcgen::KeyPair,
        answer: &JoinResponse,
    ) -> Result<Identity, RenewError> {
        join::save(&self.data_dir, &current.site, &current.provider, key, answer)
            .and_then(|()| Identity::load(&self.data_dir))
            .map_err(|e| RenewError::Refused(e.to_string()))
    }
}

fn list(all: &[bytes::Bytes]) -> Vec<CertificateDer<'static>> {
    all.iter().map(|der| CertificateDer::from(der.to_vec())).collect()
}

/// From two thirds of a certificate's life on, plus up to a twelfth of it: so that sites which joined together do not
/// renew together. The share follows from the certificate, so that a restart does not draw it anew.
fn due(identity: &Identity, now: Timestamp) -> bool {
    let life = identity.not_after.as_second() - identity.not_before.as_second();
    let leaf = identity.chain.first().map_or(&[][..], |leaf| leaf.as_ref());
    let share = Sha256::digest(leaf)[0];
    let jitter = life / 12 * i64::from(share) / 256;
    now.as_second() - identity.not_before.as_second() >= life / 3 * 2 + jitter
}

#[cfg(test)]
#[path = "renew_tests.rs"]
mod renew_tests;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_certificate_is_due_after_two_thirds_of_its_life_and_not_all_on_one_day() {
        let dir = tempfile::tempdir().unwrap();
        super::super::files::tests::joined(dir.path());
        let mut identity = Identity::load(dir.path()).unwrap();
        let at = |day: i64| Timestamp::from_second(day * 86_400).unwrap();
        (identity.not_before, identity.not_after) = (at(1_000), at(1_090));
        let mut days = std::collections::BTreeSet::new();
        for share in 0..=255_u8 {
            identity.chain = vec![CertificateDer::from(vec![share])];
            let day = (1_000..1_090).find(|day| due(&identity, at(*day))).unwrap();
            assert!((1_060..=1_068).contains(&day), "{day}");
            days.insert(day);
        }
        assert!(days.len() > 5, "{days:?}");
        assert!(due(&identity, at(5_000)));
    }
}
