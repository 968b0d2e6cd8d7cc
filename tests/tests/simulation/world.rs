//! One history: what happens when, and what must hold after each of it.

use std::collections::{BTreeMap, BTreeSet};

use skerry_proto::link::{CloudBulk, Hello, Kind, Welcome, edge_bulk};
use skerry_provider::link::sync::Proof;

use crate::cloud::{self, Cloud, Received};
use crate::cluster::Cluster;
use crate::machine::{Machine, name};
use crate::rng::Rng;

const STEPS: usize = 350;
const ROUNDS: usize = 300;

/// What the edge sends.
pub(crate) enum Up {
    Hello(Hello),
    Bulk(edge_bulk::Message),
}

/// What the provider sends.
pub(crate) enum Down {
    Welcome(Welcome),
    Goodbye,
    Bulk(CloudBulk),
}

/// A line from a machine to the provider. A cut line delivers what is still on its way to whoever still listens.
pub(crate) struct Wire {
    pub(crate) number: usize,
    pub(crate) machine: usize,
    pub(crate) up: std::collections::VecDeque<Up>,
    pub(crate) down: std::collections::VecDeque<Down>,
}

/// A rule that is broken on purpose.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Sabotage {
    AcknowledgeWithoutCommit,
    RemoveAnother,
    NoTombstones,
    NoGate,
    CountTwice,
}

impl Sabotage {
    /// Each with a word of the complaint that must follow.
    pub(crate) const ALL: [(Self, &'static str); 5] = [
        (Self::AcknowledgeWithoutCommit, "is not what it must be"),
        (Self::RemoveAnother, "without an order"),
        (Self::NoTombstones, "started again"),
        (Self::NoGate, "went back"),
        (Self::CountTwice, "counted"),
    ];
}

/// How often something rare has happened.
#[derive(Debug, Default)]
pub(crate) struct Seen(BTreeMap<&'static str, usize>);

impl Seen {
    fn note(&mut self, what: &'static str) {
        *self.0.entry(what).or_default() += 1;
    }

    pub(crate) fn add(&mut self, other: &Self) {
        for (what, count) in &other.0 {
            *self.0.entry(what).or_default() += count;
        }
    }

    /// What 200 histories must have seen and have not.
    pub(crate) fn rare(&self) -> Vec<&'static str> {
        let wanted = [
            "cut",
            "crash",
            "boot",
            "provider crash",
            "restore",
            "clone",
            "refused",
            "asked",
            "diverged",
            "fenced",
            "older provider",
            "returned",
        ];
        wanted
            .into_iter()
            .filter(|what| !self.0.contains_key(what))
            .collect()
    }
}

pub(crate) struct World {
    rng: Rng,
    sabotage: Option<Sabotage>,
    /// Prints the history.
    pub(crate) tells: bool,
    pub(crate) seen: Seen,
    now: u64,
    cluster: Cluster,
    backup: Option<Cluster>,
    /// The cluster was restored: what is gone from it is gone.
    restored: bool,
    /// Objects may turn out to be unreadable, and have.
    rots: bool,
    rotten: bool,
    clones: bool,
    cloud: Cloud,
    machines: Vec<Machine>,
    wires: Vec<Wire>,
    pods: usize,
}

impl World {
    pub(crate) fn new(seed: u64, sabotage: Option<Sabotage>) -> Self {
        let mut rng = Rng::new(seed);
        let (rots, clones) = (rng.chance(25), rng.chance(20));
        let mut cluster = Cluster {
            site: cloud::fresh_site(),
            ..Cluster::default()
        };
        // Enough for several buckets, in some worlds.
        for number in 0..if rng.chance(25) { 90 } else { 2 } {
            cluster.set_secret(&format!("secret-{number}"));
        }
        let mut machine = Machine::new(0);
        machine.start(true);
        Self {
            rng,
            sabotage,
            tells: false,
            seen: Seen::default(),
            now: 0,
            cluster,
            backup: None,
            restored: false,
            rots,
            rotten: false,
            clones,
            cloud: Cloud::new(),
            machines: vec![machine],
            wires: Vec::new(),
            pods: 0,
        }
    }

