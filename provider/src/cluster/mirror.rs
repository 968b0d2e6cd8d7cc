use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet, VecDeque};
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::time::{Duration, Instant};

use k8s_openapi::api::core::v1::Pod;
use serde_json::Value;
use skerry_proto::SiteName;
use skerry_proto::link::Kind;
use skerry_proto::object::{ObjectKey, Uid};
use tokio::sync::watch;

use super::Object;
use super::index::Index;
use crate::refs::tokens::{TokenOwner, token_uid};
use crate::refs::{KindOrd, PodRefs, TokenNeed};

/// The kinds that are watched, each by its own informer.
pub(super) const KINDS: [Kind; 10] = [
    Kind::Pod,
    Kind::ConfigMap,
    Kind::Secret,
    Kind::Service,
    Kind::Node,
    Kind::Site,
    Kind::Device,
    Kind::RuntimeClass,
    Kind::PersistentVolumeClaim,
    Kind::PersistentVolume,
];

/// How long and of how many pods it is remembered whose they were: what a site says of them comes late, later still over
/// a line that was cut.
const DEPARTED_FOR: Duration = Duration::from_secs(3_600);
const MOST_DEPARTED: usize = 20_000;

/// Everything that one site should hold now.
#[derive(Default)]
pub struct Desired {
    /// Objects by key.
    pub objects: BTreeMap<ObjectKey, Arc<Object>>,
    /// Tokens by the key under which they travel.
    pub tokens: BTreeMap<ObjectKey, DesiredToken>,
}

/// A token that a pod of the site projects.
#[derive(Clone)]
pub struct DesiredToken {
    /// The pod that it is bound to.
    pub owner: TokenOwner,
    /// What the volume asks for.
    pub need: TokenNeed,
    /// The pod is under deletion: the API server issues no more tokens for it, but the one it has stays.
    pub leaving: bool,
}

/// See the module's documentation.
pub struct Mirror {
    state: RwLock<State>,
    sites: Mutex<HashMap<SiteName, watch::Sender<u64>>>,
    unsynced: watch::Sender<usize>,
}

#[derive(Default)]
struct State {
    tables: HashMap<Kind, Table>,
    /// What each bound pod refers to.
    pods: HashMap<Uid, BoundPod>,
    pods_by_site: Index<SiteName>,
    pods_by_namespace: Index<String>,
    /// Pods by what they refer to: kind, namespace, name.
    users: Index<(KindOrd, String, String)>,
    services_by_namespace: Index<String>,
    devices_by_node: Index<String>,
    /// Whose the pods were that went a short while ago.
    departed: Departed,
    synced: HashSet<Kind>,
}

#[derive(Default)]
struct Table {
    by_uid: HashMap<Uid, Arc<Object>>,
    by_name: HashMap<(String, String), Uid>,
}

struct BoundPod {
    site: SiteName,
    namespace: String,
    refs: PodRefs,
}

impl Default for Mirror {
    fn default() -> Self {
        Self::new()
    }
}

impl Mirror {
    /// An empty picture, not synced.
    pub fn new() -> Self {
        Self {
            state: RwLock::default(),
            sites: Mutex::default(),
            unsynced: watch::Sender::new(KINDS.len()),
        }
    }

    /// Waits until every informer has listed its kind once.
    pub async fn synced(&self) {
        // The sender lives as long as `self`, so waiting cannot fail.
        let _ = self.unsynced.subscribe().wait_for(|left| *left == 0).await;
    }

    /// Whether every informer has listed its kind once.
    pub fn is_synced(&self) -> bool {
        *self.unsynced.borrow() == 0
    }

    /// A counter that moves whenever the site's set may have changed.
    pub fn changes(&self, site: &SiteName) -> watch::Receiver<u64> {
        let mut sites = self.sites.lock().unwrap_or_else(PoisonError::into_inner);
        sites
            .entry(site.clone())
            .or_insert_with(|| watch::Sender::new(0))
            .subscribe()
    }

