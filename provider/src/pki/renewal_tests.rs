//! Renewal against a ledger in memory.

use std::sync::Mutex;

use jiff::{SignedDuration, Timestamp};
use rcgen::{CertificateParams, KeyPair};
use skerry_proto::SiteName;
use skerry_proto::object::Uid;

use super::super::ledger::Page;
use super::super::standing::GRACE;
use super::*;

struct Hand(Mutex<Timestamp>);

impl Clock for Hand {
    fn now(&self) -> Timestamp {
        *self.0.lock().unwrap()
    }
}

/// One site's page; every `conflicts` writes are refused first.
struct Book {
    page: Mutex<Option<Page>>,
    conflicts: Mutex<usize>,
}

#[async_trait::async_trait]
impl Ledger for Book {
    async fn read(&self, _site: &SiteName) -> Result<Option<Page>, String> {
        Ok(self.page.lock().unwrap().clone())
    }

    async fn write(&self, _: &SiteName, version: &str, record: &CertificateRecord) -> Result<bool, String> {
        let mut conflicts = self.conflicts.lock().unwrap();
        if *conflicts > 0 {
            *conflicts -= 1;
            return Ok(false);
        }
        let mut page = self.page.lock().unwrap();
        let page = page.as_mut().unwrap();
        assert_eq!(page.version, version);
        page.version = format!("{}x", page.version);
        page.record = record.clone();
        Ok(true)
    }
}

#[derive(Default)]
struct Heard(Mutex<Vec<Matter>>);

#[async_trait::async_trait]
impl Audit for Heard {
    async fn note(&self, _: &SitePeer, matter: Matter, _: &str) {
        self.0.lock().unwrap().push(matter);
    }
}

struct Bench {
    clock: Arc<Hand>,
    book: Arc<Book>,
    heard: Arc<Heard>,
    renewals: Renewals,
}

fn request() -> RenewRequest {
    let key = KeyPair::generate().unwrap();
    let csr = CertificateParams::default().serialize_request(&key).unwrap();
    RenewRequest {
        csr_der: csr.der().to_vec().into(),
    }
}

fn uid() -> Uid {
    Uid::from("u".to_owned())
}

/// A bench with a site that has joined.
fn bench() -> (Bench, SitePeer) {
    let clock = Arc::new(Hand(Mutex::new("2026-01-01T00:00:00Z".parse().unwrap())));
    let authority = Authority::ephemeral(&"skerry.local".parse().unwrap()).with_clock(clock.clone());
    let issued = issue(
        &authority,
        &request().csr_der,
        &"harbour".parse().unwrap(),
        &uid(),
    )
    .unwrap();
    let peer = authority
        .peer_site(std::slice::from_ref(&issued.certificate))
        .unwrap()
        .unwrap();
    let book = Arc::new(Book {
        page: Mutex::new(Some(Page {
            uid: uid(),
            record: CertificateRecord::new(&issued, None),
            revoked: Revoked::default(),
            version: "1".to_owned(),
        })),
        conflicts: Mutex::new(0),
    });
    let heard = Arc::new(Heard::default());
    let renewals = Renewals {
        authority,
        ledger: book.clone(),
        audit: heard.clone(),
        clock: clock.clone(),
        grace: GRACE,
    };
    let bench = Bench {
        clock,
        book,
        heard,
        renewals,
    };
    (bench, peer)
}

impl Bench {
    fn pass(&self, days: i64) {
        let mut now = self.clock.0.lock().unwrap();
        *now = now.checked_add(SignedDuration::from_hours(24 * days)).unwrap();
    }

    async fn renew(&self, peer: &SitePeer) -> Result<SitePeer, Status> {
        let (answer, _) = self.renewals.renew(peer, &request()).await?;
        let leaf = rustls::pki_types::CertificateDer::from(answer.certificates_der[0].to_vec());
        Ok(self.renewals.authority.peer_site(&[leaf]).unwrap().unwrap())
    }

    fn heard(&self) -> Vec<Matter> {
        std::mem::take(&mut *self.heard.0.lock().unwrap())
    }
}

#[tokio::test]
async fn an_expired_certificate_renews_within_the_grace_and_is_told_of() {
    let (bench, peer) = bench();
    bench.pass(90 + 179);
    let renewed = bench.renew(&peer).await.unwrap();
    assert_ne!(renewed.serial, peer.serial);
    assert_eq!(renewed.uid, peer.uid);
    assert!(standing(&renewed, bench.clock.now(), GRACE) == Standing::Current);
    assert_eq!(bench.heard(), [Matter::RenewedLate]);
    let record = bench.book.page.lock().unwrap().clone().unwrap().record;
    assert_eq!(
        (record.serial, record.previous),
        (renewed.serial, Some(peer.serial))
    );
}

