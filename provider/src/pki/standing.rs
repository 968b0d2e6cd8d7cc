//! What a site may do with the certificate that it shows, by time.

use std::time::Duration;

use jiff::{SignedDuration, Timestamp};
use skerry_proto::SiteName;

use super::SitePeer;

/// How long after its end a certificate is still good for its own renewal, unless the configuration says otherwise.
pub const GRACE: Duration = Duration::from_secs(180 * 24 * 3600);

/// What a certificate is good for now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Standing {
    /// Everything.
    Current,
    /// Its own renewal and nothing else: it has expired within the grace, or was made by a CA whose clock was ahead.
    RenewalOnly,
    /// Nothing: it has expired longer ago than the grace.
    Gone,
}

/// Why a call is refused for the time of its certificate.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum OutOfTime {
    /// The site renews it by itself.
    #[error(
        "the certificate of site {site} is not valid now, only from {from} to {to}; the site must renew it first, which it does by itself"
    )]
    Renew {
        /// Whose.
        site: SiteName,
        /// Begin of its validity.
        from: Timestamp,
        /// End of its validity.
        to: Timestamp,
    },
    /// A person must act.
    #[error(
        "the certificate of site {site} has expired at {at}, longer ago than the {} days in which it could be renewed; on the machine: skerry-edge join --force, with a new token from: skerry-provider token create {site}",
        .grace.as_secs() / 86_400
    )]
    Gone {
        /// Whose.
        site: SiteName,
        /// When it expired.
        at: Timestamp,
        /// The grace.
        grace: Duration,
    },
}

/// Judges a certificate whose chain was verified, at that time.
pub fn standing(peer: &SitePeer, now: Timestamp, grace: Duration) -> Standing {
    let grace = SignedDuration::try_from(grace).unwrap_or(SignedDuration::MAX);
    if now >= peer.not_after.saturating_add(grace).unwrap_or(Timestamp::MAX) {
        Standing::Gone
    } else if now < peer.not_before || now >= peer.not_after {
        Standing::RenewalOnly
    } else {
        Standing::Current
    }
}

/// Whether a site may make any call with that certificate.
pub fn current(peer: &SitePeer, now: Timestamp, grace: Duration) -> Result<(), OutOfTime> {
    match standing(peer, now, grace) {
        Standing::Current => Ok(()),
        Standing::RenewalOnly => Err(OutOfTime::Renew {
            site: peer.site.clone(),
            from: peer.not_before,
            to: peer.not_after,
        }),
        Standing::Gone => Err(gone(peer, grace)),
    }
}

/// Whether a site may renew that certificate.
pub fn renewable(peer: &SitePeer, now: Timestamp, grace: Duration) -> Result<(), OutOfTime> {
    match standing(peer, now, grace) {
        Standing::Current | Standing::RenewalOnly => Ok(()),
        Standing::Gone => Err(gone(peer, grace)),
    }
}

fn gone(peer: &SitePeer, grace: Duration) -> OutOfTime {
    OutOfTime::Gone {
        site: peer.site.clone(),
        at: peer.not_after,
        grace,
    }
}

#[cfg(test)]
mod tests {
    use skerry_proto::object::Uid;

    use super::*;

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(second).unwrap()
    }

    fn peer() -> SitePeer {
        SitePeer {
            site: "harbour".parse().unwrap(),
            uid: Uid::from("u".to_owned()),
            serial: "1".to_owned(),
            not_before: at(1_000),
            not_after: at(2_000),
        }
    }

    #[test]
    fn a_certificate_is_good_for_all_in_its_time_and_for_its_renewal_until_the_grace_is_over() {
        let grace = Duration::from_secs(500);
        for (second, expected) in [
            (0, Standing::RenewalOnly),
            (999, Standing::RenewalOnly),
            (1_000, Standing::Current),
            (1_999, Standing::Current),
            (2_000, Standing::RenewalOnly),
            (2_499, Standing::RenewalOnly),
            (2_500, Standing::Gone),
        ] {
            assert_eq!(standing(&peer(), at(second), grace), expected, "{second}");
        }
        // Without a grace there is no second chance.
        assert_eq!(standing(&peer(), at(2_000), Duration::ZERO), Standing::Gone);
    }

    #[test]
    fn a_refusal_names_the_site_and_what_to_do() {
        let grace = Duration::from_secs(86_400);
        let late = renewable(&peer(), at(2_000 + 86_400), grace)
            .unwrap_err()
            .to_string();
        assert!(
            late.contains("harbour") && late.contains("1 days") && late.contains("skerry-edge join"),
            "{late}"
        );
        let expired = current(&peer(), at(2_000), grace).unwrap_err().to_string();
        assert!(expired.contains("by itself"), "{expired}");
        assert!(renewable(&peer(), at(2_000), grace).is_ok());
    }
}