    /// Everything that the site should hold now.
    pub fn desired(&self, site: &SiteName) -> Desired {
        let state = self.read();
        let mut desired = Desired::default();
        let mut namespaces = BTreeSet::new();
        for uid in state.pods_by_site.of(site) {
            let (Some(object), Some(pod)) = (state.object(Kind::Pod, uid), state.pods.get(uid)) else {
                continue;
            };
            desired.add(object);
            namespaces.insert(pod.namespace.as_str());
            for (kind, name) in &pod.refs.objects {
                if let Some(object) = state.named((*kind).into(), &pod.namespace, name) {
                    desired.add(object);
                    if *kind == KindOrd::PersistentVolumeClaim
                        && let Some(volume) = object.value["spec"]["volumeName"].as_str()
                        && let Some(volume) = state.named(Kind::PersistentVolume, "", volume)
                    {
                        desired.add(volume);
                    }
                }
            }
            if let Some(class) = &pod.refs.runtime_class
                && let Some(object) = state.named(Kind::RuntimeClass, "", class)
            {
                desired.add(object);
            }
            let leaving = object.value["metadata"].get("deletionTimestamp").is_some();
            for need in &pod.refs.tokens {
                let owner = TokenOwner {
                    namespace: pod.namespace.clone(),
                    pod: object.name.clone(),
                    uid: uid.clone(),
                    service_account: pod.refs.service_account.clone(),
                };
                let key = ObjectKey {
                    kind: Kind::ServiceAccountToken,
                    uid: token_uid(uid, need),
                };
                desired.tokens.insert(
                    key,
                    DesiredToken {
                        owner,
                        need: need.clone(),
                        leaving,
                    },
                );
            }
        }
        if !namespaces.is_empty()
            && let Some(everywhere) = state.named(Kind::Service, "default", "kubernetes")
        {
            desired.add(everywhere);
        }
        for uid in namespaces
            .iter()
            .flat_map(|namespace| state.services_by_namespace.of(*namespace))
        {
            if let Some(service) = state.object(Kind::Service, uid) {
                desired.add(service);
            }
        }
        for kind in [Kind::Node, Kind::Site] {
            if let Some(object) = state.named(kind, "", site.as_str()) {
                desired.add(object);
            }
        }
        for device in state.devices_of(site) {
            desired.add(device);
        }
        desired
    }

    /// The devices bound to a site.
    pub fn devices_of(&self, site: &SiteName) -> Vec<Arc<Object>> {
        self.read().devices_of(site).cloned().collect()
    }

    /// A watched object by name; `namespace` is empty for cluster-scoped kinds.
    pub fn named(&self, kind: Kind, namespace: &str, name: &str) -> Option<Arc<Object>> {
        self.read().named(kind, namespace, name).cloned()
    }

    /// A watched object by UID.
    pub fn object(&self, key: &ObjectKey) -> Option<Arc<Object>> {
        self.read().object(key.kind, &key.uid).cloned()
    }

    /// All objects of a kind.
    pub fn all(&self, kind: Kind) -> Vec<Arc<Object>> {
        self.read()
            .tables
            .get(&kind)
            .map(|t| t.by_uid.values().cloned().collect())
            .unwrap_or_default()
    }

    /// A bound pod by name, with its site.
    pub fn locate(&self, namespace: &str, name: &str) -> Option<(SiteName, Arc<Object>)> {
        let state = self.read();
        let object = state.named(Kind::Pod, namespace, name)?;
        let pod = state.pods.get(&object.key.uid)?;
        Some((pod.site.clone(), Arc::clone(object)))
    }

    /// The site that a pod was bound to which went a short while ago.
    pub fn departed_from(&self, uid: &Uid) -> Option<SiteName> {
        self.read().departed.sites.get(uid).cloned()
    }

    /// The pods bound to a site.
    pub fn pods_of(&self, site: &SiteName) -> Vec<Arc<Object>> {
        let state = self.read();
        state
            .pods_by_site
            .of(site)
            .filter_map(|uid| state.object(Kind::Pod, uid).cloned())
            .collect()
    }

    /// Takes a new or changed object from its informer.
    pub(crate) fn apply(&self, kind: Kind, value: Value) {
        let Some(object) = Object::new(kind, value) else {
            return;
        };
        let mut dirty = BTreeSet::new();
        {
            let mut state = self.write();
            let known = state.object(kind, &object.key.uid);
            // An echo of what the site has reported: the newest object is kept, but nobody need look.
            let echo = known.is_some_and(|known| {
                known.hash == object.hash && device_site(&known.value) == device_site(&object.value)
            });
            if kind == Kind::Pod && !echo {
                state.bind(&object, &mut dirty);
            }
            let newer = Arc::new(object);
            let table = state.tables.entry(kind).or_default();
            let place = (newer.namespace.clone(), newer.name.clone());
            table.by_name.insert(place, newer.key.uid.clone());
            let older = table.by_uid.insert(newer.key.uid.clone(), Arc::clone(&newer));
            if !echo {
                if let Some(older) = &older {
                    state.forget(older);
                    state.affected(older, &mut dirty);
                }
                state.enter(&newer);
                state.affected(&newer, &mut dirty);
            }
        }
        self.fire(&dirty);
    }