#[tokio::test]
async fn after_the_grace_it_is_refused_with_the_remedy() {
    let (bench, peer) = bench();
    bench.pass(90 + 181);
    let refusal = bench.renew(&peer).await.unwrap_err();
    assert_eq!(refusal.code(), tonic::Code::PermissionDenied);
    assert!(refusal.message().contains("skerry-edge join"), "{refusal}");
    assert_eq!(bench.heard(), [Matter::TooLate]);
}

#[tokio::test]
async fn a_lost_answer_may_be_asked_for_again_but_a_used_successor_ends_it() {
    let (bench, old) = bench();
    bench.pass(100);
    bench.renew(&old).await.unwrap();
    let second = bench.renew(&old).await.unwrap();
    assert_eq!(bench.heard(), [Matter::RenewedLate, Matter::RenewedLate]);
    bench.renewals.used(&second).await.unwrap();
    let refusal = bench.renew(&old).await.unwrap_err();
    assert!(refusal.message().contains("old copy"), "{refusal}");
    assert_eq!(bench.heard(), [Matter::OldCopy]);
    // The site itself goes on.
    bench.pass(60);
    bench.renew(&second).await.unwrap();
    assert_eq!(bench.heard(), [Matter::Renewed]);
}

#[tokio::test]
async fn the_use_of_an_older_certificate_does_not_end_its_own_time() {
    let (bench, old) = bench();
    bench.pass(61);
    bench.renew(&old).await.unwrap();
    // The answer was lost, and the site comes back with what it has.
    bench.renewals.used(&old).await.unwrap();
    assert!(bench.renew(&old).await.is_ok());
}

#[tokio::test]
async fn a_revoked_certificate_renews_nothing() {
    let (bench, peer) = bench();
    bench.book.page.lock().unwrap().as_mut().unwrap().revoked.serials = vec![peer.serial.clone()];
    let refusal = bench.renew(&peer).await.unwrap_err();
    assert!(refusal.message().contains("revoked"), "{refusal}");
    assert_eq!(bench.heard(), [Matter::Revoked]);
}

#[tokio::test]
async fn a_site_that_was_deleted_or_made_anew_renews_nothing() {
    let (bench, peer) = bench();
    bench.book.page.lock().unwrap().as_mut().unwrap().uid = Uid::from("other".to_owned());
    assert!(bench.renew(&peer).await.is_err());
    *bench.book.page.lock().unwrap() = None;
    assert!(bench.renew(&peer).await.is_err());
}

#[tokio::test]
async fn a_site_that_changes_meanwhile_is_looked_at_again() {
    let (bench, peer) = bench();
    *bench.book.conflicts.lock().unwrap() = 3;
    bench.renew(&peer).await.unwrap();
    *bench.book.conflicts.lock().unwrap() = 100;
    let busy = bench.renew(&peer).await.unwrap_err();
    assert_eq!(busy.code(), tonic::Code::Unavailable);
}

/// Two years of a hundred sites that are away for up to half a year at random, of which some lose an answer now and then.
#[tokio::test]
async fn a_hundred_sites_live_through_two_years_of_outages_without_a_person() {
    use rand::rngs::StdRng;
    use rand::{Rng, SeedableRng};

    struct Place {
        bench: Bench,
        /// What the site has on its disk.
        held: SitePeer,
        away_until: i64,
        renewals: u32,
    }

    let mut random = StdRng::seed_from_u64(8);
    let mut places: Vec<Place> = (0..100)
        .map(|_| {
            let (bench, held) = bench();
            Place {
                bench,
                held,
                away_until: 0,
                renewals: 0,
            }
        })
        .collect();
    let (mut late, mut lost) = (0, 0);
    for day in 0..730 {
        for place in &mut places {
            place.bench.pass(1);
            if day < place.away_until {
                continue;
            }
            let now = place.bench.clock.now();
            // Connected in its time, or it must be able to renew.
            let good = standing(&place.held, now, GRACE);
            assert_ne!(good, Standing::Gone, "day {day}");
            let age = now.duration_since(place.held.not_before);
            if good == Standing::Current {
                place.bench.renewals.used(&place.held).await.unwrap();
                if age < SignedDuration::from_hours(24 * 60) {
                    if random.random_bool(0.01) {
                        place.away_until = day + random.random_range(1..=180);
                    }
                    continue;
                }
            }
            late += u32::from(good == Standing::RenewalOnly);
            let renewed = place.bench.renew(&place.held).await.unwrap();
            if random.random_bool(0.1) {
                lost += 1;
                continue;
            }
            assert_ne!(renewed.serial, place.held.serial);
            place.held = renewed;
            place.renewals += 1;
        }
    }
    assert!(
        late > 50 && lost > 50,
        "{late} late, {lost} lost: the test has not tested much"
    );
    for place in places {
        assert!((3..=13).contains(&place.renewals), "{}", place.renewals);
        let heard = place.bench.heard();
        let good = [Matter::Renewed, Matter::RenewedLate];
        assert!(heard.iter().all(|matter| good.contains(matter)), "{heard:?}");
    }
}
