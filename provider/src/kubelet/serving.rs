//! A serving certificate that the cluster's own signer has issued, so that the API server and monitors can check it
//! against the CA that they use for kubelets.
//!
//! A request for `kubernetes.io/kubelet-serving` is made as a kubelet makes one, with every address of this provider.
//! Somebody must approve it (`kubectl certificate approve`, or an approver): Kubernetes never does by itself. Until
//! then, and where that never happens, the certificate of Skerry's own CA is shown, and log and metric say so. What was
//! issued is kept in a Secret, so that a restart needs no new approval.
//!
//! What must always hold: there is a certificate to show at any time; a new one is used for the next connection on.

use std::sync::Arc;
use std::time::Duration;

use futures::future::BoxFuture;
use jiff::{SignedDuration, Timestamp};
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::{RootCertStore, ServerConfig};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::server_config;
use crate::metrics::Metrics;

/// After a failure, before the next try; doubled up to the longest.
const FIRST_PAUSE: Duration = Duration::from_secs(30);
const LONGEST_PAUSE: Duration = Duration::from_secs(3600);

/// A certificate with its key and its time.
#[derive(Debug)]
pub struct Issued {
    /// The certificate, then intermediates.
    pub chain: Vec<CertificateDer<'static>>,
    /// Its key.
    pub key: PrivateKeyDer<'static>,
    /// From when it is good.
    pub not_before: Timestamp,
    /// Until when it is good.
    pub not_after: Timestamp,
}

impl Issued {
    /// When it is to be replaced: after 70 to 90 % of its life, as a kubelet does; `lot` in 0..1 says where between.
    fn renew_at(&self, lot: f64) -> Timestamp {
        let life = self.not_after.duration_since(self.not_before);
        let part = SignedDuration::from_secs_f64(life.as_secs_f64().max(0.0) * (0.7 + 0.2 * lot));
        self.not_before.checked_add(part).unwrap_or(self.not_after)
    }
}

/// Why there is no certificate from the cluster. Retried with growing pauses.
#[derive(Debug, thiserror::Error)]
pub enum ServingError {
    /// The Kubernetes API refused or failed.
    #[error("{what}: {source}")]
    Api {
        /// What was tried.
        what: String,
        /// Why not.
        source: kube::Error,
    },
    /// Somebody has said no, or the signer could not.
    #[error("CertificateSigningRequest {name} was not signed: {reason}")]
    Refused {
        /// Its name.
        name: String,
        /// The condition's words.
        reason: String,
    },
    /// What was issued cannot be used.
    #[error("the issued certificate cannot be used: {0}")]
    Unusable(String),
}

/// Where certificates come from.
pub trait Issuer: Send + Sync + 'static {
    /// The one that was kept from an earlier life, if it is still good for this provider.
    fn kept(&self) -> BoxFuture<'_, Option<Issued>>;

    /// Asks for a new one and waits until it is there, for days if need be.
    fn issue(&self) -> BoxFuture<'_, Result<Issued, ServingError>>;
}

/// What is shown to clients from now on: the cluster's certificate while there is one, else what `own` has.
pub fn serve(
    issuer: Arc<dyn Issuer>,
    client_ca: Option<RootCertStore>,
    own: watch::Receiver<Arc<ServerConfig>>,
    metrics: Arc<Metrics>,
    stop: CancellationToken,
) -> watch::Receiver<Arc<ServerConfig>> {
    let (shown, receiver) = watch::channel(own.borrow().clone());
    let keeper = Keeper {
        issuer,
        client_ca,
        own,
        metrics,
        shown,
    };
    tokio::spawn(async move {
        tokio::select! {
            () = stop.cancelled() => {}
            () = keeper.run() => {}
        }
    });
    receiver
}

struct Keeper {
    issuer: Arc<dyn Issuer>,
    client_ca: Option<RootCertStore>,
    own: watch::Receiver<Arc<ServerConfig>>,
    metrics: Arc<Metrics>,
    shown: watch::Sender<Arc<ServerConfig>>,
}

impl Keeper {
    async fn run(mut self) {
        self.metrics.set_serving_by_cluster(None);
        let mut held = self.issuer.kept().await.and_then(|kept| self.show(kept));
        loop {
            let next = obtain(Arc::clone(&self.issuer), held.map(|times| times.renew_at));
            tokio::pin!(next);
            let issued = loop {
                let expiry = held.map(|times| times.not_after);
                tokio::select! {
                    issued = &mut next => break issued,
                    () = until(expiry) => {
                        tracing::error!("the cluster's serving certificate has expired; that of Skerry's own CA is shown");
                        held = None;
                        self.fall_back();
                    }
                    changed = self.own.changed() => match (changed, held) {
                        (Ok(()), None) => self.fall_back(),
                        (Ok(()), Some(_)) => {}
                        // The provider is ending.
                        (Err(_), _) => return,
                    },
                }
            };
            held = self.show(issued);
            if held.is_none() {
                tokio::time::sleep(LONGEST_PAUSE).await;
            }
        }
    }

    fn show(&self, issued: Issued) -> Option<Times> {
        let times = Times {
            renew_at: issued.renew_at(rand::random()),
            not_after: issued.not_after,
        };
        match server_config(issued.chain, issued.key, self.client_ca.clone()) {
            Ok(config) => {
                tracing::info!(until = %times.not_after, "the kubelet API shows a certificate of the cluster's signer");
                self.shown.send_replace(Arc::new(config));
                self.metrics.set_serving_by_cluster(Some(times.not_after));
                Some(times)
            }
            Err(error) => {
                tracing::error!(%error, "the certificate of the cluster's signer cannot be used; that of Skerry's own CA is shown");
                None
            }
        }
    }

