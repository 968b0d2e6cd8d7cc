//! A fleet: many sites in one process, to see what thousands of them do to one provider.
//!
//! Each site runs the edge's own link, store and identity code, enrolled with a token of its own and with a store of its
//! own; there are no containers. What the daemon's other rooms would say is said here: a Node's status, and of each pod
//! that it runs. The provider, the API server and etcd are real.
//!
//! The line of all sites is cut at once ([`Fleet::cut`]): every connection is closed under the link's feet, and dialling
//! fails until [`Fleet::restore`].

mod api;
pub mod figures;
mod line;
mod site;

use std::fmt::Write as _;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::Stdio;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures::stream::{self, StreamExt};
use skerry_edge::identity::{JoinOptions, join};
use tokio::io::AsyncWriteExt;

use line::Line;
use site::{Common, FleetSite};

pub use api::{Progress, Seen, client};

/// Joins under way at one time: as many as the provider looks at together.
const JOINS: usize = 16;

/// What a fleet is made of.
#[derive(Clone, Debug)]
pub struct Plan {
    /// How many sites.
    pub sites: usize,
    /// How many pods each has.
    pub pods: usize,
    /// Namespace of the pods.
    pub namespace: String,
    /// The sites' names begin with it.
    pub prefix: String,
    /// Where each site has a directory. On tmpfs, the machine's disk is not part of what is measured.
    pub dir: PathBuf,
    /// Where the provider accepts sites.
    pub link: SocketAddr,
    /// Kubeconfig of an administrator.
    pub admin: PathBuf,
    /// Kubeconfig of the provider, for its tokens.
    pub provider: PathBuf,
    /// The provider's program, for its tokens.
    pub program: PathBuf,
}

/// An enrolled fleet. Dropping it ends its sites; their objects in the cluster stay.
pub struct Fleet {
    plan: Plan,
    client: kube::Client,
    common: Arc<Common>,
    sites: Vec<FleetSite>,
    nodes: Progress,
    pods: Progress,
}

impl Fleet {
    /// Declares the sites, makes their tokens, and lets them join. None of them connects yet.
    ///
    /// # Panics
    /// When any of that fails.
    pub async fn enrol(plan: Plan) -> Self {
        let client = api::client(&plan.admin).await;
        std::fs::create_dir_all(&plan.dir).expect("the fleet's directory can be made");
        let names: Vec<String> = (0..plan.sites)
            .map(|n| format!("{}-{n:04}", plan.prefix))
            .collect();
        api::declare(&client, &names).await;
        let tokens = tokens(&plan, &names).await;
        stream::iter(tokens)
            .for_each_concurrent(JOINS, |(name, token)| {
                let options = JoinOptions {
                    provider: plan.link.to_string(),
                    token,
                    data_dir: plan.dir.join(&name),
                    force: false,
                    proxies: Default::default(),
                    waits: |_, _| {},
                };
                async move {
                    join(&options)
                        .await
                        .unwrap_or_else(|e| panic!("{name} does not join: {e}"));
                }
            })
            .await;
        let nodes = api::watch_nodes(client.clone(), &plan.prefix);
        let pods = api::watch_pods(client.clone(), &plan.namespace);
        Self {
            common: Common::new(Line::to(plan.link), &plan.dir),
            plan,
            client,
            sites: Vec::new(),
            nodes,
            pods,
        }
    }

    /// Starts the sites, which connect, and waits until every Node is Ready.
    ///
    /// # Panics
    /// When that takes longer than `limit`.
    pub async fn start(&mut self, limit: Duration) {
        for number in 0..self.plan.sites {
            let name = format!("{}-{number:04}", self.plan.prefix);
            let site = FleetSite::start(&self.plan.dir.join(name), self.plan.link, &self.common).await;
            self.sites.push(site);
        }
        self.ready(limit).await;
    }