    /// Takes a deletion from the informer.
    pub(crate) fn delete(&self, kind: Kind, uid: &Uid) {
        let mut dirty = BTreeSet::new();
        {
            let mut state = self.write();
            let Some(object) = state.tables.get_mut(&kind).and_then(|t| t.remove(uid)) else {
                return;
            };
            if kind == Kind::Pod {
                if let Some(pod) = state.pods.get(uid) {
                    let site = pod.site.clone();
                    state.departed.note(uid, site, Instant::now());
                }
                state.unbind(uid, &mut dirty);
            }
            state.forget(&object);
            state.affected(&object, &mut dirty);
        }
        self.fire(&dirty);
    }

    /// A listing is complete: whatever it did not name is gone.
    pub(super) fn listed(&self, kind: Kind, seen: &HashSet<Uid>) {
        let stale: Vec<Uid> = self
            .read()
            .tables
            .get(&kind)
            .map(|t| {
                t.by_uid
                    .keys()
                    .filter(|uid| !seen.contains(*uid))
                    .cloned()
                    .collect()
            })
            .unwrap_or_default();
        for uid in &stale {
            self.delete(kind, uid);
        }
        let mut state = self.write();
        if state.synced.insert(kind) {
            let left = KINDS.len() - state.synced.len();
            self.unsynced.send_replace(left);
        }
    }

    fn fire(&self, dirty: &BTreeSet<SiteName>) {
        let sites = self.sites.lock().unwrap_or_else(PoisonError::into_inner);
        for site in dirty {
            if let Some(counter) = sites.get(site) {
                counter.send_modify(|count| *count += 1);
            }
        }
    }

    fn read(&self) -> std::sync::RwLockReadGuard<'_, State> {
        self.state.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> std::sync::RwLockWriteGuard<'_, State> {
        self.state.write().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Desired {
    fn add(&mut self, object: &Arc<Object>) {
        self.objects.insert(object.key.clone(), Arc::clone(object));
    }
}

/// Pods that went, until their last words have come.
#[derive(Default)]
struct Departed {
    sites: HashMap<Uid, SiteName>,
    order: VecDeque<(Instant, Uid)>,
}

impl Departed {
    fn note(&mut self, uid: &Uid, site: SiteName, now: Instant) {
        self.sites.insert(uid.clone(), site);
        self.order.push_back((now, uid.clone()));
        while let Some((gone, uid)) = self.order.front() {
            if self.order.len() <= MOST_DEPARTED && now.duration_since(*gone) < DEPARTED_FOR {
                break;
            }
            self.sites.remove(uid);
            self.order.pop_front();
        }
    }
}

impl Table {
    fn remove(&mut self, uid: &Uid) -> Option<Arc<Object>> {
        let object = self.by_uid.remove(uid)?;
        let place = (object.namespace.clone(), object.name.clone());
        // The name may already belong to a successor.
        if self.by_name.get(&place) == Some(uid) {
            self.by_name.remove(&place);
        }
        Some(object)
    }
}

impl State {
    fn object(&self, kind: Kind, uid: &Uid) -> Option<&Arc<Object>> {
        self.tables.get(&kind)?.by_uid.get(uid)
    }

    fn named(&self, kind: Kind, namespace: &str, name: &str) -> Option<&Arc<Object>> {
        let table = self.tables.get(&kind)?;
        table
            .by_uid
            .get(table.by_name.get(&(namespace.to_owned(), name.to_owned()))?)
    }

    fn bind(&mut self, object: &Object, dirty: &mut BTreeSet<SiteName>) {
        let uid = &object.key.uid;
        let site = object.value["spec"]["nodeName"]
            .as_str()
            .and_then(|name| name.parse::<SiteName>().ok());
        // A node whose name cannot be a site's is none of ours.
        let Some(site) = site else {
            return self.unbind(uid, dirty);
        };
        match serde_json::from_value::<Pod>(object.value.clone()) {
            Ok(pod) => {
                let refs = PodRefs::of(&pod);
                let namespace = object.namespace.clone();
                // What it referred to before may differ.
                self.unbind(uid, dirty);
                self.pods_by_site.insert(site.clone(), uid);
                self.pods_by_namespace.insert(namespace.clone(), uid);
                for (kind, name) in &refs.objects {
                    self.users.insert((*kind, namespace.clone(), name.clone()), uid);
                }
                dirty.insert(site.clone());
                self.pods.insert(
                    uid.clone(),
                    BoundPod {
                        site,
                        namespace,
                        refs,
                    },
                );
            }
            Err(error) => {
                tracing::error!(pod = %object.name, namespace = %object.namespace, %error, "a pod cannot be read");
            }
        }
    }