    fn fall_back(&self) {
        self.shown.send_replace(self.own.borrow().clone());
        self.metrics.set_serving_by_cluster(None);
    }
}

#[derive(Clone, Copy)]
struct Times {
    renew_at: Timestamp,
    not_after: Timestamp,
}

/// A new certificate, asked for at that time, again and again until there is one.
async fn obtain(issuer: Arc<dyn Issuer>, at: Option<Timestamp>) -> Issued {
    if at.is_some() {
        until(at).await;
    }
    let mut pause = FIRST_PAUSE;
    loop {
        match issuer.issue().await {
            Ok(issued) => return issued,
            Err(error) => {
                tracing::warn!(%error, again_in = ?pause,
                    "the cluster's signer has given no serving certificate; the kubelet API goes on with what it has");
            }
        }
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(LONGEST_PAUSE);
    }
}

/// Waits for a point of wall time; for ever without one.
async fn until(time: Option<Timestamp>) {
    let Some(time) = time else {
        return std::future::pending().await;
    };
    // In pieces: a machine that slept, or whose clock was set, must notice.
    while let Ok(left) = Duration::try_from(time.duration_since(Timestamp::now())) {
        if left.is_zero() {
            return;
        }
        tokio::time::sleep(left.min(Duration::from_secs(60))).await;
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;

    fn certificate(name: &str, valid: Duration) -> Issued {
        let key = rcgen::KeyPair::generate().unwrap();
        let params = rcgen::CertificateParams::new(vec![name.to_owned()]).unwrap();
        let certificate = params.self_signed(&key).unwrap();
        let now = Timestamp::now();
        Issued {
            chain: vec![certificate.der().clone()],
            key: PrivateKeyDer::try_from(key.serialize_der()).unwrap(),
            not_before: now,
            not_after: now.checked_add(SignedDuration::try_from(valid).unwrap()).unwrap(),
        }
    }

    fn config(issued: Issued) -> Arc<ServerConfig> {
        Arc::new(server_config(issued.chain, issued.key, None).unwrap())
    }

    /// Issues what it is given, one after the other, then fails.
    struct Given(Mutex<Vec<Issued>>, Mutex<Option<Issued>>);

    impl Issuer for Given {
        fn kept(&self) -> BoxFuture<'_, Option<Issued>> {
            let kept = self.1.lock().unwrap().take();
            Box::pin(async move { kept })
        }

        fn issue(&self) -> BoxFuture<'_, Result<Issued, ServingError>> {
            let mut given = self.0.lock().unwrap();
            let next = if given.is_empty() {
                None
            } else {
                Some(given.remove(0))
            };
            Box::pin(async move { next.ok_or_else(|| ServingError::Unusable("none left".into())) })
        }
    }

    fn start(
        given: Vec<Issued>,
        kept: Option<Issued>,
    ) -> (
        watch::Receiver<Arc<ServerConfig>>,
        watch::Sender<Arc<ServerConfig>>,
        Arc<Metrics>,
    ) {
        let (own_sender, own) = watch::channel(config(certificate("own", Duration::from_secs(3600))));
        let metrics = Arc::new(Metrics::new());
        let issuer = Arc::new(Given(Mutex::new(given), Mutex::new(kept)));
        let shown = serve(issuer, None, own, metrics.clone(), CancellationToken::new());
        (shown, own_sender, metrics)
    }

    #[tokio::test]
    async fn an_issued_certificate_is_shown_and_replaced_before_it_expires() {
        let second = Duration::from_secs(1);
        let (mut shown, own, _) = start(
            vec![certificate("a", second), certificate("b", second * 3600)],
            None,
        );
        let first = shown.borrow().clone();
        assert!(Arc::ptr_eq(&first, &own.borrow()));
        shown.changed().await.unwrap();
        let a = shown.borrow_and_update().clone();
        assert!(!Arc::ptr_eq(&a, &first));
        // 70 to 90 % of a second later.
        shown.changed().await.unwrap();
        assert!(!Arc::ptr_eq(&a, &shown.borrow_and_update()));
    }

    #[tokio::test]
    async fn without_a_new_one_the_own_certificate_comes_back_when_the_issued_expires() {
        let kept = certificate("kept", Duration::from_millis(300));
        let (mut shown, own, _) = start(vec![], Some(kept));
        shown.changed().await.unwrap();
        assert!(!Arc::ptr_eq(&shown.borrow_and_update(), &own.borrow()));
        shown.changed().await.unwrap();
        assert!(Arc::ptr_eq(&shown.borrow_and_update(), &own.borrow()));
        // From now on it follows the own one.
        let renewed = config(certificate("renewed", Duration::from_secs(3600)));
        own.send_replace(renewed.clone());
        shown.changed().await.unwrap();
        assert!(Arc::ptr_eq(&shown.borrow_and_update(), &renewed));
    }

    #[test]
    fn renewal_is_between_seven_and_nine_tenths_of_the_life() {
        let issued = certificate("x", Duration::from_secs(1000));
        for (lot, after) in [(0.0, 700), (1.0, 900)] {
            let pause = issued.renew_at(lot).duration_since(issued.not_before);
            assert!((pause.as_secs() - after).abs() <= 1, "{pause:?}");
        }
    }
}
