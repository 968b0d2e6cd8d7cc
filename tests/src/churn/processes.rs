//! The churn's containers as processes of the host: a truth that no API server and no runtime can hide.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

/// Variable whose value is `<pod uid>:<container>`.
pub(super) const KEY: &str = "SKERRY_CHURN_KEY";
/// A word in the command line of a container's first process only.
pub(super) const FIRST: &str = "skerry-churn-first";

/// First processes by key.
pub(super) fn running() -> BTreeMap<String, BTreeSet<u32>> {
    let mut found = BTreeMap::<String, BTreeSet<u32>>::new();
    for entry in std::fs::read_dir("/proc").into_iter().flatten().flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|n| n.parse::<u32>().ok()) else {
            continue;
        };
        let read = |file: &str| std::fs::read(entry.path().join(file)).unwrap_or_default();
        // The word stands in the script that is the shell's argument; a supervisor that passes it on has no key.
        if !String::from_utf8_lossy(&read("cmdline")).contains(FIRST) {
            continue;
        }
        let environment = read("environ");
        let key = environment
            .split(|byte| *byte == 0)
            .filter_map(|line| std::str::from_utf8(line).ok())
            .find_map(|line| line.strip_prefix(KEY)?.strip_prefix('='));
        if let Some(key) = key {
            found.entry(key.to_owned()).or_default().insert(pid);
        }
    }
    found
}

/// Looks for a container that runs twice, again and again.
pub(super) struct Doubles {
    over: Arc<AtomicBool>,
    seen: Arc<Mutex<BTreeSet<String>>>,
    looker: Option<JoinHandle<()>>,
}

impl Doubles {
    /// Begins to look.
    pub(super) fn watch() -> Self {
        let over = Arc::new(AtomicBool::new(false));
        let seen = Arc::new(Mutex::new(BTreeSet::new()));
        let (until, into) = (Arc::clone(&over), Arc::clone(&seen));
        let looker = std::thread::spawn(move || {
            let mut before = BTreeMap::new();
            while !until.load(Ordering::Relaxed) {
                std::thread::sleep(Duration::from_millis(300));
                let now = running();
                for (key, pids) in &now {
                    // Seen twice, so that a process that is just ending beside its successor does not count.
                    let old: Option<&BTreeSet<u32>> = before.get(key);
                    let stay = old.map_or(0, |old| old.intersection(pids).count());
                    if stay > 1 {
                        into.lock().unwrap().insert(key.clone());
                    }
                }
                before = now;
            }
        });
        Self {
            over,
            seen,
            looker: Some(looker),
        }
    }

    /// Ends; the containers that ran twice.
    pub(super) fn end(&mut self) -> Vec<String> {
        self.over.store(true, Ordering::Relaxed);
        if let Some(looker) = self.looker.take() {
            let _ = looker.join();
        }
        let seen = self.seen.lock().unwrap();
        seen.iter()
            .map(|key| format!("container {key} ran twice at one time"))
            .collect()
    }
}

impl Drop for Doubles {
    fn drop(&mut self) {
        self.over.store(true, Ordering::Relaxed);
    }
}
