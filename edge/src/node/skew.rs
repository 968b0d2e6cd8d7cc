//! How far this machine's clock is from the provider's, as a condition of the Node.

use jiff::SignedDuration;
use serde_json::{Value, json};

/// The condition's type.
pub(super) const KIND: &str = "ClockSkew";
/// More than this is told: tokens, certificates and the timestamps of events and logs suffer from it.
const THRESHOLD: SignedDuration = SignedDuration::from_secs(30);

/// The condition for a clock that is that far ahead; `None` while it is not known, before the first contact with the
/// provider since the daemon's start.
///
/// The message changes only by steps, since every change is a report.
pub(super) fn condition(ahead: Option<SignedDuration>) -> Option<Value> {
    let ahead = ahead?;
    let (status, reason, message) = if ahead.abs() < THRESHOLD {
        (
            "False",
            "ClockInStep",
            format!(
                "the site's clock is within {} s of the provider's",
                THRESHOLD.as_secs()
            ),
        )
    } else {
        let seconds = (ahead.as_secs() + ahead.signum() as i64 * 5) / 10 * 10;
        let (reason, word) = if seconds > 0 {
            ("ClockAhead", "ahead of")
        } else {
            ("ClockBehind", "behind")
        };
        let message = format!(
            "the site's clock is about {} s {word} the provider's; is a time service (chrony, systemd-timesyncd) running there?",
            seconds.abs()
        );
        ("True", reason, message)
    };
    Some(json!({"type": KIND, "status": status, "reason": reason, "message": message}))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_skew_is_told_beyond_the_threshold_in_steps_and_not_before_it_is_known() {
        assert_eq!(condition(None), None);
        let of = |seconds| condition(Some(SignedDuration::from_secs(seconds))).unwrap();
        assert_eq!(of(29)["status"], "False");
        assert_eq!(of(-29), of(29));
        assert_eq!(of(10_800)["reason"], "ClockAhead");
        assert!(of(10_800)["message"].as_str().unwrap().contains("10800 s ahead"));
        assert_eq!(of(10_801), of(10_803));
        assert_eq!(of(-3_600)["reason"], "ClockBehind");
        assert!(of(-3_600)["message"].as_str().unwrap().contains("3600 s behind"));
    }
}
