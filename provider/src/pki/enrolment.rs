//! Enrolment over gRPC.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use jiff::Timestamp;
use kube::Client;
use serde_json::json;
use skerry_proto::SiteName;
use skerry_proto::link::{JoinRequest, JoinResponse, enrolment_server};
use skerry_proto::object::Uid;
use skerry_proto::token::JoinToken;
use tokio::sync::Semaphore;
use tonic::{Request, Response, Status};

use super::tokens::{self, TokenError};
use super::{Authority, CertificateRecord, Issued, approval};
use crate::sites;

/// Largest certificate request taken.
const MAX_CSR_BYTES: usize = 16 * 1024;
/// Refused joins that may follow each other at once, and how often one more is allowed after that.
const REFUSALS: u32 = 20;
const REFUSAL_EVERY: Duration = Duration::from_secs(1);
/// Joins that are looked at together; more wait. Bounds how far a flood gets before its first refusal counts.
const AT_ONCE: usize = 16;

/// The one service that is open to clients without a certificate.
pub struct EnrolmentService {
    authority: Authority,
    client: Client,
    namespace: String,
    refusals: Mutex<Refusals>,
    places: Semaphore,
}

/// A token bucket: guessing tokens is hopeless anyway, and must not cost the API server much.
struct Refusals {
    left: u32,
    refilled: Instant,
}

impl Refusals {
    fn new(now: Instant) -> Self {
        Self {
            left: REFUSALS,
            refilled: now,
        }
    }

    /// Whether another join may be looked at.
    fn allow(&mut self, now: Instant) -> bool {
        let since = now.saturating_duration_since(self.refilled);
        let earned = u32::try_from(since.as_secs() / REFUSAL_EVERY.as_secs()).unwrap_or(u32::MAX);
        if earned >= REFUSALS {
            *self = Self::new(now);
        } else {
            self.left = self.left.saturating_add(earned).min(REFUSALS);
            // The rest of a second counts towards the next one.
            self.refilled += REFUSAL_EVERY * earned;
        }
        self.left > 0
    }

    fn count(&mut self) {
        self.left = self.left.saturating_sub(1);
    }
}

impl EnrolmentService {
    /// Enrols sites with tokens from that namespace.
    pub fn new(authority: Authority, client: Client, namespace: String) -> Self {
        let refusals = Mutex::new(Refusals::new(Instant::now()));
        Self {
            authority,
            client,
            namespace,
            refusals,
            places: Semaphore::new(AT_ONCE),
        }
    }

    async fn enrol(&self, request: &JoinRequest) -> Result<JoinResponse, Status> {
        let token: JoinToken = request
            .token
            .parse()
            .map_err(|e: skerry_proto::token::InvalidToken| Status::invalid_argument(e.to_string()))?;
        if request.site != token.site.as_str() {
            return Err(Status::permission_denied(format!(
                "the join token is for site {}, not for {:?}",
                token.site, request.site
            )));
        }
        let presented = tokens::present(&self.client, &self.namespace, &token, Timestamp::now())
            .await
            .map_err(refusal)?;
        // Only who holds a good token learns whether there is such a Site.
        let found = sites::get(&self.client, &token.site)
            .await
            .map_err(|e| unavailable(&e))?;
        let Some((uid, declared)) =
            found.and_then(|site| Some((Uid::from(site.metadata.uid.clone()?), site.data)))
        else {
            return Err(Status::failed_precondition(
                TokenError::NoSite(token.site).to_string(),
            ));
        };
        if presented.site_uid() != uid {
            return Err(refusal(TokenError::EarlierSite(token.site)));
        }
        if request.csr_der.len() > MAX_CSR_BYTES {
            return Err(Status::invalid_argument("the certificate request is too large"));
        }
        let key = Authority::request_key(&request.csr_der)
            .map_err(|e| Status::invalid_argument(format!("the certificate request cannot be read: {e}")))?;
        if approval::waits(&declared["spec"], &key) {
            return self
                .wait_for_approval(&token.site, &declared["status"], key)
                .await;
        }
        // Before the token is used up: a request that cannot be signed should not cost it.
        let issued = issue(&self.authority, &request.csr_der, &token.site, &uid)?;
        presented
            .consume(&self.client, &self.namespace)
            .await
            .map_err(refusal)?;
        tracing::info!(site = %token.site, serial = %issued.serial, "a site was enrolled");
        let status = json!({
            "state": "Enrolled",
            "enrolment": null,
            "certificate": CertificateRecord::new(&issued, None).to_json(),
        });
        if let Err(error) = sites::patch_status(&self.client, &token.site, status).await {
            // The certificate is issued and the token used: the status follows with the first connection.
            tracing::warn!(site = %token.site, %error, "the Site's status was not updated after its enrolment");
        }
        Ok(answer(&self.authority, &issued))
    }