    /// Gives every site its pods, bound to it, and waits until all run.
    ///
    /// # Panics
    /// When that takes longer than `limit`.
    pub async fn fill(&self, limit: Duration) {
        let (per_site, prefix) = (self.plan.pods, &self.plan.prefix);
        let places = (0..self.plan.sites).flat_map(|site| {
            (0..per_site).map(move |pod| {
                let node = format!("{prefix}-{site:04}");
                (format!("{node}-{pod}"), node)
            })
        });
        api::create_pods(&self.client, &self.plan.namespace, places.collect()).await;
        let wanted = self.plan.sites * per_site;
        self.pods
            .until(limit, "every pod runs", |seen| count(seen, "Running") == wanted)
            .await;
    }

    /// Closes every connection; new ones fail until [`Fleet::restore`].
    pub fn cut(&self) -> usize {
        self.common.line.cut()
    }

    /// Lets sites connect again. They do so when their pause is over, as after any outage.
    pub fn restore(&self) {
        self.common.line.restore();
    }

    /// Waits until every Node is Ready.
    ///
    /// # Panics
    /// When that takes longer than `limit`.
    pub async fn ready(&self, limit: Duration) {
        let wanted = self.plan.sites;
        self.nodes
            .until(limit, "every Node is Ready", |seen| count(seen, "True") == wanted)
            .await;
    }

    /// Waits until no Node is Ready.
    ///
    /// # Panics
    /// When that takes longer than `limit`.
    pub async fn away(&self, limit: Duration) {
        self.nodes
            .until(limit, "no Node is Ready", |seen| count(seen, "True") == 0)
            .await;
    }

    /// Waits until every site holds all that the provider has for it and has told all that it had to tell.
    ///
    /// # Panics
    /// When that takes longer than `limit`.
    pub async fn quiet(&self, limit: Duration) {
        let end = Instant::now() + limit;
        for site in &self.sites {
            while !site.is_quiet() {
                assert!(
                    Instant::now() < end,
                    "site {} is not quiet within {limit:?}",
                    site.name()
                );
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        }
    }

    /// Sites whose link is up.
    pub fn online(&self) -> usize {
        self.sites.iter().filter(|site| site.is_online()).count()
    }

    /// When each Node took the state that it has, with that state.
    pub fn nodes(&self) -> Seen {
        self.nodes.seen()
    }

    /// Why links went down last, and how many of them.
    pub fn complaints(&self) -> Vec<(usize, String)> {
        let mut all = std::collections::BTreeMap::new();
        for site in &self.sites {
            *all.entry(site.last_error()).or_insert(0) += 1;
        }
        let mut all: Vec<_> = all.into_iter().map(|(why, count)| (count, why)).collect();
        all.sort_unstable_by(|a, b| b.cmp(a));
        all
    }

    /// Deletes the Sites and the pods.
    pub async fn remove(self) {
        for site in &self.sites {
            site.stop();
        }
        api::remove(
            &self.client,
            &self.plan.namespace,
            &self.plan.prefix,
            self.plan.sites,
            self.plan.pods,
        )
        .await;
    }
}

fn count(seen: &Seen, state: &str) -> usize {
    seen.values().filter(|(found, _)| found == state).count()
}

/// Tokens as an operator makes them: all with one command.
async fn tokens(plan: &Plan, names: &[String]) -> Vec<(String, String)> {
    let mut child = tokio::process::Command::new(&plan.program)
        .args(["token", "create", "--file", "-", "--kubeconfig"])
        .arg(&plan.provider)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("skerry-provider runs");
    let list = names.iter().fold(String::new(), |mut text, name| {
        let _ = writeln!(text, "{name}");
        text
    });
    let mut input = child.stdin.take().expect("its input is a pipe");
    let feed = async move { input.write_all(list.as_bytes()).await };
    let (fed, out) = tokio::join!(feed, child.wait_with_output());
    fed.expect("skerry-provider reads the names");
    let out = out.expect("skerry-provider ends");
    assert!(out.status.success(), "token create: {}", out.status);
    let printed = String::from_utf8(out.stdout).expect("tokens are text");
    let pair = |line: &str| {
        let (name, token) = line.split_once(' ').expect("a name and a token");
        (name.to_owned(), token.to_owned())
    };
    printed.lines().map(pair).collect()
}