    /// The whole history; the first thing that does not hold.
    pub(crate) fn run(&mut self) -> Result<(), String> {
        for _ in 0..STEPS {
            self.now += 1;
            if self.rng.chance(30) {
                self.fate()?;
            } else {
                self.progress()?;
            }
            self.check_events()?;
        }
        self.quiet()
    }

    fn tell(&mut self, what: &'static str) {
        self.seen.note(what);
        self.say(what);
    }

    fn say(&self, what: &str) {
        if self.tells {
            println!("{:>5} {what}", self.now);
        }
    }

    /// Something that nobody has asked for.
    fn fate(&mut self) -> Result<(), String> {
        let machine = self.rng.below(self.machines.len());
        match self.rng.below(22) {
            0..=5 => self.change_cluster(),
            6..=8 => self.cut_edge(machine),
            9..=10 => {
                if let Some(side) = self.rng.pick(self.cloud.sides.iter().map(|side| side.wire)) {
                    self.tell("cut");
                    self.cloud.cut(side);
                }
            }
            11..=12 => self.restart_machine(machine),
            13 => self.crash_cloud()?,
            14 => self.backup = Some(self.cluster.clone()),
            15 => self.restore()?,
            16 if self.clones && self.machines.len() < 2 => {
                self.tell("clone");
                let mut twin = self.machines[machine].clone_disk(self.machines.len());
                twin.start(true);
                self.machines.push(twin);
            }
            17 if self.rots => {
                let number = self.rng.below(1_000);
                if self.machines[machine].distrust(number) {
                    self.rotten = true;
                    self.say("an object cannot be read");
                }
            }
            18 => self.now += 1_500,
            _ => {}
        }
        Ok(())
    }

    fn change_cluster(&mut self) {
        let pod = self.rng.pick(self.cluster.pods.keys().cloned());
        match (self.rng.below(8), pod) {
            (0..=2, _) if self.cluster.pods.len() < 6 => {
                self.pods += 1;
                let token = self.rng.chance(40);
                self.cluster
                    .set_pod(&format!("pod-{}", self.pods), 0, false, token);
            }
            (3, Some(pod)) => self.cluster.update(&pod),
            (4..=5, Some(pod)) => self.cluster.delete(&pod),
            (6, Some(pod)) => drop(self.cluster.pods.remove(&pod)),
            _ => {
                let secret = format!("secret-{}", self.rng.below(4));
                if self.rng.chance(40) {
                    self.cluster.remove_secret(&secret);
                } else {
                    self.cluster.set_secret(&secret);
                }
            }
        }
        self.cloud.dirty();
        self.say("the cluster changes");
    }

    fn cut_edge(&mut self, machine: usize) {
        if self.machines[machine].session.take().is_some() {
            self.tell("cut");
        }
    }

    fn restart_machine(&mut self, machine: usize) {
        if self.machines[machine].off {
            return;
        }
        let boot = self.rng.chance(40);
        self.tell(if boot { "boot" } else { "crash" });
        self.machines[machine].crash();
        self.machines[machine].start(boot);
    }

    fn crash_cloud(&mut self) -> Result<(), String> {
        self.tell("provider crash");
        let lands = self.rng.chance(50);
        self.cloud.crash(&mut self.cluster, lands, self.sabotage)?;
        self.cloud.up = true;
        self.cloud.digests = !self.rng.chance(15);
        if !self.cloud.digests {
            self.tell("older provider");
        }
        Ok(())
    }

    /// The cluster is what it was; the provider notices, and starts without memory.
    fn restore(&mut self) -> Result<(), String> {
        let Some(backup) = self.backup.clone() else {
            return Ok(());
        };
        self.tell("restore");
        if backup.pods.keys().any(|uid| !self.cluster.pods.contains_key(uid)) {
            self.tell("returned");
        }
        self.cluster = backup;
        self.restored = true;
        self.crash_cloud()
    }

