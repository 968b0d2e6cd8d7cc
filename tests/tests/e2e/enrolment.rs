//! Declaring and enrolling a Site, and every way in which that goes wrong.
use skerry_tests::runner::{Scenario, Test};

pub(crate) fn scenarios() -> Vec<Scenario> {
    [Scenario::once("a site appears", appears)]
        .into_iter()
        .flatten()
        .collect()
}

fn appears(t: &Test<'_>) {
    t.site();
}
