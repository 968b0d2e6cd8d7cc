//! Renewals against providers that are what they say, and others.

use std::pin::Pin;
use std::sync::Mutex;

use futures::Stream;
use hyper_util::rt::TokioIo;
use rcgen::{
    BasicConstraints, CertificateParams, CertificateSigningRequestParams, IsCa, Issuer, KeyPair, SanType,
};
use rustls::pki_types::CertificateSigningRequestDer;
use skerry_proto::link::link_server::{self, LinkServer};
use skerry_proto::link::{CloudBulk, CloudControl, ConfirmResponse, EdgeBulk, EdgeControl, TunnelFrame};
use tonic::transport::{Channel, Endpoint};
use tonic::{Request, Response, Status, Streaming};

use super::super::testing::Hand;
use super::*;
use crate::clock::Clock;

fn stamp(text: &str) -> Timestamp {
    text.parse().unwrap()
}

/// A CA whose clock is set by hand.
struct Ca {
    issuer: Issuer<'static, KeyPair>,
    der: CertificateDer<'static>,
    clock: Arc<Hand>,
}

fn ca(now: &str) -> Arc<Ca> {
    let key = KeyPair::generate().unwrap();
    let mut params = CertificateParams::default();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let der = params.self_signed(&key).unwrap().der().clone();
    Arc::new(Ca {
        issuer: Issuer::new(params, key),
        der,
        clock: Hand::at(now),
    })
}

impl Ca {
    /// A site's certificate for the key of that request, good for 90 days.
    fn issue(&self, csr_der: &[u8]) -> CertificateDer<'static> {
        let request =
            CertificateSigningRequestParams::from_der(&CertificateSigningRequestDer::from(csr_der)).unwrap();
        let mut params = CertificateParams::default();
        let id = "spiffe://skerry.local/site/harbour";
        params.subject_alt_names = vec![SanType::URI(id.try_into().unwrap())];
        let now = std::time::SystemTime::from(self.clock.now());
        params.not_before = (now - CERTIFICATE_BACKDATE).into();
        params.not_after = (now + Duration::from_secs(90 * 86_400)).into();
        let certificate = params.signed_by(&request.public_key, &self.issuer).unwrap();
        certificate.der().clone()
    }

    fn answer(&self, certificate: &CertificateDer<'_>) -> JoinResponse {
        JoinResponse {
            certificates_der: vec![certificate.to_vec().into()],
            roots_der: vec![self.der.to_vec().into()],
            trust_domain: "skerry.local".to_owned(),
            waiting_key: String::new(),
        }
    }
}

type Answerer = Box<dyn Fn(&[u8]) -> Result<JoinResponse, Status> + Send + Sync>;

/// A provider that knows renewals only.
struct Renewing(Answerer, Mutex<u32>);

type Never<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

#[tonic::async_trait]
impl link_server::Link for Renewing {
    type ControlStream = Never<CloudControl>;
    type BulkStream = Never<CloudBulk>;
    type TunnelStream = Never<TunnelFrame>;

    async fn control(
        &self,
        _: Request<Streaming<EdgeControl>>,
    ) -> Result<Response<Self::ControlStream>, Status> {
        Err(Status::unimplemented(""))
    }

    async fn bulk(&self, _: Request<Streaming<EdgeBulk>>) -> Result<Response<Self::BulkStream>, Status> {
        Err(Status::unimplemented(""))
    }

    async fn tunnel(
        &self,
        _: Request<Streaming<TunnelFrame>>,
    ) -> Result<Response<Self::TunnelStream>, Status> {
        Err(Status::unimplemented(""))
    }

    async fn confirm(&self, _: Request<ConfirmRequest>) -> Result<Response<ConfirmResponse>, Status> {
        *self.1.lock().unwrap() += 1;
        Ok(Response::new(ConfirmResponse {}))
    }

    async fn renew(&self, request: Request<RenewRequest>) -> Result<Response<JoinResponse>, Status> {
        (self.0)(&request.get_ref().csr_der).map(Response::new)
    }
}

/// Reaches a provider in this process; remembers what it was asked for.
struct Inside {
    provider: Arc<Renewing>,
    for_renewal: Mutex<Vec<bool>>,
}

