//! Power cuts, full and rotten disks.
//!
//! A workload runs on a simulated disk. Then the power is cut after each single operation of that disk, with what had
//! not been synced lost, kept, or kept in part; the store is opened on what is left and must hold exactly what a model
//! held after some write, one not older than the last that had been answered.
//! `SKERRY_STORE_TRIALS=N` repeats the random parts N times as often as `cargo test` does.

use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};

use proptest::prelude::*;
use proptest::strategy::ValueTree;
use proptest::test_runner::TestRunner;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use super::model::{Change, Model, Step, steps, write};
use super::simulated::{Disk, Left, PowerCuts};
use super::*;

fn trials(usual: u64) -> u64 {
    let factor = std::env::var("SKERRY_STORE_TRIALS")
        .ok()
        .and_then(|text| text.parse().ok());
    usual * factor.unwrap_or(1)
}

fn open(disk: &Disk) -> Result<Store, OpenError> {
    Store::open_at(Box::new(disk.clone()), Options::default())
}

/// A disk with a new store.
fn fresh() -> Disk {
    let disk = Disk::empty();
    drop(open(&disk).unwrap());
    disk
}

/// A store's life on a disk, for power cuts in it.
struct Life {
    before: Vec<u8>,
    disk: Disk,
    /// After so many writes; the first is before any.
    models: Vec<Model>,
    /// Operations of the disk when each write was queued, and when it was answered.
    queued: Vec<usize>,
    answered: Vec<usize>,
}

impl Life {
    /// Carries out the steps, `together` of them queued at a time.
    fn lead(steps: &[Step], together: usize) -> Self {
        let before = fresh().content();
        let disk = Disk::holding(before.clone());
        let store = open(&disk).unwrap();
        let mut model = Model::default();
        let mut life = Self {
            before,
            disk: disk.clone(),
            models: vec![model.clone()],
            queued: Vec::new(),
            answered: Vec::new(),
        };
        for wave in steps.chunks(together) {
            let mut answers = Vec::new();
            for step in wave {
                let wanted = model.step(step);
                life.models.push(model.clone());
                life.queued.push(disk.operations());
                answers.push(store.inner.writer.queue(wanted));
            }
            for answer in answers {
                answer.blocking_recv().unwrap().unwrap();
                life.answered.push(disk.operations());
            }
        }
        assert_eq!(Model::of(&store).unwrap(), model);
        drop(store);
        life
    }

    /// Cuts the power after every operation.
    fn cut_everywhere(&self, lefts: impl Fn(usize) -> Vec<Left>) -> usize {
        let mut cuts = PowerCuts::new(self.before.clone(), self.disk.log());
        let mut tried = 0;
        for done in 0..=self.disk.operations() {
            let least = self.answered.iter().filter(|at| **at <= done).count();
            let most = self.queued.iter().filter(|at| **at < done).count().max(least);
            for left in lefts(done) {
                let after = Disk::holding(cuts.after(done, left));
                let store = open(&after)
                    .unwrap_or_else(|error| panic!("cut after operation {done}, {left:?}: {error}"));
                let found = Model::of(&store).unwrap();
                assert!(
                    self.models[least..=most].contains(&found),
                    "cut after operation {done}, {left:?}: {found:?} is none of the states {least} to {most}"
                );
                // It goes on from there.
                write(&store, Model::default().step(&Step::Put(0, 9, 9))).unwrap();
                assert_eq!(store.state_get::<u32>(model::ROOMS[0], "k9").unwrap(), Some(9));
                tried += 1;
            }
        }
        tried
    }
}

fn script() -> Vec<Step> {
    let pod = |uid, name, value, size| Change::Upsert(false, uid, name, value, size);
    vec![
        Step::Apply((0..20).map(|n| pod(n, n, u32::from(n), 3_000)).collect()),
        Step::Report(Some(0), 1),
        Step::Put(0, 0, 1),
        Step::Apply(vec![
            pod(1, 2, 77, 9_000),
            Change::Remove(false, 2),
            Change::Upsert(true, 1, 1, 5, 0),
        ]),
        Step::Report(Some(0), 2),
        Step::Report(None, 3),
        Step::Settle(0),
        Step::Apply((0..15).map(|n| Change::Remove(false, n)).collect()),
        Step::Delete(0, 0),
    ]
}