    /// Shows the key to whoever approves.
    async fn wait_for_approval(
        &self,
        site: &SiteName,
        status: &serde_json::Value,
        key: String,
    ) -> Result<JoinResponse, Status> {
        if let Some(shown) = approval::request(status, &key, Timestamp::now()) {
            tracing::info!(%site, key, "a machine waits for its approval");
            sites::patch_status(&self.client, site, shown)
                .await
                .map_err(|e| unavailable(&e))?;
        }
        Ok(JoinResponse {
            waiting_key: key,
            ..Default::default()
        })
    }

    fn throttle(&self) -> Result<(), Status> {
        let mut refusals = self.refusals.lock().unwrap_or_else(PoisonError::into_inner);
        if !refusals.allow(Instant::now()) {
            return Err(Status::resource_exhausted(
                "too many refused joins; wait a few seconds and try again",
            ));
        }
        Ok(())
    }

    fn count_refusal(&self) {
        self.refusals
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .count();
    }
}

#[tonic::async_trait]
impl enrolment_server::Enrolment for EnrolmentService {
    async fn join(&self, request: Request<JoinRequest>) -> Result<Response<JoinResponse>, Status> {
        let _place = self
            .places
            .acquire()
            .await
            .map_err(|_| Status::unavailable("the provider is shutting down"))?;
        self.throttle()?;
        let answer = self.enrol(request.get_ref()).await;
        if let Err(status) = &answer {
            self.count_refusal();
            tracing::warn!(site = %request.get_ref().site.chars().take(80).collect::<String>(), reason = status.message(), "a join was refused");
        }
        answer.map(Response::new)
    }
}

pub(super) fn issue(
    authority: &Authority,
    csr_der: &[u8],
    site: &SiteName,
    uid: &Uid,
) -> Result<Issued, Status> {
    if csr_der.len() > MAX_CSR_BYTES {
        return Err(Status::invalid_argument("the certificate request is too large"));
    }
    authority.issue_site(csr_der, site, uid).map_err(|error| {
        Status::invalid_argument(format!("the certificate request cannot be signed: {error}"))
    })
}

pub(super) fn answer(authority: &Authority, issued: &Issued) -> JoinResponse {
    JoinResponse {
        certificates_der: std::iter::once(&issued.certificate)
            .chain(&issued.intermediates)
            .map(|der| der.to_vec().into())
            .collect(),
        roots_der: authority.roots().iter().map(|der| der.to_vec().into()).collect(),
        trust_domain: authority.trust_domain().to_string(),
        waiting_key: String::new(),
    }
}

fn refusal(error: TokenError) -> Status {
    match error {
        TokenError::Api(error) => unavailable(&error),
        refused => Status::permission_denied(refused.to_string()),
    }
}

fn unavailable(error: &kube::Error) -> Status {
    Status::unavailable(format!("the provider cannot reach the Kubernetes API: {error}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn after_a_row_of_refusals_joins_are_let_in_one_a_second() {
        let start = Instant::now();
        let at = |millis| start + Duration::from_millis(millis);
        let mut refusals = Refusals::new(start);
        for _ in 0..REFUSALS {
            assert!(refusals.allow(start));
            refusals.count();
        }
        assert!(!refusals.allow(at(600)));
        // Asking meanwhile does not put off the next place.
        assert!(!refusals.allow(at(999)));
        assert!(refusals.allow(at(1_000)));
        refusals.count();
        assert!(!refusals.allow(at(1_900)));
        assert!(refusals.allow(at(2_000)));
    }

    #[test]
    fn a_long_calm_earns_no_more_than_the_first_row() {
        let start = Instant::now();
        let mut refusals = Refusals::new(start);
        let later = start + Duration::from_secs(86_400);
        for _ in 0..REFUSALS {
            assert!(refusals.allow(later));
            refusals.count();
        }
        assert!(!refusals.allow(later));
    }
}
