//! How often what repeats for every site is written.
//!
//! A kubelet renews its lease every 10 s. One provider does so for all its sites, and its API server has to bear all of
//! them: the more sites, the longer the period, up to twice a kubelet's. `--node-monitor-grace-period` of the
//! kube-controller-manager is 50 s by default and must stay above twice the longest period: a single renewal may fail.

use std::time::Duration;

/// A lease's period with few sites, a kubelet's, and with very many.
const LEASE: (Duration, Duration) = (Duration::from_secs(10), Duration::from_secs(20));
/// Renewals a second up to which the shorter period is kept.
const LEASES_A_SECOND: u32 = 100;
/// The longest and the shortest time after which a Site's `lastSeen` is written while it is heard.
const LAST_SEEN: (Duration, Duration) = (Duration::from_secs(60), Duration::from_secs(300));
/// Writes of `lastSeen` a second up to which the shorter time is kept.
const LAST_SEEN_A_SECOND: u32 = 10;

/// How often a lease is renewed when there are that many sites.
pub(super) fn lease_period(sites: usize) -> Duration {
    period(sites, LEASE, LEASES_A_SECOND)
}

/// How old a Site's `lastSeen` may become when there are that many sites.
pub(super) fn last_seen_period(sites: usize) -> Duration {
    period(sites, LAST_SEEN, LAST_SEEN_A_SECOND)
}

fn period(sites: usize, (least, most): (Duration, Duration), a_second: u32) -> Duration {
    let sites = u32::try_from(sites).unwrap_or(u32::MAX);
    Duration::from_secs(u64::from(sites / a_second)).clamp(least, most)
}

/// A tenth more or less, so that what began together does not stay together.
pub(super) fn jittered(period: Duration) -> Duration {
    period.mul_f64(rand::random_range(0.9..=1.1))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The default of kube-controller-manager's `--node-monitor-grace-period`.
    const GRACE: Duration = Duration::from_secs(50);

    #[test]
    fn leases_are_renewed_as_by_a_kubelet_and_with_many_sites_less_often_but_twice_in_the_grace() {
        assert_eq!(lease_period(1), Duration::from_secs(10));
        assert_eq!(lease_period(1_000), Duration::from_secs(10));
        assert_eq!(lease_period(1_500), Duration::from_secs(15));
        assert_eq!(lease_period(1_000_000), Duration::from_secs(20));
        assert!(2 * LEASE.1.mul_f64(1.1) < GRACE);
    }

    #[test]
    fn last_seen_of_many_sites_is_written_more_rarely() {
        assert_eq!(last_seen_period(10), Duration::from_secs(60));
        assert_eq!(last_seen_period(5_000), Duration::from_secs(300));
    }
}
