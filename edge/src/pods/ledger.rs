//! The node's book: which pods it has taken, and what it gave them.
//!
//! Every decision that depends on other pods is made here, under one lock: two pods that come at once never both get the
//! last room. An entry is made when a pod is admitted, or found admitted in its record after a restart, and ends when
//! nothing of the pod runs any more. What a decision means for *other* pods (a deferred resize that fits now, a pod that
//! must make room) is told to their workers through [`Nudge`]s. Sources: a kubelet's allocation and preemption managers.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Mutex, MutexGuard, PoisonError};

use jiff::Timestamp;
use k8s_openapi::api::core::v1::Pod;
use skerry_proto::object::Uid;
use tokio::sync::mpsc;

use super::admission::{NodeFacts, Rejection, Shortage, host_ports};
use super::resources::{self, Amounts};
use crate::cgroup::Tier;

/// Something that a worker should know.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Nudge {
    /// Look again: what the pod waits for may be there.
    Look(Uid),
    /// End: a critical pod needs the room.
    Preempt(Uid),
}

/// An answer to a pod that wants in.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Verdict {
    /// It is in the book.
    Admitted,
    /// It is in the book, but must wait until the pods that make room for it are gone.
    Waits,
    /// It is not.
    Rejected(Rejection),
}

/// An answer to a pod that wants another size.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Answer {
    /// The book has the new size.
    Granted,
    /// Not now; it is granted when pods leave.
    Deferred(String),
    /// Never on this node.
    Infeasible(String),
}

/// See the [module](self).
pub(crate) struct Ledger {
    entries: Mutex<BTreeMap<Uid, Entry>>,
    nudges: mpsc::UnboundedSender<Nudge>,
}

struct Entry {
    requests: Amounts,
    ports: BTreeSet<(String, String, u16)>,
    critical: bool,
    priority: Option<i32>,
    tier: Tier,
    /// Pods that must go first.
    waits_for: BTreeSet<Uid>,
    wish: Option<Wish>,
}

/// A deferred resize.
struct Wish {
    requests: Amounts,
    since: Timestamp,
    /// What the node had to give when it was deferred.
    node: BTreeMap<String, i128>,
}

impl Entry {
    fn of(pod: &Pod) -> Self {
        Self {
            requests: resources::requests(pod),
            ports: host_ports(pod),
            critical: resources::is_critical(pod),
            priority: pod.spec.as_ref().and_then(|s| s.priority),
            tier: resources::qos(pod),
            waits_for: BTreeSet::new(),
            wish: None,
        }
    }

    fn request(&self, name: &str) -> i128 {
        self.requests.get(name).map_or(0, |a| a.milli)
    }

    /// Whether a critical pod may take this one's room.
    fn yields_to(&self, other: &Entry) -> bool {
        (other.critical && !self.critical)
            || matches!((other.priority, self.priority), (Some(theirs), Some(own)) if theirs > own)
    }
}

