//! What a pod asks for, and what that is as cgroup values and OOM scores. Pure functions.
//!
//! The rules are the API's (`PodRequests`, `PodLimits`, `GetPodQOS`) and a kubelet's (`ResourceConfigForPod`,
//! `GetContainerOOMScoreAdjust`). They must be given the pod with what is *allocated* to it ([`super::allocation`]),
//! not what it wishes.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::{Container, Pod, ResourceRequirements};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;
use skerry_proto::object::Uid;

use super::plan::{inits, is_sidecar, regulars};
use super::quantity::{self, Format};
use crate::cgroup::{Kernel, PERIOD, PodCgroup, Tier, Values};
use crate::runtime::Resources;

/// The least CPU shares.
const LEAST_SHARES: u64 = 2;
/// The least CPU quota in microseconds.
const LEAST_QUOTA: i64 = 1000;
/// OOM score of what is killed last.
const PROTECTED: i64 = -997;
/// OOM score of what is killed first.
const EXPENDABLE: i64 = 1000;
/// Priorities from here on are the system's own.
pub(crate) const CRITICAL_PRIORITY: i32 = 2_000_000_000;

/// Quantities by resource name, as the API has them.
pub(crate) type List = BTreeMap<String, Quantity>;

/// A sum of quantities.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Amount {
    /// Thousandths.
    pub(crate) milli: i128,
    format: Format,
}

impl Amount {
    fn of(quantity: &Quantity) -> Self {
        Self {
            milli: quantity::milli(quantity).unwrap_or(0),
            format: Format::of(quantity),
        }
    }

    fn add(&mut self, other: Self) {
        if self.milli == 0 {
            self.format = other.format;
        }
        self.milli += other.milli;
    }

    /// Whole units, rounded up.
    pub(crate) fn value(self) -> i128 {
        (self.milli + 999).div_euclid(1000)
    }
}

/// Amounts by resource name.
pub(crate) type Amounts = BTreeMap<String, Amount>;

/// Amounts as the API has them.
pub(crate) fn to_list(amounts: &Amounts) -> List {
    amounts
        .iter()
        .map(|(name, a)| (name.clone(), quantity::from_milli(a.milli, a.format)))
        .collect()
}

fn add(sum: &mut Amounts, list: Option<&List>) {
    for (name, quantity) in list.into_iter().flatten() {
        sum.entry(name.clone()).or_default().add(Amount::of(quantity));
    }
}

fn raise(sum: &mut Amounts, other: &Amounts) {
    for (name, amount) in other {
        let own = sum.entry(name.clone()).or_insert(*amount);
        if amount.milli > own.milli {
            *own = *amount;
        }
    }
}

/// Resources that a pod may ask for as a whole.
fn pod_level(name: &str) -> bool {
    matches!(name, "cpu" | "memory") || name.starts_with("hugepages-")
}

fn pod_resources(pod: &Pod) -> Option<&ResourceRequirements> {
    let resources = pod.spec.as_ref()?.resources.as_ref()?;
    let named = |list: &Option<List>| list.iter().flatten().any(|(name, _)| pod_level(name));
    (named(&resources.requests) || named(&resources.limits)).then_some(resources)
}

/// The containers' part: regular ones and sidecars together, or the largest moment of the initialisation.
fn aggregate(pod: &Pod, of: impl Fn(&ResourceRequirements) -> Option<&List>) -> Amounts {
    let list = |c: &Container| -> Option<List> { c.resources.as_ref().and_then(|r| of(r).cloned()) };
    let mut sum = Amounts::new();
    for container in regulars(pod) {
        add(&mut sum, list(container).as_ref());
    }
    let mut sidecars = Amounts::new();
    let mut largest = Amounts::new();
    for container in inits(pod) {
        let own = list(container);
        if is_sidecar(container) {
            add(&mut sum, own.as_ref());
            add(&mut sidecars, own.as_ref());
            raise(&mut largest, &sidecars);
        } else {
            let mut moment = sidecars.clone();
            add(&mut moment, own.as_ref());
            raise(&mut largest, &moment);
        }
    }
    raise(&mut sum, &largest);
    sum
}

fn override_by_pod(sum: &mut Amounts, list: Option<&List>) {
    for (name, quantity) in list.into_iter().flatten().filter(|(name, _)| pod_level(name)) {
        sum.insert(name.clone(), Amount::of(quantity));
    }
}

/// What the pod as a whole requests, its overhead included.
pub(crate) fn requests(pod: &Pod) -> Amounts {
    let mut sum = aggregate(pod, |r| r.requests.as_ref());
    override_by_pod(&mut sum, pod_resources(pod).and_then(|r| r.requests.as_ref()));
    add(&mut sum, pod.spec.as_ref().and_then(|s| s.overhead.as_ref()));
    sum
}

/// What the pod as a whole may use at most, its overhead included where there is a limit.
pub(crate) fn limits(pod: &Pod) -> Amounts {
    let mut sum = aggregate(pod, |r| r.limits.as_ref());
    override_by_pod(&mut sum, pod_resources(pod).and_then(|r| r.limits.as_ref()));
    for (name, quantity) in pod.spec.iter().flat_map(|s| s.overhead.iter().flatten()) {
        if let Some(limit) = sum.get_mut(name).filter(|limit| limit.milli > 0) {
            limit.add(Amount::of(quantity));
        }
    }
    sum
}