    /// Something that happens by itself, sooner or later.
    fn progress(&mut self) -> Result<(), String> {
        match self.rng.below(10) {
            0..=1 => {
                let machine = self.rng.below(self.machines.len());
                self.connect(machine);
            }
            2..=4 => {
                let most = 1 + self.rng.below(6);
                // Most lines that were ever opened are dead, and would starve the others.
                let waiting = (0..self.wires.len()).filter(|wire| !self.wires[*wire].up.is_empty());
                if let Some(wire) = self.rng.pick(waiting) {
                    for _ in 0..most {
                        self.deliver_up(wire)?;
                    }
                }
            }
            5..=6 => {
                let machine = self.rng.below(self.machines.len());
                let most = 1 + self.rng.below(6);
                self.deliver_down(machine, most)?;
            }
            7 => {
                if let Some(wire) = self.rng.pick(self.cloud.sides.iter().map(|side| side.wire)) {
                    let most = self.rng.below(5);
                    self.cloud
                        .step(&mut self.wires[wire], &self.cluster, self.now, most);
                    let refuses = self.rng.chance(15);
                    self.cloud.mint(wire, self.now, refuses);
                }
            }
            8 => {
                let machine = self.rng.below(self.machines.len());
                if let Some(uid) = self.rng.pick(self.machines[machine].pods()) {
                    self.machines[machine].look(&uid, self.sabotage)?;
                }
                let most = self.rng.below(4);
                self.send_reports(machine, most);
            }
            _ => {
                if let Some((wire, lane)) = self.rng.pick(self.cloud.ready_lanes(self.sabotage)) {
                    self.cloud.begin_write(&mut self.wires[wire], &lane);
                }
                if self.cloud.writing() > 0 && self.rng.chance(50) {
                    let place = self.rng.below(self.cloud.writing());
                    self.land(place)?;
                }
            }
        }
        Ok(())
    }

    fn connect(&mut self, machine: usize) {
        let number = self.wires.len();
        let it = &mut self.machines[machine];
        if it.off || it.store.is_none() || it.session.is_some() || !self.cloud.up {
            return;
        }
        let hello = it.connect(number);
        self.wires.push(Wire {
            number,
            machine,
            up: [hello].into(),
            down: Default::default(),
        });
        self.say(&format!("machine {machine} connects by line {number}"));
    }

    fn deliver_up(&mut self, wire: usize) -> Result<(), String> {
        if self.wires[wire].up.is_empty() {
            return Ok(());
        }
        let sessions = self.cloud.sides.len();
        let line = &mut self.wires[wire];
        match self
            .cloud
            .receive(line, &mut self.cluster, self.now, self.sabotage)?
        {
            Received::Nothing => {}
            Received::Begun => {
                self.say(&format!("line {wire}: a session begins"));
                if sessions > 0 {
                    self.tell("fenced");
                }
            }
            Received::Refused => self.tell("refused"),
            Received::Asked => self.tell("asked"),
            Received::Diverged => {
                if !self.rotten {
                    return Err(format!("the store of line {wire} is not what it must be"));
                }
                self.tell("diverged");
            }
        }
        Ok(())
    }

    fn deliver_down(&mut self, machine: usize, most: usize) -> Result<(), String> {
        let Some(session) = &self.machines[machine].session else {
            return Ok(());
        };
        let wire = session.wire;
        if self.tells {
            let names: Vec<_> = self.wires[wire].down.iter().take(most).map(name).collect();
            self.say(&format!("machine {machine} takes up to {most} of {names:?}"));
        }
        self.machines[machine].receive(&mut self.wires[wire], most, self.sabotage)
    }

    fn send_reports(&mut self, machine: usize, most: usize) {
        if let Some(session) = &self.machines[machine].session {
            let wire = session.wire;
            self.machines[machine].report(&mut self.wires[wire], most);
        }
    }

    fn land(&mut self, place: usize) -> Result<(), String> {
        let pods = self.cluster.pods.len();
        if let Some((wire, seq)) = self.cloud.land(place, &mut self.cluster, self.sabotage)? {
            cloud::answer(&mut self.wires[wire], seq);
        }
        if self.cluster.pods.len() != pods {
            self.cloud.dirty();
        }
        Ok(())
    }