impl Ledger {
    /// An empty book, and where the nudges come out.
    pub(crate) fn new() -> (Self, mpsc::UnboundedReceiver<Nudge>) {
        let (nudges, out) = mpsc::unbounded_channel();
        let entries = Mutex::default();
        (Self { entries, nudges }, out)
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<Uid, Entry>> {
        self.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn nudge(&self, nudge: Nudge) {
        // Without a supervisor, at the end of the daemon, nobody needs it.
        let _ = self.nudges.send(nudge);
    }

    /// Enters a pod that was admitted before, whatever it asks for. Does nothing when it is in the book.
    pub(crate) fn restore(&self, uid: &Uid, allocated: &Pod) {
        self.lock()
            .entry(uid.clone())
            .or_insert_with(|| Entry::of(allocated));
    }

    /// Whether the pod must still wait for others to make room.
    pub(crate) fn waits(&self, uid: &Uid) -> bool {
        self.lock()
            .get(uid)
            .is_some_and(|entry| !entry.waits_for.is_empty())
    }

    /// Enters a new pod, if it fits.
    pub(crate) fn admit(&self, uid: &Uid, pod: &Pod, node: &NodeFacts) -> Verdict {
        let mut entries = self.lock();
        let mut new = Entry::of(pod);
        let shortages = shortages(&entries, uid, &new.requests, &node.allocatable);
        let taken = entries
            .iter()
            .any(|(other, entry)| other != uid && clash(&new.ports, &entry.ports));
        let reasons = node.refuses(pod, taken);
        let critical = resources::is_critical(pod);
        // What a critical pod lacks is made for it; everything else refuses it as any pod, the room first.
        if let Some(shortage) = shortages.first().filter(|_| !critical) {
            return Verdict::Rejected(shortage.rejection());
        }
        if let Some(reason) = reasons.into_iter().next() {
            return Verdict::Rejected(reason);
        }
        if !shortages.is_empty() {
            match victims(&entries, uid, &new, &shortages) {
                Ok(victims) => new.waits_for = victims,
                Err(missing) => return Verdict::Rejected(Rejection::unexpected(&missing)),
            }
        }
        for victim in &new.waits_for {
            self.nudge(Nudge::Preempt(victim.clone()));
        }
        let waits = !new.waits_for.is_empty();
        entries.insert(uid.clone(), new);
        if waits { Verdict::Waits } else { Verdict::Admitted }
    }

    /// Gives an admitted pod the size that its spec asks for, if it fits.
    pub(crate) fn resize(&self, uid: &Uid, wished: &Pod, node: &NodeFacts, now: Timestamp) -> Answer {
        let mut entries = self.lock();
        let requests = resources::requests(wished);
        for (name, amount) in &requests {
            let capacity = node.allocatable.get(name).copied();
            if let Some(capacity) = capacity.filter(|capacity| amount.milli > *capacity) {
                let (requested, capacity) = (unit(name, amount.milli), unit(name, capacity));
                if let Some(entry) = entries.get_mut(uid) {
                    entry.wish = None;
                }
                return Answer::Infeasible(format!(
                    "Node didn't have enough capacity: {name}, requested: {requested}, capacity: {capacity}"
                ));
            }
        }
        let shortage = shortages(&entries, uid, &requests, &node.allocatable)
            .into_iter()
            // A pod that is here already needs no place of its own.
            .find(|s| s.resource != "pods");
        let Some(entry) = entries.get_mut(uid) else {
            return Answer::Deferred("the pod is not admitted".to_owned());
        };
        let Some(shortage) = shortage else {
            entry.requests = requests;
            entry.wish = None;
            self.retry(&mut entries);
            return Answer::Granted;
        };
        let since = entry.wish.as_ref().map_or(now, |wish| wish.since);
        entry.wish = Some(Wish {
            requests,
            since,
            node: node.allocatable.clone(),
        });
        Answer::Deferred(shortage.to_string())
    }

    /// The pod no longer asks for another size.
    pub(crate) fn no_wish(&self, uid: &Uid) {
        if let Some(entry) = self.lock().get_mut(uid) {
            entry.wish = None;
        }
    }

    /// Nothing of the pod runs any more.
    pub(crate) fn forget(&self, uid: &Uid) {
        let mut entries = self.lock();
        if entries.remove(uid).is_none() {
            return;
        }
        for (other, entry) in entries.iter_mut() {
            if entry.waits_for.remove(uid) && entry.waits_for.is_empty() {
                self.nudge(Nudge::Look(other.clone()));
            }
        }
        self.retry(&mut entries);
    }

    /// Thousandths of a processor that the Burstable pods request together.
    pub(crate) fn burstable_cpu(&self) -> i128 {
        let entries = self.lock();
        let burstable = entries.values().filter(|entry| entry.tier == Tier::Burstable);
        burstable.map(|entry| entry.request("cpu")).sum()
    }

    /// Gives room to deferred resizes in their order: those that ask for no more than they have, then by priority, class
    /// and age. The worker that asks again finds its wish granted.
    fn retry(&self, entries: &mut BTreeMap<Uid, Entry>) {
        let mut waiting: Vec<_> = entries
            .iter()
            .filter_map(|(uid, entry)| {
                let wish = entry.wish.as_ref()?;
                let more = ["cpu", "memory"]
                    .iter()
                    .any(|name| wish.requests.get(*name).map_or(0, |a| a.milli) > entry.request(name));
                let priority = entry.priority.unwrap_or(0);
                Some((
                    (more, std::cmp::Reverse(priority), entry.tier, wish.since),
                    uid.clone(),
                ))
            })
            .collect();
        waiting.sort();
        for (_, uid) in waiting {
            let Some(wish) = entries.get(&uid).and_then(|entry| entry.wish.as_ref()) else {
                continue;
            };
            let short = shortages(entries, &uid, &wish.requests, &wish.node);
            if short.iter().any(|s| s.resource != "pods") {
                continue;
            }
            if let Some(entry) = entries.get_mut(&uid)
                && let Some(wish) = entry.wish.take()
            {
                entry.requests = wish.requests;
                self.nudge(Nudge::Look(uid));
            }
        }
    }
}

/// Processors in thousandths, everything else in whole units: as messages show them.
fn unit(name: &str, milli: i128) -> i128 {
    if name == "cpu" {
        milli
    } else {
        (milli + 999).div_euclid(1000)
    }
}

/// What is missing for a pod beside all others: places first, then processors, memory, storage, the rest by name.
fn shortages(
    entries: &BTreeMap<Uid, Entry>,
    uid: &Uid,
    requests: &Amounts,
    allocatable: &BTreeMap<String, i128>,
) -> Vec<Shortage> {
    let others = || {
        entries
            .iter()
            .filter(|(other, _)| *other != uid)
            .map(|(_, entry)| entry)
    };
    let mut found = Vec::new();
    let places = allocatable.get("pods").copied().unwrap_or(i128::MAX) / 1000;
    let used = i128::try_from(others().count()).unwrap_or(i128::MAX);
    if used + 1 > places {
        found.push(Shortage {
            resource: "pods".to_owned(),
            requested: 1,
            used,
            capacity: places,
        });
    }
    let first = ["cpu", "memory", "ephemeral-storage"];
    let rest = requests
        .keys()
        .map(String::as_str)
        .filter(|name| !first.contains(name));
    for name in first.into_iter().chain(rest) {
        let wanted = requests.get(name).map_or(0, |a| a.milli);
        // A resource that the node does not know is somebody else's to give.
        let Some(capacity) = allocatable.get(name).copied().filter(|_| wanted > 0) else {
            continue;
        };
        let used: i128 = others().map(|entry| entry.request(name)).sum();
        if wanted > capacity - used {
            found.push(Shortage {
                resource: name.to_owned(),
                requested: unit(name, wanted),
                used: unit(name, used),
                capacity: unit(name, capacity),
            });
        }
    }
    found
}

/// Two pods want the same port of the same address of the node.
fn clash(own: &BTreeSet<(String, String, u16)>, other: &BTreeSet<(String, String, u16)>) -> bool {
    let any = |ip: &str| ip.is_empty() || ip == "0.0.0.0";
    own.iter().any(|(protocol, ip, port)| {
        other.iter().any(|(theirs, their_ip, their_port)| {
            (protocol, port) == (theirs, their_port) && (any(ip) || any(their_ip) || ip == their_ip)
        })
    })
}

/// The pods that must go to give a critical pod what it lacks: as few and as expendable as possible. First it is asked
/// which Guaranteed pods must go although everything below them goes; then which Burstable ones, given those; then the
/// rest. Those that are going anyway are counted on.
fn victims(
    entries: &BTreeMap<Uid, Entry>,
    uid: &Uid,
    new: &Entry,
    shortages: &[Shortage],
) -> Result<BTreeSet<Uid>, String> {
    let need: Vec<(String, i128)> = shortages
        .iter()
        .map(|s| (s.resource.clone(), s.requested - (s.capacity - s.used)))
        .collect();
    let of = |tier: Tier| -> Vec<&Uid> {
        entries
            .iter()
            .filter(|(other, entry)| *other != uid && entry.tier == tier && entry.yields_to(new))
            .map(|(other, _)| other)
            .collect()
    };
    let (best, burst, sure) = (of(Tier::BestEffort), of(Tier::Burstable), of(Tier::Guaranteed));
    let without = |gone: &[&Uid]| -> Vec<(String, i128)> {
        need.iter()
            .map(|(name, amount)| {
                let freed: i128 = gone.iter().map(|g| given(entries, g, name)).sum();
                (name.clone(), amount - freed)
            })
            .filter(|(_, amount)| *amount > 0)
            .collect()
    };
    let everything: Vec<&Uid> = best.iter().chain(&burst).chain(&sure).copied().collect();
    let missing = without(&everything);
    if !missing.is_empty() {
        let text: Vec<String> = missing
            .iter()
            .map(|(n, q)| format!("(res: {n}, q: {q}), "))
            .collect();
        return Err(format!(
            "preemption: error finding a set of pods to preempt: no set of running pods found to reclaim resources: [{}]",
            text.concat()
        ));
    }
    let below: Vec<&Uid> = best.iter().chain(&burst).copied().collect();
    let sure = nearest(entries, sure, without(&below));
    let with_sure: Vec<&Uid> = best.iter().chain(&sure).copied().collect();
    let burst = nearest(entries, burst, without(&with_sure));
    let chosen: Vec<&Uid> = burst.iter().chain(&sure).copied().collect();
    let best = nearest(entries, best, without(&chosen));
    Ok(best.into_iter().chain(chosen).cloned().collect())
}

/// What a pod's end gives back, in the units of messages.
fn given(entries: &BTreeMap<Uid, Entry>, uid: &Uid, name: &str) -> i128 {
    match name {
        "pods" => 1,
        _ => unit(name, entries.get(uid).map_or(0, |entry| entry.request(name))),
    }
}

/// Pods whose requests come nearest to what is needed, one after the other, until nothing is; the smaller of two equal
/// ones.
fn nearest<'a>(
    entries: &BTreeMap<Uid, Entry>,
    mut pods: Vec<&'a Uid>,
    mut need: Vec<(String, i128)>,
) -> Vec<&'a Uid> {
    let mut chosen = Vec::new();
    while !need.is_empty() && !pods.is_empty() {
        let distance = |uid: &Uid| -> f64 {
            let missing = need.iter().map(|(name, amount)| {
                let left = (amount - given(entries, uid, name)).max(0);
                #[allow(clippy::cast_precision_loss)] // A measure, not an amount.
                let share = left as f64 / *amount as f64;
                share * share
            });
            missing.sum()
        };
        let size = |uid: &Uid| (given(entries, uid, "memory"), given(entries, uid, "cpu"));
        let best = (0..pods.len()).min_by(|a, b| {
            let by_distance = distance(pods[*a]).total_cmp(&distance(pods[*b]));
            by_distance.then_with(|| size(pods[*a]).cmp(&size(pods[*b])))
        });
        let Some(best) = best else { break };
        let uid = pods.swap_remove(best);
        for (name, amount) in &mut need {
            *amount -= given(entries, uid, name);
        }
        need.retain(|(_, amount)| *amount > 0);
        chosen.push(uid);
    }
    chosen
}

#[cfg(test)]
#[path = "ledger_tests.rs"]
mod tests;