/// Every container has a limit, or the pod has.
fn is_limited(pod: &Pod, name: &str) -> bool {
    let has = |r: Option<&ResourceRequirements>| amount(r.and_then(|r| r.limits.as_ref()), name).is_some();
    if has(pod_resources(pod)) {
        return true;
    }
    let mut containers = inits(pod).iter().chain(regulars(pod)).peekable();
    containers.peek().is_some() && containers.all(|c| has(c.resources.as_ref()))
}

fn amount(list: Option<&List>, name: &str) -> Option<i128> {
    quantity::milli(list?.get(name)?).filter(|m| *m > 0)
}

/// The class that the API server gave, or would give.
pub(crate) fn qos(pod: &Pod) -> Tier {
    match pod.status.as_ref().and_then(|s| s.qos_class.as_deref()) {
        Some("Guaranteed") => return Tier::Guaranteed,
        Some("Burstable") => return Tier::Burstable,
        Some("BestEffort") => return Tier::BestEffort,
        _ => {}
    }
    let all: Vec<Option<&ResourceRequirements>> = match pod_resources(pod) {
        Some(own) => vec![Some(own)],
        None => inits(pod)
            .iter()
            .chain(regulars(pod))
            .map(|c| c.resources.as_ref())
            .collect(),
    };
    let (mut any, mut sure) = (false, true);
    for resources in all {
        for name in ["cpu", "memory"] {
            let limit = amount(resources.and_then(|r| r.limits.as_ref()), name);
            let request = amount(resources.and_then(|r| r.requests.as_ref()), name).or(limit);
            any |= request.is_some();
            sure &= limit.is_some() && request == limit;
        }
    }
    match (any, sure) {
        (false, _) => Tier::BestEffort,
        (true, true) => Tier::Guaranteed,
        (true, false) => Tier::Burstable,
    }
}

/// The pod's place in the tree of cgroups.
pub(crate) fn cgroup(pod: &Pod) -> PodCgroup {
    PodCgroup {
        uid: Uid::from(pod.metadata.uid.as_deref().unwrap_or_default()),
        tier: qos(pod),
    }
}

fn narrow(value: i128) -> i64 {
    i64::try_from(value).unwrap_or(i64::MAX)
}

/// Thousandths of a processor as shares.
pub(crate) fn shares(milli: i128) -> u64 {
    u64::try_from(milli * 1024 / 1000)
        .unwrap_or(0)
        .clamp(LEAST_SHARES, 262_144)
}

fn quota(milli: i128) -> i64 {
    narrow(milli * i128::from(PERIOD) / 1000).max(LEAST_QUOTA)
}

/// Values of the pod's own cgroup. `pids` is the node's limit for each pod.
pub(crate) fn pod_values(pod: &Pod, kernel: &Kernel, pids: Option<u64>) -> Values {
    let requests = requests(pod);
    let limits = limits(pod);
    let milli = |amounts: &Amounts, name: &str| amounts.get(name).map_or(0, |a| a.milli);
    let tier = qos(pod);
    let limited = |name: &str| tier != Tier::BestEffort && is_limited(pod, name);
    Values {
        cpu_shares: Some(if tier == Tier::BestEffort {
            LEAST_SHARES
        } else {
            shares(milli(&requests, "cpu"))
        }),
        cpu_quota: limited("cpu").then(|| quota(milli(&limits, "cpu"))),
        memory_bytes: limited("memory")
            .then(|| narrow(limits.get("memory").copied().unwrap_or_default().value())),
        pids,
        huge_pages: huge_pages(&requests, kernel),
        die_together: false,
    }
}

/// What the pod as a whole is set up with, as its status shows it: a limit only where one is enforced.
pub(crate) fn effective(pod: &Pod) -> ResourceRequirements {
    let mut requests = requests(pod);
    requests.retain(|name, amount| pod_level(name) && amount.milli > 0);
    let mut limits = limits(pod);
    limits.retain(|name, amount| pod_level(name) && amount.milli > 0 && is_limited(pod, name));
    let list = |amounts: Amounts| (!amounts.is_empty()).then(|| to_list(&amounts));
    ResourceRequirements {
        claims: None,
        limits: list(limits),
        requests: list(requests),
    }
}

/// A limit for every size that the kernel knows: none asked for is none given.
fn huge_pages(amounts: &Amounts, kernel: &Kernel) -> BTreeMap<String, u64> {
    let mut limits: BTreeMap<String, u64> = kernel
        .huge_pages
        .0
        .values()
        .map(|name| (name.clone(), 0))
        .collect();
    for (name, amount) in amounts {
        let size = name
            .strip_prefix("hugepages-")
            .and_then(|size| quantity::value(&Quantity(size.to_owned())));
        if let Some(file) = size
            .and_then(|size| u64::try_from(size).ok())
            .and_then(|size| kernel.huge_pages.0.get(&size))
        {
            *limits.entry(file.clone()).or_default() += u64::try_from(amount.value()).unwrap_or(0);
        }
    }
    limits
}

