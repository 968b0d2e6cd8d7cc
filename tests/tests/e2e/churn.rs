//! A short churn; `hack/churn` runs the long one.

use std::time::Duration;

use skerry_tests::churn::Churn;
use skerry_tests::runner::{Scenario, Test};

pub(crate) fn scenarios() -> Vec<Scenario> {
    Scenario::each("random events for a while break no promise", churn)
}

fn churn(t: &Test<'_>) {
    let mut site = t.own_site();
    let churn = Churn {
        seed: 1,
        period: Duration::from_secs(40),
    };
    let outcome = churn.run(&mut site, &t.kubectl, None);
    assert!(
        outcome.broken.is_empty(),
        "{outcome}\n{}\nlast lines of the daemon:\n{}",
        outcome.log.join("\n"),
        site.log_tail()
    );
}
