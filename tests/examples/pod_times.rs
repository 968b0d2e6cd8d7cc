//! How long pods take on a node: from the request that creates one to the first watch event that says Running, and from
//! the request that deletes it to the event that says it is gone.
//!
//! `pod_times KUBECONFIG NODE single N` takes N pods one after another; `burst N` creates N at once, waits for all, and
//! deletes all at once; `fill N` creates pods until the node has N and leaves them; `clear` deletes what it finds.
//! Prints one line per time: what (`single-start`, `single-delete`, `burst-start`, `burst-delete`), a tab, milliseconds.
//! `hack/bench pods` runs it. Pods are bound to the node by their creator, so that no scheduler is in the times.
#![allow(clippy::expect_used, clippy::panic)]

use std::collections::{HashMap, HashSet};
use std::time::{Duration, Instant};

use futures::stream::{self, StreamExt};
use k8s_openapi::api::core::v1::Pod;
use kube::api::{Api, DeleteParams, ListParams, PostParams, WatchEvent, WatchParams};
use kube::config::{KubeConfigOptions, Kubeconfig};
use serde_json::json;
use tokio::sync::mpsc;

/// The longest that any one step may take.
const LIMIT: Duration = Duration::from_secs(180);
/// Requests of a burst under way at one time.
const PARALLEL: usize = 16;
/// Between two single pods, so that the work which a deletion leaves behind is not in the next one's time.
const CALM: Duration = Duration::from_millis(500);
const LABEL: &str = "skerry-bench";

/// What the watch says of a pod.
enum Seen {
    Running,
    Gone,
}

#[tokio::main(flavor = "current_thread")]
async fn main() {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let (kubeconfig, node, verb) = match &args[..] {
        [kubeconfig, node, verb, ..] => (kubeconfig, node, verb.as_str()),
        _ => panic!("usage: pod_times KUBECONFIG NODE single|burst|fill|clear [N]"),
    };
    let count: usize = args.get(3).map_or(0, |text| text.parse().expect("a number"));
    let mut bench = Bench::start(kubeconfig, node).await;
    match verb {
        "single" => {
            for number in 0..count {
                let name = format!("{node}-single-{number}");
                let start = bench.create(std::slice::from_ref(&name)).await;
                bench.print("single-start", start);
                tokio::time::sleep(CALM).await;
                let delete = bench.delete(&[name]).await;
                bench.print("single-delete", delete);
                tokio::time::sleep(CALM).await;
            }
        }
        "burst" => {
            let names: Vec<_> = (0..count)
                .map(|number| format!("{node}-burst-{number}"))
                .collect();
            let start = bench.create(&names).await;
            bench.print("burst-start", start);
            tokio::time::sleep(4 * CALM).await;
            let delete = bench.delete(&names).await;
            bench.print("burst-delete", delete);
        }
        "fill" => {
            let there: HashSet<_> = bench.names().await.into_iter().collect();
            let names = (0..count).map(|number| format!("{node}-fill-{number}"));
            let names: Vec<_> = names.filter(|name| !there.contains(name)).collect();
            for some in names.chunks(PARALLEL) {
                bench.create(some).await;
            }
        }
        "clear" => {
            let names = bench.names().await;
            bench.delete(&names).await;
        }
        other => panic!("unknown verb {other}"),
    }
}

struct Bench {
    pods: Api<Pod>,
    node: String,
    seen: mpsc::UnboundedReceiver<(Instant, String, Seen)>,
}

