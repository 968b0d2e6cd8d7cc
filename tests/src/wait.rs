//! Waiting for something to become true, with a deadline.

use std::time::{Duration, Instant};

/// How long an ordinary expectation may take on a slow, busy machine.
pub const SOON: Duration = Duration::from_secs(60);

/// Asks `look` until it answers `Ok`, and answers its value.
///
/// # Panics
/// When `deadline` has passed, with `what` and the reason that `look` gave last.
pub fn eventually<T>(deadline: Duration, what: &str, look: impl FnMut() -> Result<T, String>) -> T {
    attempt_until(deadline, look)
        .unwrap_or_else(|reason| panic!("not within {deadline:?}: {what}; last seen: {reason}"))
}

/// Asks `look` until it answers `Ok`, and answers its value.
///
/// # Errors
/// The reason that `look` gave last, when `deadline` has passed.
pub fn attempt_until<T>(
    deadline: Duration,
    mut look: impl FnMut() -> Result<T, String>,
) -> Result<T, String> {
    let end = Instant::now() + deadline;
    loop {
        match look() {
            Err(reason) if Instant::now() > end => return Err(reason),
            Err(_) => std::thread::sleep(Duration::from_millis(200)),
            Ok(value) => return Ok(value),
        }
    }
}

/// Asks `look` for the whole of `period` and fails as soon as it answers an error.
///
/// # Panics
/// With `what` and the reason that `look` gave.
pub fn throughout(period: Duration, what: &str, mut look: impl FnMut() -> Result<(), String>) {
    let end = Instant::now() + period;
    while Instant::now() < end {
        if let Err(reason) = look() {
            panic!("did not hold for {period:?}: {what}; seen: {reason}");
        }
        std::thread::sleep(Duration::from_millis(500));
    }
}

/// `Ok` when `found` equals `wanted`, else an error that shows both; for use with [`eventually`].
pub fn same<T: PartialEq + std::fmt::Debug>(found: T, wanted: T) -> Result<(), String> {
    if found == wanted {
        Ok(())
    } else {
        Err(format!("{found:?}, wanted {wanted:?}"))
    }
}
