//! What a site in somebody else's hands may try, and a stranger at the door: each is refused, and nobody else is harmed.

mod enrolment;
mod floods;
mod reports;
mod streams;

use skerry_tests::hostile::Hostile;
use skerry_tests::runner::{Scenario, Test};
use skerry_tests::site::{Runtime, Site};
use tonic::{Code, Status};

pub(crate) fn scenarios() -> Vec<Scenario> {
    [
        Scenario::once(
            "a hostile site's greetings and streams are refused",
            streams::refusals,
        ),
        Scenario::once(
            "a hostile site that breaks the protocol loses its session and learns why",
            streams::violations,
        ),
        Scenario::once(
            "a hostile site learns nothing of what others hold",
            streams::nothing_learnt,
        ),
        Scenario::once("a hostile site reports nothing of others", reports::forged),
        Scenario::once(
            "a hostile site answers a user's stream with rubbish, and the user hears of it",
            streams::rubbish,
        ),
        Scenario::once(
            "a stranger without a certificate gets nowhere",
            enrolment::stranger,
        ),
        Scenario::once(
            "a hostile request for a certificate gets nothing but the site's own",
            enrolment::requests,
        ),
        Scenario::once(
            "a hostile site that floods the provider harms itself alone",
            floods::flood,
        ),
        Scenario::once(
            "who holds the door with open connections keeps nobody out",
            floods::siege,
        ),
    ]
    .into_iter()
    .flatten()
    .collect()
}

/// An enrolled site without a daemon, and who has got hold of its identity.
fn hostile(t: &Test<'_>) -> (Site, Hostile) {
    let site = Site::enrol(t.cluster, &t.name("hostile"), Runtime::Process);
    let hostile = Hostile::of(&site, t.cluster.link());
    (site, hostile)
}

fn run<F: Future>(attack: F) -> F::Output {
    tokio::runtime::Runtime::new().unwrap().block_on(attack)
}

/// What did not go as it should, by attack.
#[derive(Default)]
struct Book {
    attacks: usize,
    failures: Vec<String>,
}

impl Book {
    /// The attack must fail with that code, and with words that say why.
    fn refused<T>(&mut self, attack: &str, outcome: Result<T, Status>, code: Code, words: &str) {
        self.expect(
            attack,
            match outcome {
                Ok(_) => Err("it was taken".to_owned()),
                Err(status) if status.code() == code && status.message().contains(words) => Ok(()),
                Err(status) => Err(format!("{:?}: {}", status.code(), status.message())),
            },
        );
    }

    fn expect(&mut self, attack: &str, outcome: Result<(), String>) {
        self.attacks += 1;
        if let Err(found) = outcome {
            self.failures.push(format!("{attack}: {found}"));
        }
    }

    fn close(self, wanted: usize) {
        assert!(self.failures.is_empty(), "{}", self.failures.join("\n"));
        assert_eq!(self.attacks, wanted, "attacks that were tried");
    }
}

/// The session of a daemon that runs, as its log names it.
fn session_of(site: &Site) -> String {
    let log = site.log();
    let line = log
        .lines()
        .rfind(|line| line.contains("the link is up"))
        .expect("the site was connected");
    let id = line.split("session=").nth(1).expect("the log names the session");
    id.split(' ').next().unwrap_or_default().to_owned()
}