/// The request of a container, in thousandths.
pub(crate) fn container_request(container: &Container, name: &str) -> Option<i128> {
    amount(
        container.resources.as_ref().and_then(|r| r.requests.as_ref()),
        name,
    )
}

/// The limit of a container, or else the pod's, in thousandths.
pub(crate) fn container_limit(pod: &Pod, container: &Container, name: &str) -> Option<i128> {
    amount(container.resources.as_ref().and_then(|r| r.limits.as_ref()), name)
        .or_else(|| amount(pod_resources(pod).and_then(|r| r.limits.as_ref()), name))
}

/// A container's cgroup values. `memory_capacity` is the node's, in bytes.
pub(crate) fn container_values(
    pod: &Pod,
    container: &Container,
    memory_capacity: i64,
    kernel: &Kernel,
) -> Resources {
    let own = container.resources.as_ref();
    let requests = own.and_then(|r| r.requests.as_ref());
    let cpu_limit = container_limit(pod, container, "cpu");
    let memory_limit = container_limit(pod, container, "memory").map_or(0, |m| narrow((m + 999) / 1000));
    let cpu_request = match requests.and_then(|r| r.get("cpu")) {
        Some(request) => quantity::milli(request).unwrap_or(0),
        None => cpu_limit.unwrap_or(0),
    };
    let mut limits = Amounts::new();
    add(&mut limits, own.and_then(|r| r.limits.as_ref()));
    let mut unified = BTreeMap::new();
    if kernel.v2 {
        unified.insert("memory.oom.group".to_owned(), "1".to_owned());
        if kernel.swap {
            unified.insert("memory.swap.max".to_owned(), "0".to_owned());
        }
    }
    Resources {
        cpu_shares: i64::try_from(shares(cpu_request)).unwrap_or(i64::MAX),
        cpu_quota: cpu_limit.map_or(0, quota),
        cpu_period: if cpu_limit.is_some() { PERIOD } else { 0 },
        memory_limit_bytes: memory_limit,
        oom_score_adj: oom_score_adj(pod, container, memory_capacity),
        memory_swap_bytes: if kernel.swap && !kernel.v2 {
            memory_limit
        } else {
            0
        },
        huge_pages: huge_pages(&limits, kernel),
        unified,
    }
}

/// The pod comes before all others: static, or of one of the system's priorities.
pub(crate) fn is_critical(pod: &Pod) -> bool {
    is_static(pod)
        || pod
            .spec
            .as_ref()
            .and_then(|s| s.priority)
            .is_some_and(|p| p >= CRITICAL_PRIORITY)
}

/// The pod comes from this machine's own files, or is what the API server shows of one.
pub(crate) fn is_static(pod: &Pod) -> bool {
    let annotation = |key: &str| pod.metadata.annotations.as_ref().and_then(|a| a.get(key));
    annotation("kubernetes.io/config.mirror").is_some()
        || annotation("kubernetes.io/config.source").is_some_and(|source| source != "api")
}

fn oom_score_adj(pod: &Pod, container: &Container, memory_capacity: i64) -> i64 {
    let class = pod.spec.as_ref().and_then(|s| s.priority_class_name.as_deref());
    if is_critical(pod) && class == Some("system-node-critical") {
        return PROTECTED;
    }
    match qos(pod) {
        Tier::Guaranteed => return PROTECTED,
        Tier::BestEffort => return EXPENDABLE,
        Tier::Burstable => {}
    }
    let request = |c: &Container| {
        let milli = amount(c.resources.as_ref().and_then(|r| r.requests.as_ref()), "memory");
        milli.map_or(0, |m| (m + 999) / 1000)
    };
    let spare = unallocated_memory(pod);
    let score = |bytes: i128| {
        let share = if memory_capacity > 0 {
            1000 * (bytes + spare) / i128::from(memory_capacity)
        } else {
            0
        };
        1000 - share
    };
    let mut adj = score(request(container));
    if is_sidecar(container) && inits(pod).iter().any(|c| c.name == container.name) {
        // A sidecar is not killed before the containers that it serves.
        let smallest = regulars(pod).iter().map(request).min().unwrap_or(0);
        adj = adj.min(score(smallest));
    }
    narrow(adj).clamp(1000 + PROTECTED, EXPENDABLE - 1)
}

/// What the pod requests beyond its containers, shared equally among them.
fn unallocated_memory(pod: &Pod) -> i128 {
    let whole = amount(pod_resources(pod).and_then(|r| r.requests.as_ref()), "memory");
    let containers = inits(pod).len() + regulars(pod).len();
    let (Some(whole), Ok(containers)) = (whole, i128::try_from(containers)) else {
        return 0;
    };
    let given = aggregate(pod, |r| r.requests.as_ref());
    let given = given.get("memory").map_or(0, |a| a.milli);
    (whole - given) / 1000 / containers.max(1)
}

#[cfg(test)]
#[path = "resources_tests.rs"]
mod tests;