    fn unbind(&mut self, uid: &Uid, dirty: &mut BTreeSet<SiteName>) {
        let Some(pod) = self.pods.remove(uid) else { return };
        self.pods_by_site.remove(&pod.site, uid);
        self.pods_by_namespace.remove(&pod.namespace, uid);
        for (kind, name) in pod.refs.objects {
            self.users.remove(&(kind, pod.namespace.clone(), name), uid);
        }
        dirty.insert(pod.site);
    }

    /// Enters an object where sites look for it.
    fn enter(&mut self, object: &Object) {
        let uid = &object.key.uid;
        match object.key.kind {
            Kind::Service => self.services_by_namespace.insert(object.namespace.clone(), uid),
            Kind::Device => {
                if let Some(node) = device_site(&object.value) {
                    self.devices_by_node.insert(node.to_owned(), uid);
                }
            }
            _ => {}
        }
    }

    /// Undoes [`State::enter`].
    fn forget(&mut self, object: &Object) {
        let uid = &object.key.uid;
        match object.key.kind {
            Kind::Service => self.services_by_namespace.remove(&object.namespace, uid),
            Kind::Device => {
                if let Some(node) = device_site(&object.value) {
                    self.devices_by_node.remove(&node.to_owned(), uid);
                }
            }
            _ => {}
        }
    }

    fn devices_of(&self, site: &SiteName) -> impl Iterator<Item = &Arc<Object>> {
        self.devices_by_node
            .of(site.as_str())
            .filter_map(|uid| self.object(Kind::Device, uid))
    }

    /// The sites of the pods that refer to an object.
    fn sites_of_users(&self, kind: KindOrd, namespace: &str, name: &str, dirty: &mut BTreeSet<SiteName>) {
        let key = (kind, namespace.to_owned(), name.to_owned());
        let users = self.users.of(&key);
        dirty.extend(users.filter_map(|uid| Some(self.pods.get(uid)?.site.clone())));
    }