impl Bench {
    async fn start(kubeconfig: &str, node: &str) -> Self {
        let kubeconfig = Kubeconfig::read_from(kubeconfig).expect("the kubeconfig can be read");
        let config = kube::Config::from_custom_kubeconfig(kubeconfig, &KubeConfigOptions::default()).await;
        let client = kube::Client::try_from(config.expect("a complete kubeconfig")).expect("a client");
        let pods: Api<Pod> = Api::default_namespaced(client);
        let (sender, seen) = mpsc::unbounded_channel();
        let version = pods.list(&selected(node)).await.expect("pods can be listed");
        let version = version.metadata.resource_version.unwrap_or_default();
        let params = WatchParams::default()
            .labels(&format!("{LABEL}={node}"))
            .timeout(290);
        let watched = pods.clone();
        tokio::spawn(async move {
            let mut version = version;
            loop {
                let events = watched
                    .watch(&params, &version)
                    .await
                    .expect("pods can be watched");
                futures::pin_mut!(events);
                while let Some(Ok(event)) = events.next().await {
                    let now = Instant::now();
                    let (pod, seen) = match event {
                        WatchEvent::Deleted(pod) => (pod, Some(Seen::Gone)),
                        WatchEvent::Added(pod) | WatchEvent::Modified(pod) => {
                            let phase = pod.status.as_ref().and_then(|status| status.phase.as_deref());
                            let running = phase == Some("Running");
                            (pod, running.then_some(Seen::Running))
                        }
                        WatchEvent::Bookmark(_) => continue,
                        WatchEvent::Error(error) => panic!("the watch failed: {error}"),
                    };
                    version = pod.metadata.resource_version.unwrap_or_default();
                    let name = pod.metadata.name.unwrap_or_default();
                    if let Some(seen) = seen
                        && sender.send((now, name, seen)).is_err()
                    {
                        return;
                    }
                }
            }
        });
        Self {
            pods,
            node: node.to_owned(),
            seen,
        }
    }

    async fn names(&self) -> Vec<String> {
        let pods = self
            .pods
            .list(&selected(&self.node))
            .await
            .expect("pods can be listed");
        pods.items
            .into_iter()
            .filter_map(|pod| pod.metadata.name)
            .collect()
    }

    /// Creates pods and waits until all run; the time that each took.
    async fn create(&mut self, names: &[String]) -> Vec<Duration> {
        let begun = stream::iter(names)
            .map(|name| {
                let (pods, pod) = (self.pods.clone(), pod(name, &self.node));
                async move {
                    let begun = Instant::now();
                    pods.create(&PostParams::default(), &pod)
                        .await
                        .expect("a pod can be created");
                    (name.clone(), begun)
                }
            })
            .buffer_unordered(PARALLEL)
            .collect()
            .await;
        self.await_all(begun, |seen| matches!(seen, Seen::Running), "run")
            .await
    }

    /// Deletes pods with their own grace and waits until all are gone; the time that each took.
    async fn delete(&mut self, names: &[String]) -> Vec<Duration> {
        let begun = stream::iter(names)
            .map(|name| {
                let pods = self.pods.clone();
                async move {
                    let begun = Instant::now();
                    pods.delete(name, &DeleteParams::default())
                        .await
                        .expect("a pod can be deleted");
                    (name.clone(), begun)
                }
            })
            .buffer_unordered(PARALLEL)
            .collect()
            .await;
        self.await_all(begun, |seen| matches!(seen, Seen::Gone), "go")
            .await
    }

    async fn await_all(
        &mut self,
        mut begun: HashMap<String, Instant>,
        wanted: impl Fn(&Seen) -> bool,
        what: &str,
    ) -> Vec<Duration> {
        let deadline = tokio::time::Instant::now() + LIMIT;
        let mut took = Vec::with_capacity(begun.len());
        while !begun.is_empty() {
            let next = tokio::time::timeout_at(deadline, self.seen.recv()).await;
            let Ok(Some((at, name, seen))) = next else {
                panic!("these did not {what} in time: {:?}", begun.keys());
            };
            if wanted(&seen)
                && let Some(since) = begun.remove(&name)
            {
                took.push(at.duration_since(since));
            }
        }
        took
    }

    fn print(&self, what: &str, times: Vec<Duration>) {
        for time in times {
            println!("{what}\t{:.1}", time.as_secs_f64() * 1e3);
        }
    }
}

fn selected(node: &str) -> ListParams {
    ListParams::default().labels(&format!("{LABEL}={node}"))
}

fn pod(name: &str, node: &str) -> Pod {
    let script = "trap 'exit 0' TERM; sleep 1000000 & wait";
    serde_json::from_value(json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {"name": name, "labels": {LABEL: node}},
        "spec": {
            "nodeName": node,
            "tolerations": [{"operator": "Exists"}],
            "containers": [{
                "name": "c", "image": "docker.io/library/busybox:1.36", "imagePullPolicy": "IfNotPresent",
                "command": ["sh", "-c", script]}]}}))
    .expect("a pod")
}
