//! The cluster as a fleet's operator sees it.

use std::collections::HashMap;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use futures::stream::{self, StreamExt};
use k8s_openapi::api::core::v1::{Namespace, Node, Pod};
use kube::api::{Api, DeleteParams, DynamicObject, PostParams};
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::discovery::ApiResource;
use kube::runtime::WatchStreamExt;
use kube::runtime::watcher::{self, Event, watcher};
use kube::{Client, Resource, ResourceExt};
use serde::de::DeserializeOwned;
use serde_json::json;
use tokio::sync::watch;

/// Requests under way at one time.
const PARALLEL: usize = 16;

/// The state of each object, and since when this process has known it.
pub type Seen = HashMap<String, (String, Instant)>;

/// Objects as a watch shows them.
#[derive(Clone)]
pub struct Progress {
    seen: Arc<Mutex<Seen>>,
    moved: watch::Receiver<u64>,
}

impl Progress {
    /// Waits until `done` holds.
    ///
    /// # Panics
    /// When that takes longer than `limit`.
    pub async fn until(&self, limit: Duration, what: &str, done: impl Fn(&Seen) -> bool) {
        let mut moved = self.moved.clone();
        let wait = async {
            while !done(&self.seen.lock().expect("no watch panics")) {
                moved.changed().await.expect("the watch goes on");
            }
        };
        if tokio::time::timeout(limit, wait).await.is_err() {
            let mut states: HashMap<String, usize> = HashMap::new();
            for (state, _) in self.seen().into_values() {
                *states.entry(state).or_default() += 1;
            }
            panic!("not within {limit:?}: {what}; states: {states:?}");
        }
    }

    /// What is known now.
    pub fn seen(&self) -> Seen {
        self.seen.lock().expect("no watch panics").clone()
    }
}

/// A client with the rights of a kubeconfig.
///
/// # Panics
/// When the file is no good.
pub async fn client(kubeconfig: &Path) -> Client {
    let kubeconfig = Kubeconfig::read_from(kubeconfig).expect("the kubeconfig can be read");
    let config = kube::Config::from_custom_kubeconfig(kubeconfig, &KubeConfigOptions::default()).await;
    Client::try_from(config.expect("a complete kubeconfig")).expect("a client")
}

fn sites(client: &Client) -> Api<DynamicObject> {
    Api::all_with(client.clone(), &site_resource())
}

fn site_resource() -> ApiResource {
    ApiResource {
        group: "edge.skerry.dev".to_owned(),
        version: "v1alpha1".to_owned(),
        api_version: "edge.skerry.dev/v1alpha1".to_owned(),
        kind: "Site".to_owned(),
        plural: "sites".to_owned(),
    }
}

/// Declares Sites.
pub(super) async fn declare(client: &Client, names: &[String]) {
    let sites = sites(client);
    stream::iter(names)
        .for_each_concurrent(PARALLEL, |name| {
            let sites = sites.clone();
            async move {
                let site = DynamicObject::new(name, &site_resource());
                sites
                    .create(&PostParams::default(), &site)
                    .await
                    .expect("a Site can be declared");
            }
        })
        .await;
}

/// Makes pods, each bound to its node.
pub(super) async fn create_pods(client: &Client, namespace: &str, places: Vec<(String, String)>) {
    let namespaces: Api<Namespace> = Api::all(client.clone());
    let wanted = serde_json::from_value(json!({"metadata": {"name": namespace}})).expect("a namespace");
    match namespaces.create(&PostParams::default(), &wanted).await {
        Ok(_) => {}
        Err(kube::Error::Api(status)) if status.code == 409 => {}
        Err(error) => panic!("the namespace {namespace} cannot be made: {error}"),
    }
    let pods: Api<Pod> = Api::namespaced(client.clone(), namespace);
    stream::iter(places)
        .for_each_concurrent(PARALLEL, |(name, node)| {
            let pods = pods.clone();
            async move {
                pods.create(&PostParams::default(), &pod(&name, &node))
                    .await
                    .expect("a pod can be made");
            }
        })
        .await;
}

fn pod(name: &str, node: &str) -> Pod {
    serde_json::from_value(json!({
        "metadata": {"name": name},
        "spec": {
            "nodeName": node,
            // No projected token: what is measured is the link, not the API server's signing of tokens.
            "automountServiceAccountToken": false,
            "terminationGracePeriodSeconds": 0,
            "containers": [{"name": "c", "image": "docker.io/library/busybox:1.36", "command": ["sleep", "1000000"]}]}}))
    .expect("a pod")
}

/// Deletes the pods and the Sites, with what belongs to them.
pub(super) async fn remove(client: &Client, namespace: &str, prefix: &str, count: usize, pods: usize) {
    let (all, now) = (sites(client), DeleteParams::default().grace_period(0));
    let of: Api<Pod> = Api::namespaced(client.clone(), namespace);
    stream::iter(0..count)
        .for_each_concurrent(PARALLEL, |number| {
            let (sites, of, now) = (all.clone(), of.clone(), now.clone());
            let site = format!("{prefix}-{number:04}");
            async move {
                for pod in 0..pods {
                    let _ = of.delete(&format!("{site}-{pod}"), &now).await;
                }
                let _ = sites.delete(&site, &DeleteParams::default()).await;
            }
        })
        .await;
}

/// Watches Nodes whose names begin with `prefix`; their state is that of the condition Ready.
pub(super) fn watch_nodes(client: Client, prefix: &str) -> Progress {
    let prefix = prefix.to_owned();
    follow(Api::<Node>::all(client), move |node| {
        let conditions = node.status.as_ref()?.conditions.as_ref()?;
        let ready = conditions.iter().find(|c| c.type_ == "Ready")?;
        node.name_any().starts_with(&prefix).then(|| ready.status.clone())
    })
}

/// Watches pods; their state is the phase.
pub(super) fn watch_pods(client: Client, namespace: &str) -> Progress {
    follow(Api::<Pod>::namespaced(client, namespace), |pod| {
        pod.status.as_ref()?.phase.clone()
    })
}

fn follow<K>(api: Api<K>, state: impl Fn(&K) -> Option<String> + Send + 'static) -> Progress
where
    K: Resource + Clone + DeserializeOwned + std::fmt::Debug + Send + 'static,
{
    let (sender, moved) = watch::channel(0);
    let progress = Progress {
        seen: Arc::default(),
        moved,
    };
    let seen = Arc::clone(&progress.seen);
    tokio::spawn(async move {
        let mut events = std::pin::pin!(watcher(api, watcher::Config::default()).default_backoff());
        while let Some(event) = events.next().await {
            let mut seen = seen.lock().expect("nobody panics");
            match event {
                Ok(Event::Apply(object) | Event::InitApply(object)) => {
                    let Some(state) = state(&object) else { continue };
                    let known = seen.get(&object.name_any()).is_some_and(|(old, _)| *old == state);
                    if !known {
                        seen.insert(object.name_any(), (state, Instant::now()));
                    }
                }
                Ok(Event::Delete(object)) => {
                    seen.remove(&object.name_any());
                }
                Ok(Event::Init | Event::InitDone) | Err(_) => {}
            }
            drop(seen);
            if sender.is_closed() {
                return;
            }
            sender.send_modify(|count| *count += 1);
        }
    });
    progress
}