    /// The sites whose set a change of this object may touch.
    fn affected(&self, object: &Object, dirty: &mut BTreeSet<SiteName>) {
        match object.key.kind {
            Kind::RuntimeClass => {
                let users = self
                    .pods
                    .values()
                    .filter(|p| p.refs.runtime_class.as_ref() == Some(&object.name));
                dirty.extend(users.map(|p| p.site.clone()));
            }
            Kind::PersistentVolume => {
                let claim = &object.value["spec"]["claimRef"];
                let (Some(namespace), Some(name)) = (claim["namespace"].as_str(), claim["name"].as_str())
                else {
                    return;
                };
                self.sites_of_users(KindOrd::PersistentVolumeClaim, namespace, name, dirty);
            }
            Kind::ConfigMap => {
                self.sites_of_users(KindOrd::ConfigMap, &object.namespace, &object.name, dirty);
            }
            Kind::Secret => {
                self.sites_of_users(KindOrd::Secret, &object.namespace, &object.name, dirty);
            }
            Kind::PersistentVolumeClaim => {
                let kind = KindOrd::PersistentVolumeClaim;
                self.sites_of_users(kind, &object.namespace, &object.name, dirty);
            }
            Kind::Service if object.namespace == "default" && object.name == "kubernetes" => {
                dirty.extend(self.pods.values().map(|p| p.site.clone()));
            }
            Kind::Service => {
                let users = self.pods_by_namespace.of(&object.namespace);
                dirty.extend(users.filter_map(|uid| Some(self.pods.get(uid)?.site.clone())));
            }
            Kind::Node | Kind::Site => dirty.extend(object.name.parse::<SiteName>().ok()),
            Kind::Device => {
                dirty.extend(device_site(&object.value).and_then(|name| name.parse::<SiteName>().ok()))
            }
            _ => {}
        }
    }
}

/// The node that the device controller has bound a device to; of any other object nothing.
fn device_site(device: &Value) -> Option<&str> {
    device["status"]["nodeName"]
        .as_str()
        .filter(|name| !name.is_empty())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn site(name: &str) -> SiteName {
        name.parse().unwrap()
    }

    fn pod(uid: &str, namespace: &str, node: &str, config: &str) -> Value {
        json!({"metadata": {"uid": uid, "name": uid, "namespace": namespace}, "spec": {
            "nodeName": node, "containers": [],
            "volumes": [{"name": "v", "configMap": {"name": config}}]}})
    }

    fn named(uid: &str, namespace: &str, more: Value) -> Value {
        let mut value = json!({"metadata": {"uid": uid, "name": uid, "namespace": namespace}});
        value
            .as_object_mut()
            .unwrap()
            .extend(more.as_object().unwrap().clone());
        value
    }

    fn uids(mirror: &Mirror, name: &str) -> Vec<String> {
        mirror
            .desired(&site(name))
            .objects
            .keys()
            .map(|key| key.uid.to_string())
            .collect()
    }

    #[test]
    fn a_site_holds_its_pods_what_they_refer_to_its_services_and_its_devices_and_nothing_of_others() {
        let mirror = Mirror::new();
        mirror.apply(Kind::Pod, pod("a", "one", "harbour", "settings"));
        mirror.apply(Kind::Pod, pod("b", "two", "mast", "settings"));
        for namespace in ["one", "two"] {
            let config = json!({"metadata": {"uid": format!("c-{namespace}"), "name": "settings", "namespace": namespace}});
            mirror.apply(Kind::ConfigMap, config);
            mirror.apply(
                Kind::Service,
                named(&format!("s-{namespace}"), namespace, json!({})),
            );
        }
        mirror.apply(
            Kind::Device,
            named("d", "one", json!({"status": {"nodeName": "harbour"}})),
        );
        assert_eq!(uids(&mirror, "harbour"), ["a", "c-one", "s-one", "d"]);
        assert_eq!(uids(&mirror, "mast"), ["b", "c-two", "s-two"]);
        mirror.delete(Kind::Pod, &Uid::from("a"));
        assert_eq!(uids(&mirror, "harbour"), ["d"]);
    }

    #[test]
    fn only_sites_that_a_change_concerns_look_again() {
        let mirror = Mirror::new();
        mirror.apply(Kind::Pod, pod("a", "one", "harbour", "settings"));
        mirror.apply(Kind::Pod, pod("b", "one", "mast", "other"));
        let (mut harbour, mut mast) = (mirror.changes(&site("harbour")), mirror.changes(&site("mast")));
        let mut moved = || {
            let both = (harbour.has_changed().unwrap(), mast.has_changed().unwrap());
            harbour.mark_unchanged();
            mast.mark_unchanged();
            both
        };
        assert_eq!(moved(), (false, false));
        mirror.apply(
            Kind::ConfigMap,
            named("settings", "one", json!({"data": {"k": "v"}})),
        );
        assert_eq!(moved(), (true, false));
        mirror.apply(Kind::Service, named("s", "one", json!({})));
        assert_eq!(moved(), (true, true));
        // The pod refers to something else now.
        mirror.apply(Kind::Pod, pod("a", "one", "harbour", "newer"));
        assert_eq!(moved(), (true, false));
        mirror.apply(
            Kind::ConfigMap,
            named("settings", "one", json!({"data": {"k": "w"}})),
        );
        assert_eq!(moved(), (false, false));
    }

    #[test]
    fn of_a_pod_that_went_it_is_remembered_for_a_while_whose_it_was() {
        let mirror = Mirror::new();
        mirror.apply(Kind::Pod, pod("a", "one", "harbour", "settings"));
        assert_eq!(mirror.departed_from(&Uid::from("a")), None);
        mirror.delete(Kind::Pod, &Uid::from("a"));
        assert_eq!(mirror.departed_from(&Uid::from("a")), Some(site("harbour")));
        let mut departed = Departed::default();
        let now = Instant::now();
        departed.note(&Uid::from("a"), site("harbour"), now);
        departed.note(&Uid::from("b"), site("harbour"), now + DEPARTED_FOR);
        assert!(!departed.sites.contains_key(&Uid::from("a")));
        for number in 0..=MOST_DEPARTED {
            departed.note(&Uid::from(number.to_string()), site("harbour"), now);
        }
        assert_eq!(
            (departed.sites.len(), departed.order.len()),
            (MOST_DEPARTED, MOST_DEPARTED)
        );
    }

    #[test]
    fn a_device_that_is_bound_to_another_site_concerns_both() {
        let mirror = Mirror::new();
        let bound = |node: &str| named("d", "one", json!({"status": {"nodeName": node}}));
        mirror.apply(Kind::Device, bound("harbour"));
        let (harbour, mast) = (mirror.changes(&site("harbour")), mirror.changes(&site("mast")));
        mirror.apply(Kind::Device, bound("mast"));
        assert!(harbour.has_changed().unwrap() && mast.has_changed().unwrap());
        assert_eq!(uids(&mirror, "mast"), ["d"]);
        assert!(uids(&mirror, "harbour").is_empty());
    }
}