impl Inside {
    async fn open(&self, for_renewal: bool) -> Result<Channel, String> {
        self.for_renewal.lock().unwrap().push(for_renewal);
        let (near, far) = tokio::io::duplex(64 * 1024);
        let server = tonic::transport::Server::builder()
            .add_service(LinkServer::from_arc(Arc::clone(&self.provider)))
            .serve_with_incoming(futures::stream::iter([Ok::<_, std::io::Error>(far)]));
        tokio::spawn(server);
        let mut once = Some(TokioIo::new(near));
        let connector = tower::service_fn(move |_| {
            let stream = once.take();
            async move { stream.ok_or_else(|| std::io::Error::from(std::io::ErrorKind::NotConnected)) }
        });
        let endpoint = Endpoint::from_static("http://provider.skerry");
        endpoint
            .connect_with_connector(connector)
            .await
            .map_err(|e| e.to_string())
    }
}

#[async_trait::async_trait]
impl Dial for Inside {
    async fn dial(&self) -> Result<Channel, String> {
        self.open(false).await
    }

    async fn dial_for_renewal(&self) -> Result<Channel, String> {
        self.open(true).await
    }
}

struct Bench {
    _dir: tempfile::TempDir,
    dial: Arc<Inside>,
    time: Arc<TrustedTime>,
    identity: watch::Receiver<Arc<Identity>>,
    renewer: Renewer,
}

/// A site that joined on New Year's Day, and whose machine has that clock now.
fn bench(ca: &Ca, clock: Arc<Hand>, answer: Answerer) -> Bench {
    let dir = tempfile::tempdir().unwrap();
    let (key, csr) = join::new_key().unwrap();
    let answered = ca.answer(&ca.issue(&csr));
    join::save(
        dir.path(),
        &"harbour".parse().unwrap(),
        "127.0.0.1:1",
        &key,
        &answered,
    )
    .unwrap();
    let joined = Identity::load(dir.path()).unwrap();
    let time = Arc::new(TrustedTime::new(clock, joined.not_before, None, |_| {}));
    let (sender, identity) = watch::channel(Arc::new(joined));
    let dial = Arc::new(Inside {
        provider: Arc::new(Renewing(answer, Mutex::default())),
        for_renewal: Mutex::default(),
    });
    let renewer = Renewer {
        data_dir: dir.path().to_owned(),
        identity: sender,
        dial: dial.clone(),
        time: Arc::clone(&time),
        urge: Arc::new(Notify::new()),
    };
    Bench {
        _dir: dir,
        dial,
        time,
        identity,
        renewer,
    }
}

const JOINED: &str = "2026-01-01T00:00:00Z";

#[tokio::test]
async fn a_fresh_certificate_proves_the_time_to_a_machine_without_a_clock() {
    let ca = ca(JOINED);
    let signer = Arc::clone(&ca);
    let bench = bench(
        &ca,
        Hand::at("1970-01-01T00:00:05Z"),
        Box::new(move |csr| Ok(signer.answer(&signer.issue(csr)))),
    );
    ca.clock.set("2027-06-01T00:00:00Z");
    let current = Arc::clone(&bench.identity.borrow());
    let renewed = bench.renewer.renew(&current).await.unwrap();
    assert_eq!(*bench.dial.for_renewal.lock().unwrap(), [true]);
    assert_eq!(bench.time.doubt(), None);
    assert_eq!(bench.time.now(), stamp("2027-06-01T00:00:00Z"));
    assert_ne!(renewed.key.secret_der(), current.key.secret_der());
}

#[tokio::test]
async fn an_old_certificate_of_the_provider_proves_nothing() {
    let ca = ca(JOINED);
    let thief = self::ca(JOINED);
    // What somebody can answer who has the provider's old key, and old answers, but not the CA's key.
    let (_, other) = join::new_key().unwrap();
    let replayed = ca.answer(&ca.issue(&other));
    let own = Arc::clone(&thief);
    let own_roots = Arc::clone(&thief);
    let answers: [Answerer; 3] = [
        Box::new(move |_| Ok(replayed.clone())),
        Box::new(move |csr| Ok(own.answer(&own.issue(csr)))),
        Box::new(move |csr| {
            let mut answer = own_roots.answer(&own_roots.issue(csr));
            answer.certificates_der.push(own_roots.der.to_vec().into());
            Ok(answer)
        }),
    ];
    for answer in answers {
        let bench = bench(&ca, Hand::at("1970-01-01T00:00:05Z"), answer);
        let current = Arc::clone(&bench.identity.borrow());
        let refused = bench.renewer.renew(&current).await;
        assert!(matches!(refused, Err(RenewError::Refused(_))), "{refused:?}");
        assert!(bench.time.doubt().is_some());
        let kept = Identity::load(&bench.renewer.data_dir).unwrap();
        assert_eq!(
            (kept.chain, kept.roots),
            (current.chain.clone(), current.roots.clone())
        );
    }
}

