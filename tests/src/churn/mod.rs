//! A long row of random events against a few promises: what `hack/churn` runs.
//!
//! Pods are created, changed and deleted, containers and daemons killed, the line cut and the power too, all from one
//! seed. Meanwhile [`history`] holds every change that the API server shows against what may never happen to a pod, and
//! [`processes`] looks at the host for a container that runs twice. At the end everything is mended, and what is left
//! must be exactly what was asked for.
//!
//! The seed repeats the decisions, not the moments: timing belongs to the machine.

mod chaos;
mod history;
mod processes;

use std::collections::BTreeMap;
use std::fmt;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use crate::cluster::Cluster;
use crate::kubectl::Kubectl;
use crate::site::Site;

use history::History;
use processes::Doubles;

/// Pods that exist at one time, at most.
const AT_ONCE: usize = 12;

/// What is thrown at the system.
#[derive(Clone, Copy, Debug)]
pub struct Churn {
    /// Where the random decisions begin.
    pub seed: u64,
    /// How long.
    pub period: Duration,
}

/// A life that a pod of the churn may lead.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Life {
    /// Runs until it is told to stop.
    Steady,
    /// Does not listen when it is told to stop.
    Stubborn,
    /// Ends with an error again and again.
    Crashing,
    /// Does its work once.
    Finishing,
    /// Fails at its work once.
    Failing,
    /// An init container, a sidecar and two containers.
    Family,
}

impl Life {
    const ALL: [Self; 6] = [
        Self::Steady,
        Self::Stubborn,
        Self::Crashing,
        Self::Finishing,
        Self::Failing,
        Self::Family,
    ];

    fn ends(self) -> bool {
        matches!(self, Self::Finishing | Self::Failing)
    }
}

/// What was asked for.
#[derive(Clone, Debug)]
struct Wanted {
    uid: String,
    life: Life,
    /// It was given a deadline, so it ends.
    bounded: bool,
}

/// The party that is thrown things at.
struct World<'a> {
    site: &'a mut Site,
    kubectl: Kubectl,
    /// By pod name.
    wanted: BTreeMap<String, Wanted>,
    random: StdRng,
    /// Where containers write that they started.
    marks: PathBuf,
    made: usize,
    /// What was done, to be read after a failure.
    log: Vec<String>,
    began: Instant,
}

/// What came out.
#[derive(Debug, Default)]
pub struct Outcome {
    /// Promises that were broken; empty when all is well.
    pub broken: Vec<String>,
    /// What was done, in order.
    pub log: Vec<String>,
    /// How often each kind of event was thrown.
    pub thrown: BTreeMap<&'static str, usize>,
    /// Changes of pods that were looked at.
    pub changes: usize,
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "events thrown: {:?}", self.thrown)?;
        writeln!(f, "pod changes looked at: {}", self.changes)?;
        for broken in &self.broken {
            writeln!(f, "BROKEN: {broken}")?;
        }
        Ok(())
    }
}

impl Churn {
    /// Runs it on a site; pods are made in kubectl's namespace. `cluster` is given when its provider may be killed too.
    ///
    /// # Panics
    /// When the site does not come back at all.
    pub fn run(self, site: &mut Site, kubectl: &Kubectl, mut cluster: Option<&mut Cluster>) -> Outcome {
        let marks = site.dir().join("marks");
        std::fs::create_dir_all(&marks).expect("the directory of marks can be made");
        let mut history = History::watch(kubectl);
        let mut doubles = Doubles::watch();
        let mut world = World {
            site,
            kubectl: kubectl.clone(),
            wanted: BTreeMap::new(),
            random: StdRng::seed_from_u64(self.seed),
            marks,
            made: 0,
            log: Vec::new(),
            began: Instant::now(),
        };
        let mut thrown = BTreeMap::new();
        while world.began.elapsed() < self.period {
            let what = world.throw(&mut cluster);
            *thrown.entry(what).or_default() += 1;
            let pause = world.random.random_range(0..800);
            std::thread::sleep(Duration::from_millis(pause));
        }
        world.mend(&mut cluster);
        let mut broken = world.settle();
        broken.extend(history.end());
        broken.extend(doubles.end());
        Outcome {
            broken,
            log: world.log,
            thrown,
            changes: history.changes(),
        }
    }
}
