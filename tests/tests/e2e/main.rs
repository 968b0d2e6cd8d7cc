//! What Skerry promises, shown on a real control plane with real runtimes and peers.
//!
//! `cargo test -p skerry-tests --test e2e [WORD]...` runs the scenarios whose names contain every word. The programs
//! of the workspace must have been built (`cargo build --workspace`), the tools too: `hack/test --prepare` does both.
#![allow(clippy::panic, clippy::unwrap_used, clippy::expect_used)]

mod autonomy;
mod churn;
mod classes;
mod details;
mod devices;
mod duties;
mod enrolment;
mod hostile;
mod identity;
mod images;
mod kubelet_api;
mod lifecycle;
mod link;
mod local;
mod parallel;
mod pods;
mod policies;
mod programs;
mod resources;
mod security;
mod static_pods;
mod store;
mod streams;
mod uplink;
mod volumes;
mod workloads;

use std::process::ExitCode;

fn main() -> ExitCode {
    let words: Vec<String> = std::env::args().skip(1).filter(|a| !a.starts_with('-')).collect();
    // The long ones first, so that they do not run alone at the end.
    let scenarios = [
        churn::scenarios(),
        autonomy::scenarios(),
        classes::scenarios(),
        uplink::scenarios(),
        policies::scenarios(),
        link::scenarios(),
        devices::scenarios(),
        duties::scenarios(),
        details::scenarios(),
        static_pods::scenarios(),
        store::scenarios(),
        local::scenarios(),
        hostile::scenarios(),
        enrolment::scenarios(),
        identity::scenarios(),
        lifecycle::scenarios(),
        pods::scenarios(),
        resources::scenarios(),
        workloads::scenarios(),
        kubelet_api::scenarios(),
        parallel::scenarios(),
        images::scenarios(),
        volumes::scenarios(),
        security::scenarios(),
        streams::scenarios(),
        programs::scenarios(),
    ];
    let scenarios = scenarios.into_iter().flatten().collect();
    if skerry_tests::runner::run(scenarios, &words) {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}