#[test]
fn a_power_cut_after_any_operation_leaves_all_that_was_answered_and_nothing_half() {
    let life = Life::lead(&script(), 1);
    let tried = life.cut_everywhere(|done| {
        let seed = done as u64 * 3;
        vec![
            Left::Nothing,
            Left::Everything,
            Left::Some(seed),
            Left::Some(seed + 1),
        ]
    });
    assert!(tried > 100, "{tried} cuts");
}

#[test]
fn a_power_cut_in_random_work_written_together_leaves_a_state_in_its_order() {
    let mut runner = TestRunner::deterministic();
    for trial in 0..trials(3) {
        let steps = steps(14).new_tree(&mut runner).unwrap().current();
        let life = Life::lead(&steps, 1 + usize::try_from(trial).unwrap() % 4);
        life.cut_everywhere(|done| vec![Left::Some(trial * 1_000 + done as u64)]);
    }
}

#[test]
fn a_power_cut_while_the_store_recovers_from_another_loses_nothing_more() {
    let life = Life::lead(&script(), 3);
    let mut cuts = PowerCuts::new(life.before.clone(), life.disk.log());
    for done in (0..=life.disk.operations()).step_by(7) {
        let wreck = cuts.after(done, Left::Some(done as u64));
        let disk = Disk::holding(wreck.clone());
        let found = Model::of(&open(&disk).unwrap()).unwrap();
        let mut again = PowerCuts::new(wreck, disk.log());
        for second in 0..=disk.operations() {
            let disk = Disk::holding(again.after(second, Left::Some(second as u64)));
            let store = open(&disk).unwrap_or_else(|error| panic!("cuts after {done} and {second}: {error}"));
            assert_eq!(
                Model::of(&store).unwrap(),
                found,
                "cuts after {done} and {second}"
            );
        }
    }
}

/// A well filled store, closed in good order or not, and what it holds.
fn filled(closed: bool) -> (Vec<u8>, Vec<Model>) {
    let life = Life::lead(&script(), 1);
    let last = life.models.len() - 1;
    if closed {
        return (life.disk.content(), life.models[last..].to_vec());
    }
    let mut cuts = PowerCuts::new(life.before.clone(), life.disk.log());
    let done = *life.answered.last().unwrap();
    // A page of the newest transaction that went bad looks like one that was never written.
    (
        cuts.after(done, Left::Everything),
        life.models[last - 1..].to_vec(),
    )
}

fn damage(content: &mut Vec<u8>, chance: &mut StdRng) -> String {
    let place = |chance: &mut StdRng, length: usize| {
        // The file's head decides over everything and is small.
        if chance.random_range(0..3) == 0 {
            chance.random_range(0..length.min(4096))
        } else {
            chance.random_range(0..length)
        }
    };
    let length = content.len();
    match chance.random_range(0..4) {
        0 => {
            let keep = place(chance, length);
            content.truncate(keep);
            format!("truncated to {keep}")
        }
        1 => {
            let from = place(chance, length) / 512 * 512;
            let to = (from + 512 * chance.random_range(1..16)).min(length);
            content[from..to].fill(0);
            format!("zeros from {from} to {to}")
        }
        _ => {
            let flips: Vec<usize> = (0..chance.random_range(1..9))
                .map(|_| place(chance, length))
                .collect();
            for at in &flips {
                content[*at] ^= 1 << chance.random_range(0..8);
            }
            format!("bits flipped at {flips:?}")
        }
    }
}

#[test]
fn a_damaged_file_is_refused_as_it_is_or_opens_with_everything_in_it() {
    let mut verdicts = BTreeMap::<bool, usize>::new();
    for closed in [true, false] {
        let (whole, models) = filled(closed);
        for seed in 0..trials(120) {
            let mut chance = StdRng::seed_from_u64(seed);
            let mut content = whole.clone();
            let what = damage(&mut content, &mut chance);
            let disk = Disk::holding(content.clone());
            match open(&disk) {
                Ok(store) => {
                    let found = Model::of(&store).unwrap_or_else(|error| panic!("{seed}, {what}: {error}"));
                    assert!(models.contains(&found), "seed {seed}, {what}: {found:?}");
                    write(&store, Model::default().step(&Step::Put(0, 9, 9))).unwrap();
                    *verdicts.entry(true).or_default() += 1;
                }
                Err(error @ OpenError::Damaged { .. }) => {
                    assert!(error.to_string().contains("Nothing was changed"), "{error}");
                    assert!(
                        disk.content() == content,
                        "seed {seed}, {what}: the file was changed"
                    );
                    *verdicts.entry(false).or_default() += 1;
                }
                Err(other) => panic!("seed {seed}, {what}: {other}"),
            }
        }
    }
    assert!(verdicts.len() == 2, "both must happen: {verdicts:?}");
}