#[tokio::test]
async fn in_doubt_the_answers_roots_are_ignored_and_otherwise_they_are_taken() {
    for (clock, in_doubt) in [("1970-01-01T00:00:05Z", true), ("2026-01-02T00:00:00Z", false)] {
        let ca = ca(JOINED);
        let signer = Arc::clone(&ca);
        let further = self::ca(JOINED).der.clone();
        let more = further.clone();
        let bench = bench(
            &ca,
            Hand::at(clock),
            Box::new(move |csr| {
                let mut answer = signer.answer(&signer.issue(csr));
                answer.roots_der.push(more.to_vec().into());
                Ok(answer)
            }),
        );
        let current = Arc::clone(&bench.identity.borrow());
        let renewed = bench.renewer.renew(&current).await.unwrap();
        assert_eq!(renewed.roots.contains(&further), !in_doubt, "{clock}");
        assert!(renewed.roots.contains(&ca.der));
    }
}

#[tokio::test(start_paused = true)]
async fn a_refused_certificate_is_renewed_when_urged_and_a_good_one_is_left_alone() {
    let ca = ca(JOINED);
    let signer = Arc::clone(&ca);
    let asked = Arc::new(Mutex::new(0));
    let count = Arc::clone(&asked);
    let bench = bench(
        &ca,
        Hand::at("2026-01-02T00:00:00Z"),
        Box::new(move |csr| {
            let mut asked = count.lock().unwrap();
            *asked += 1;
            if *asked < 3 {
                return Err(Status::permission_denied("not yet"));
            }
            Ok(signer.answer(&signer.issue(csr)))
        }),
    );
    let (urge, mut identity) = (Arc::clone(&bench.renewer.urge), bench.identity.clone());
    let provider = Arc::clone(&bench.dial.provider);
    let stop = CancellationToken::new();
    let running = tokio::spawn(bench.renewer.run(stop.clone()));
    tokio::time::sleep(Duration::from_secs(86_400)).await;
    assert_eq!(*asked.lock().unwrap(), 0);
    urge.notify_one();
    // It comes back for it after a refusal, more and more slowly.
    while *asked.lock().unwrap() < 3 {
        tokio::time::sleep(Duration::from_secs(1)).await;
        urge.notify_one();
    }
    identity.changed().await.unwrap();
    // The new one is shown once, so that the old one is worth nothing any more.
    while *provider.1.lock().unwrap() == 0 {
        tokio::time::sleep(Duration::from_secs(1)).await;
    }
    stop.cancel();
    running.await.unwrap();
}

/// Wall and steady clock that go with tokio's, which a test runs at its own pace.
struct Paced(Timestamp, Instant);

impl Clock for Paced {
    fn now(&self) -> Timestamp {
        self.0 + SignedDuration::try_from(self.1.elapsed()).unwrap()
    }

    fn steady(&self) -> Duration {
        self.1.elapsed()
    }
}

#[tokio::test(start_paused = true)]
async fn in_two_years_a_site_has_a_valid_certificate_every_day_and_a_new_key_with_each() {
    let ca = ca(JOINED);
    let (signer, hand) = (Arc::clone(&ca), Arc::clone(&ca.clock));
    let clock = Arc::new(Paced(stamp(JOINED), Instant::now()));
    let (site_clock, ca_clock) = (clock.clone(), clock.clone());
    let answer: Answerer = Box::new(move |csr| {
        hand.set(&ca_clock.now().to_string());
        Ok(signer.answer(&signer.issue(csr)))
    });
    let Bench {
        _dir,
        mut renewer,
        mut identity,
        ..
    } = bench(&ca, Hand::at(JOINED), answer);
    let issued = identity.borrow().not_before;
    renewer.time = Arc::new(TrustedTime::new(site_clock, issued, None, |_| {}));
    let stop = CancellationToken::new();
    let running = tokio::spawn(renewer.run(stop.clone()));
    let mut keys = vec![identity.borrow_and_update().key.secret_der().to_vec()];
    for day in 0..730 {
        tokio::time::sleep(Duration::from_secs(86_400)).await;
        let now = clock.now();
        let current = identity.borrow_and_update().clone();
        assert!(current.not_before <= now && now < current.not_after, "day {day}");
        // There is time left for a month of outage, at any moment.
        let left = current.not_after.duration_since(now);
        assert!(left > SignedDuration::from_hours(24 * 22), "day {day}: {left:?}");
        let key = current.key.secret_der().to_vec();
        if keys.last() != Some(&key) {
            assert!(!keys.contains(&key));
            keys.push(key);
        }
    }
    stop.cancel();
    running.await.unwrap();
    assert!((11..=13).contains(&keys.len()), "{} keys", keys.len());
}
