//! Which counts of dropped reports the provider has yet to be told: only those that have moved, to keep heartbeats small.

use skerry_proto::link::ReportDrops;

use crate::store::{DropReason, Lane};

/// What has been told in a session.
#[derive(Debug, Default)]
pub(super) struct Told(Vec<(Lane, DropReason, u64)>);

impl Told {
    /// The counts that the next heartbeat must carry. A heartbeat that is lost ends its session, and the next one begins
    /// anew.
    pub(super) fn news(&mut self, counts: &[(Lane, DropReason, u64)]) -> Vec<ReportDrops> {
        let new = counts.iter().filter(|count| !self.0.contains(count));
        let message = |(lane, reason, count): &(Lane, DropReason, u64)| ReportDrops {
            lane: lane.name().to_owned(),
            reason: reason.name().to_owned(),
            count: *count,
        };
        let news = new.map(message).collect();
        self.0 = counts.to_vec();
        news
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_counts_that_have_moved_are_told() {
        let mut told = Told::default();
        let first = [
            (Lane::Events, DropReason::Age, 2),
            (Lane::Status, DropReason::Refused, 1),
        ];
        assert_eq!(told.news(&first).len(), 2);
        assert_eq!(told.news(&first), []);
        let second = [
            (Lane::Events, DropReason::Age, 5),
            (Lane::Status, DropReason::Refused, 1),
        ];
        let news = told.news(&second);
        assert_eq!(news.len(), 1);
        assert_eq!(
            (news[0].lane.as_str(), news[0].reason.as_str(), news[0].count),
            ("events", "age", 5)
        );
    }
}
