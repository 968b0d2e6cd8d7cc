//! Runs scenarios side by side and sums up as `cargo test` does.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Mutex, OnceLock};
use std::time::Instant;

use crate::cluster::Cluster;
use crate::kubectl::Kubectl;
use crate::namespace::Namespace;
use crate::process::is_root;
use crate::site::{Runtime, Site};

/// One thing that a user may rely on, shown on the real system.
pub struct Scenario {
    name: String,
    runtime: Runtime,
    run: fn(&Test),
}

impl Scenario {
    /// A scenario that holds whatever the runtime.
    pub fn once(name: &str, run: fn(&Test)) -> Vec<Self> {
        vec![Self {
            name: name.into(),
            runtime: Runtime::Process,
            run,
        }]
    }

    /// A scenario for one runtime.
    pub fn on(runtime: Runtime, name: &str, run: fn(&Test)) -> Vec<Self> {
        vec![Self {
            name: format!("{name} [{runtime}]"),
            runtime,
            run,
        }]
    }

    /// A scenario that is shown on each runtime.
    pub fn each(name: &str, run: fn(&Test)) -> Vec<Self> {
        [Runtime::Process, Runtime::Containerd]
            .map(|runtime| Self {
                name: format!("{name} [{runtime}]"),
                runtime,
                run,
            })
            .into()
    }
}

/// What all scenarios of a run share.
struct World {
    // Before the cluster, so that they are dropped before it.
    process: OnceLock<Result<Site, String>>,
    containerd: OnceLock<Result<Site, String>>,
    cluster: Cluster,
}

impl World {
    fn new(cluster: Cluster) -> Self {
        Self {
            process: OnceLock::new(),
            containerd: OnceLock::new(),
            cluster,
        }
    }

    fn shared_site(&self, runtime: Runtime) -> Result<&Site, String> {
        let cell = match runtime {
            Runtime::Process => &self.process,
            Runtime::Containerd => &self.containerd,
        };
        let start = || Site::start(&self.cluster, &format!("shared-{runtime}"), runtime);
        cell.get_or_init(|| catch_unwind(AssertUnwindSafe(start)).map_err(|_| PANIC.take()))
            .as_ref()
            .map_err(Clone::clone)
    }
}

/// What a scenario works with.
pub struct Test<'a> {
    /// kubectl in the scenario's own namespace.
    pub kubectl: Kubectl,
    /// The control plane and the provider.
    pub cluster: &'a Cluster,
    /// The runtime to show it on.
    pub runtime: Runtime,
    shared: &'a Site,
    id: String,
}

impl Test<'_> {
    /// A site that runs the scenario's pods and that other scenarios use at the same time: leave its daemon, its
    /// line and its disk alone.
    pub fn site(&self) -> &Site {
        self.shared
    }

    /// A name that no other scenario uses, for a site or another object of the cluster.
    pub fn name(&self, suffix: &str) -> String {
        format!("{}-{suffix}", self.id)
    }

    /// A running site of the scenario's own.
    pub fn own_site(&self) -> Site {
        Site::start(self.cluster, &self.name("site"), self.runtime)
    }
}

thread_local! {
    static PANIC: RefCell<String> = const { RefCell::new(String::new()) };
}

/// Runs the scenarios whose names contain every one of `words` (`a|b` is a word for either); whether all passed.
///
/// `SKERRY_E2E_THREADS` says how many run at a time (3).
pub fn run(scenarios: Vec<Scenario>, words: &[String]) -> bool {
    let begin = Instant::now();
    let root = is_root();
    let chosen = scenarios
        .into_iter()
        .filter(|s| words.iter().all(|w| w.split('|').any(|w| s.name.contains(w))));
    let (queue, ignored): (Vec<_>, Vec<_>) = chosen.partition(|s| root || s.runtime == Runtime::Process);
    println!("\nrunning {} end-to-end scenarios", queue.len());
    for scenario in &ignored {
        println!("test {} ... ignored: containerd needs root", scenario.name);
    }

    std::panic::set_hook(Box::new(|info| {
        PANIC.with_borrow_mut(|text| *text = format!("{info}"));
    }));
    let total = queue.len();
    let failures = Mutex::new(Vec::new());
    if total > 0 {
        match catch_unwind(Cluster::start) {
            Ok(cluster) => run_all(World::new(cluster), queue, &failures),
            Err(_) => {
                println!("---- the cluster did not start ----\n{}\n----", PANIC.take());
                failures.lock().unwrap().extend(queue.into_iter().map(|s| s.name));
            }
        }
    }

    let failures = failures.into_inner().unwrap();
    if !failures.is_empty() {
        println!("\nfailures (each is explained where it happened, above):");
    }
    for name in &failures {
        println!("    {name}");
    }
    println!(
        "\ntest result: {}. {} passed; {} failed; {} ignored; finished in {:.0}s\n",
        if failures.is_empty() { "ok" } else { "FAILED" },
        total.saturating_sub(failures.len()),
        failures.len(),
        ignored.len(),
        begin.elapsed().as_secs_f32()
    );
    failures.is_empty()
}

/// Takes the scenarios from the queue with a few threads; at the end of it the world is gone.
fn run_all(world: World, queue: Vec<Scenario>, failures: &Mutex<Vec<String>>) {
    let threads = std::env::var("SKERRY_E2E_THREADS")
        .ok()
        .and_then(|n| n.parse().ok())
        .unwrap_or(3);
    let queue = Mutex::new(queue.into_iter().enumerate().collect::<VecDeque<_>>());
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                while let Some((number, scenario)) = next(&queue) {
                    if run_one(&world, number, &scenario).is_err() {
                        failures.lock().unwrap().push(scenario.name);
                    }
                }
            });
        }
    });
}

fn next<T>(queue: &Mutex<VecDeque<T>>) -> Option<T> {
    queue.lock().unwrap().pop_front()
}

fn run_one(world: &World, number: usize, scenario: &Scenario) -> Result<(), String> {
    let begin = Instant::now();
    let id = format!("e2e-{number}");
    let result = catch_unwind(AssertUnwindSafe(|| {
        let shared = world.shared_site(scenario.runtime)?;
        let namespace = Namespace::create(world.cluster.kubectl(), &id);
        let kubectl = namespace.kubectl().clone();
        let test = Test {
            kubectl,
            cluster: &world.cluster,
            runtime: scenario.runtime,
            shared,
            id: id.clone(),
        };
        let outcome = catch_unwind(AssertUnwindSafe(|| (scenario.run)(&test)));
        outcome.map_err(|_| {
            let message = PANIC.take();
            format!("{message}\n\n{}", what_was_there(&test))
        })
    }));
    let result = result.unwrap_or_else(|_| Err(PANIC.take()));
    let took = begin.elapsed().as_secs_f32();
    match &result {
        Ok(()) => println!("test {} ... ok ({took:.1}s)", scenario.name),
        Err(message) => println!(
            "test {} ... FAILED ({took:.1}s)\n----\n{message}\n----",
            scenario.name
        ),
    }
    result
}

/// The scenario's namespace and the daemons' last words, for whoever has to find out.
fn what_was_there(test: &Test<'_>) -> String {
    let look = |args: &[&str]| test.kubectl.attempt(args).unwrap_or_else(|e| e);
    format!(
        "{}\n{}\nlast lines of the provider:\n{}\nlast lines of {}:\n{}",
        look(&["get", "pods", "-o", "wide"]),
        look(&["get", "events", "--sort-by", ".lastTimestamp"]),
        test.cluster.provider_log(),
        test.shared.name(),
        test.shared.log_tail()
    )
}