#[test]
fn pages_that_go_bad_while_the_store_is_open_make_errors_and_no_panic() {
    let (whole, _) = filled(true);
    let mut refused = 0;
    for seed in 0..trials(40) {
        let mut chance = StdRng::seed_from_u64(seed);
        let disk = Disk::holding(whole.clone());
        let store = open(&disk).unwrap();
        disk.damage(|content| {
            for _ in 0..200 {
                let at = chance.random_range(0..content.len());
                content[at] = chance.random();
            }
        });
        let outcome = catch_unwind(AssertUnwindSafe(|| {
            // What it reads may be wrong; asserting that is the checksums' part at the next opening.
            for kind in [Kind::Pod, Kind::Service] {
                refused += usize::from(store.list(kind).is_err());
            }
            refused += usize::from(store.waiting_reports(0, 100).is_err());
            refused += usize::from(write(&store, Model::default().step(&script()[0])).is_err());
            refused += usize::from(store.inventory().is_err());
            drop(store);
        }));
        assert!(outcome.is_ok(), "seed {seed} panics");
    }
    assert!(refused > 0, "no damage was noticed at all");
}

#[test]
fn a_full_disk_refuses_new_work_loses_nothing_and_goes_on_by_itself() {
    let disk = fresh();
    let store = open(&disk).unwrap();
    let mut model = Model::default();
    for step in script() {
        write(&store, model.step(&step)).unwrap();
    }
    disk.set_capacity(Some(disk.content().len()));
    let large = |uid, value| {
        Step::Apply(
            (0..40)
                .map(|n| Change::Upsert(false, uid, n, value + u32::from(n), 60_000))
                .collect(),
        )
    };
    let mut refused = 0;
    for round in 0..6 {
        let mut after = model.clone();
        match write(
            &store,
            after.step(&Step::Apply(
                (0..40)
                    .map(|n| Change::Upsert(false, 50 + n, 50 + n, round, 60_000))
                    .collect(),
            )),
        ) {
            Ok(_) => model = after,
            Err(error) => {
                assert!(!matches!(error, StoreError::Broken(_)), "{error}");
                refused += 1;
            }
        }
        assert_eq!(Model::of(&store).unwrap(), model, "round {round}");
    }
    assert!(refused > 0, "the disk was never full");
    disk.set_capacity(None);
    write(&store, model.step(&large(60, 1))).unwrap();
    assert_eq!(Model::of(&store).unwrap(), model);
    drop(store);
    assert_eq!(Model::of(&open(&disk).unwrap()).unwrap(), model);
}

/// Not a test by itself: the process that the next one kills.
#[test]
fn a_process_that_writes_until_it_is_killed() {
    let Some(dir) = std::env::var_os("SKERRY_TEST_STORE_DIR") else {
        return;
    };
    let store = Store::open(Path::new(&dir)).unwrap();
    for number in 0u32.. {
        store.state_put(model::ROOMS[0], "a", &number).unwrap();
        store.state_put(model::ROOMS[0], "b", &number).unwrap();
        println!("wrote {number}");
    }
}

#[test]
fn a_process_that_is_killed_while_it_writes_loses_nothing_that_it_was_told_is_stored() {
    use std::io::{BufRead, BufReader};
    use std::process::{Command, Stdio};
    let dir = tempfile::tempdir().unwrap();
    for round in 0..5u32 {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["a_process_that_writes_until_it_is_killed", "--nocapture"])
            .env("SKERRY_TEST_STORE_DIR", dir.path())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let told = lines
            .map_while(Result::ok)
            .filter_map(|line| line.split_once("wrote ")?.1.parse::<u32>().ok())
            .find(|number| *number >= 3 + round * 5)
            .expect("it writes");
        child.kill().unwrap();
        child.wait().unwrap();
        let store = Store::open(dir.path()).unwrap();
        let read = |key| store.state_get::<u32>(model::ROOMS[0], key).unwrap().unwrap();
        let (a, b) = (read("a"), read("b"));
        assert!(
            b >= told && (a == b || a == b + 1),
            "told {told}, found {a} and {b}"
        );
    }
}
