//! Who may begin a session now, when all sites come at once.
//!
//! Beginning a session is the dear part of it: the inventory is compared, objects go out, the Node and the pods are
//! reported. A few dozen sites at a time do so; some wait a little; the rest is told to come back, each at another time,
//! so that the work is done at the pace at which it can be done and nobody's attempt runs into its deadline half way. A
//! site that is told to come back has lost a TLS handshake and nothing else.
//!
//! Handshakes themselves are limited in [`super::connection`]; what comes faster than that waits in the kernel.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use prometheus_client::metrics::counter::Counter;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::Instant;

/// Sessions that begin at one time.
const PLACES: usize = 64;
/// How long a site waits for a place, well below the edge's patience for its first answer.
const PATIENCE: Duration = Duration::from_secs(4);
/// Sites that wait at one time.
const WAITING: usize = 512;
/// A place is given back after this long at the latest: a site on a bad line must not keep others out.
const TENURE: Duration = Duration::from_secs(5);
/// Sites are told to come back at least and at most this much later.
const SOONEST: Duration = Duration::from_secs(2);
const LATEST: Duration = Duration::from_secs(60);
/// The pace that is assumed at least, sites a second.
const SLOWEST: f64 = 20.0;

/// The way in.
#[derive(Clone)]
pub struct Arrivals {
    places: Arc<Semaphore>,
    waiting: Arc<Semaphore>,
    book: Arc<Mutex<Book>>,
    shed: Counter,
}

/// A place to begin a session. Dropping it lets the next one in.
#[derive(Debug)]
pub struct Place(#[allow(dead_code, reason = "held for its drop")] Option<OwnedSemaphorePermit>);

/// There is no place for now: come back after this long.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ComeBack(pub Duration);

/// When those who were sent away come back.
struct Book {
    /// The next free time.
    next: Instant,
    /// Who was let in during the present second, and in the whole second before.
    second: Instant,
    admitted: u32,
    before: u32,
}

impl Arrivals {
    /// Nobody is there yet; those who are sent away are counted.
    pub fn new(shed: Counter) -> Self {
        let now = Instant::now();
        Self {
            places: Arc::new(Semaphore::new(PLACES)),
            waiting: Arc::new(Semaphore::new(WAITING)),
            book: Arc::new(Mutex::new(Book {
                next: now,
                second: now,
                admitted: 0,
                before: 0,
            })),
            shed,
        }
    }

    /// Waits a little for a place.
    pub async fn admit(&self) -> Result<Place, ComeBack> {
        let Ok(_waiting) = self.waiting.try_acquire() else {
            return Err(self.come_back());
        };
        match tokio::time::timeout(PATIENCE, Arc::clone(&self.places).acquire_owned()).await {
            Ok(place) => {
                self.book().admit(Instant::now());
                // The semaphore is never closed.
                Ok(Place(place.ok()))
            }
            Err(_) => Err(self.come_back()),
        }
    }

    fn come_back(&self) -> ComeBack {
        self.shed.inc();
        ComeBack(self.book().slot(Instant::now()))
    }

    fn book(&self) -> MutexGuard<'_, Book> {
        // Every entry is whole at any moment.
        self.book.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Place {
    /// Keeps the place until `done`, but not for too long.
    pub async fn until(self, done: impl Future<Output = ()>) {
        // Late or not, the place is given back.
        let _ = tokio::time::timeout(TENURE, done).await;
    }
}

impl Book {
    fn turn(&mut self, now: Instant) {
        let passed = now.saturating_duration_since(self.second).as_secs();
        if passed > 0 {
            self.before = if passed == 1 { self.admitted } else { 0 };
            self.admitted = 0;
            self.second += Duration::from_secs(passed);
        }
    }

    fn admit(&mut self, now: Instant) {
        self.turn(now);
        self.admitted += 1;
    }

    /// Gives away the next free time: at the pace of the last second, beginning a little later than now.
    fn slot(&mut self, now: Instant) -> Duration {
        self.turn(now);
        let pace = f64::from(self.before.max(self.admitted)).max(SLOWEST);
        self.next = self.next.max(now + SOONEST) + Duration::from_secs_f64(1.0 / pace);
        let wait = self.next.duration_since(now);
        if wait > LATEST {
            // So many that no order can be promised: anywhere in the minute.
            self.next = now + LATEST;
            return LATEST.mul_f64(rand::random_range(0.5..=1.0));
        }
        wait.mul_f64(rand::random_range(0.9..=1.1))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn who_finds_no_place_is_told_to_come_back_and_counted() {
        let shed = Counter::default();
        let arrivals = Arrivals::new(shed.clone());
        let mut inside = Vec::new();
        for _ in 0..PLACES {
            inside.push(arrivals.admit().await.unwrap());
        }
        let ComeBack(after) = arrivals.admit().await.unwrap_err();
        assert!(after >= SOONEST.mul_f64(0.9), "{after:?}");
        assert_eq!(shed.get(), 1);
        inside.pop();
        assert!(arrivals.admit().await.is_ok());
    }

    #[tokio::test(start_paused = true)]
    async fn a_place_is_not_kept_for_ever() {
        let arrivals = Arrivals::new(Counter::default());
        for _ in 0..PLACES {
            tokio::spawn(arrivals.admit().await.unwrap().until(std::future::pending()));
        }
        // Those who wait for four seconds are sent away; a second later the places are free.
        assert!(arrivals.admit().await.is_err());
        tokio::time::sleep(TENURE - PATIENCE).await;
        assert!(arrivals.admit().await.is_ok());
    }

    #[tokio::test(start_paused = true)]
    async fn those_who_are_sent_away_come_back_at_the_pace_at_which_others_were_let_in() {
        let now = Instant::now();
        let mut book = Book {
            next: now,
            second: now,
            admitted: 0,
            before: 0,
        };
        for _ in 0..100 {
            book.admit(now);
        }
        let waits: Vec<f64> = (0..1000).map(|_| book.slot(now).as_secs_f64()).collect();
        let within = |until: f64| waits.iter().filter(|wait| **wait < until).count();
        // A hundred a second from the second second on, with a tenth of jitter.
        assert!(
            within(1.7) == 0 && (250..450).contains(&within(5.5)),
            "{}",
            within(5.5)
        );
        assert!(within(13.5) == 1000, "{}", within(13.5));
    }

    #[tokio::test(start_paused = true)]
    async fn nobody_is_sent_away_for_more_than_a_minute() {
        let now = Instant::now();
        let mut book = Book {
            next: now,
            second: now,
            admitted: 0,
            before: 0,
        };
        let longest = (0..100_000).map(|_| book.slot(now)).max().unwrap();
        assert!(longest <= LATEST.mul_f64(1.1), "{longest:?}");
    }
}