    /// No event counts for more than has happened.
    fn check_events(&self) -> Result<(), String> {
        for (event, counted) in &self.cluster.events {
            let happened = self
                .machines
                .iter()
                .filter_map(|machine| machine.emitted.get(event))
                .max();
            if happened.is_none_or(|happened| counted > happened) {
                return Err(format!(
                    "{event} is counted {counted} times and happened {happened:?} times"
                ));
            }
        }
        Ok(())
    }

    /// Nothing more goes wrong: everything must come to agree.
    fn quiet(&mut self) -> Result<(), String> {
        self.say("all is quiet from here on");
        self.cloud.digests = true;
        // The remedy for a clone: one of the two goes.
        let kept = self.rng.below(self.machines.len());
        for (number, machine) in self.machines.iter_mut().enumerate() {
            machine.session = None;
            if number != kept {
                machine.crash();
                machine.off = true;
            }
        }
        // Half-open lines are noticed.
        let open: Vec<usize> = self.cloud.sides.iter().map(|side| side.wire).collect();
        for wire in open {
            self.cloud.cut(wire);
        }
        let mut last = String::new();
        let mut told = false;
        for _ in 0..ROUNDS {
            self.now += 30;
            self.connect(kept);
            let Some(wire) = self.machines[kept].session.as_ref().map(|session| session.wire) else {
                continue;
            };
            self.deliver_down(kept, 20)?;
            for uid in self.machines[kept].pods() {
                self.machines[kept].look(&uid, self.sabotage)?;
            }
            self.send_reports(kept, 20);
            while !self.wires[wire].up.is_empty() {
                self.deliver_up(wire)?;
            }
            self.cloud.check(&mut self.wires[wire], self.now);
            self.cloud
                .step(&mut self.wires[wire], &self.cluster, self.now, 20);
            self.cloud.mint(wire, self.now, false);
            for (wire, lane) in self.cloud.ready_lanes(self.sabotage) {
                self.cloud.begin_write(&mut self.wires[wire], &lane);
            }
            while self.cloud.writing() > 0 {
                self.land(0)?;
            }
            self.check_events()?;
            match self.unsettled(kept, wire) {
                None if told => return self.check_effects(kept),
                None => {
                    // What follows a synchronisation: every status once more.
                    told = true;
                    self.machines[kept].tell_all();
                }
                Some(why) => last = why,
            }
        }
        Err(format!("no agreement: {last}"))
    }

    fn unsettled(&self, kept: usize, wire: usize) -> Option<String> {
        let desired = self.cluster.desired();
        let wanted = desired.objects.iter().map(|(key, object)| {
            let kind: i32 = key.kind.into();
            ((kind, key.uid.to_string()), object.hash.0.to_vec())
        });
        let tokens: BTreeSet<String> = desired
            .tokens
            .iter()
            .filter(|(_, token)| !token.leaving)
            .map(|(key, _)| key.uid.to_string())
            .collect();
        let deleting = self.cluster.pods.values().any(|pod| pod.deleting);
        if deleting {
            return Some("a pod is still being deleted".to_owned());
        }
        if let Some(why) = self.machines[kept].unsettled(&wanted.collect(), &tokens) {
            return Some(why);
        }
        match self.cloud.stands(wire) {
            Some((Proof::Equal, _)) => None,
            other => Some(format!("both sides agree, but the proof is {other:?}")),
        }
    }

    /// Everything that happened has its effect, once, and every pod a status.
    fn check_effects(&self, kept: usize) -> Result<(), String> {
        let machine = &self.machines[kept];
        if !self.restored && self.machines.len() == 1 {
            for (event, happened) in &machine.emitted {
                let counted = self.cluster.events.get(event).copied().unwrap_or(0);
                if counted != *happened {
                    return Err(format!(
                        "{event} is counted {counted} times and happened {happened} times"
                    ));
                }
            }
        }
        let pods = self.cluster.desired().objects;
        for key in pods.keys().filter(|key| key.kind == Kind::Pod) {
            if !self.cluster.statuses.contains_key(key.uid.as_str()) {
                return Err(format!("{} never got a status", key.uid));
            }
        }
        Ok(())
    }
}
