//! Wires the rooms of the edge daemon together and runs them.

use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::sync::{Arc, Mutex, PoisonError};

use k8s_openapi::api::core::v1::{Pod, PodStatus};
use prometheus_client::registry::Registry;
use skerry_proto::SiteName;
use skerry_proto::device::Defaults;
use skerry_proto::link::Kind;
use skerry_proto::object::Uid;
use skerry_telemetry::http::{Endpoints, ListenError};
use tokio::sync::{Notify, watch};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use crate::autonomy;
use crate::clock::{Clock, HouseClock, SystemClock};
use crate::config::{Config, ConfigError, RuntimeKind};
use crate::devices::{self, Devices};
use crate::eviction::{self, Pressure};
use crate::identity::{Dialer, Identity, IdentityError, Renewer, TrustedTime};
use crate::images;
use crate::inspect::{ConfigFacts, Inspect, kubelet_configuration};
use crate::link::{Deferring, Dial, Gate, Greeting, Link, boot_id};
use crate::local::{self, Local};
use crate::manifests::{self, Manifests};
use crate::metrics::Metrics;
use crate::node::{self, NodeConfig};
use crate::pods::{self, Level, NodeEvents, Pods, PodsConfig};
use crate::resident;
use crate::rotation;
use crate::runtime::cri::CriRuntime;
use crate::runtime::process::ProcessRuntime;
use crate::runtime::{Runtime, RuntimeError};
use crate::shutdown;
use crate::stats::{Stats, StatsConfig};
use crate::store::{OpenError, Options as StoreOptions, Store, StoreError};
use crate::streams::{PodLookup, Streams};

/// Why the daemon could not start or go on.
#[derive(Debug, thiserror::Error)]
pub enum DaemonError {
    /// A setting is wrong. Exit code 2.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The site has no usable identity. Exit code 2 or 4.
    #[error(transparent)]
    Identity(#[from] IdentityError),
    /// The store cannot be opened. Exit code 4.
    #[error(transparent)]
    Store(#[from] OpenError),
    /// The store cannot be read.
    #[error(transparent)]
    Read(#[from] StoreError),
    /// The runtime cannot be prepared.
    #[error("the runtime cannot be used: {0}")]
    Runtime(#[from] RuntimeError),
    /// The metrics port is taken.
    #[error(transparent)]
    Metrics(#[from] ListenError),
    /// The program's own path is unknown, so it cannot re-execute itself for containers.
    #[error("the daemon's own program file cannot be found: {0}")]
    Program(std::io::Error),
}

/// Runs the site until `stop`. Containers go on running afterwards.
pub async fn run(config: Config, stop: CancellationToken) -> Result<(), DaemonError> {
    let identity = Identity::load(&config.data_dir)?;
    let site = identity.site.clone();
    let provider = config
        .provider
        .clone()
        .unwrap_or_else(|| identity.provider.clone());
    let store = Store::open_with(
        &config.data_dir,
        StoreOptions {
            retention: config.retention,
            ..StoreOptions::default()
        },
    )?;
    let metrics = Arc::new(Metrics::new(&site));
    let kubelet_registry = Arc::new(Mutex::new(Registry::default()));
    let runtime = runtime(&config, site.as_str(), &kubelet_registry)?;
    tracing::info!(%site, %provider, runtime = runtime.scheme(), data_dir = %config.data_dir.display(), "the site is starting");

    let time = Arc::new(TrustedTime::stored(&store, &identity, Arc::new(SystemClock))?);
    let clock = HouseClock::stored(&store, &boot_id(), Arc::new(SystemClock), Arc::clone(&time))?;
    let clock: Arc<dyn Clock> = Arc::new(clock);
    let urge = Arc::new(Notify::new());
    let (identity_sender, identity) = watch::channel(Arc::new(identity));
    let dialer = Dialer::new(&provider, identity.clone())
        .map_err(ConfigError::Value)?
        .through(config.proxies.clone())
        .telling(Arc::clone(&time), Arc::clone(&urge));
    let dial: Arc<dyn Dial> = Arc::new(dialer);
    let pods = Pods::new(
        PodsConfig {
            node_name: site.to_string(),
            node_ip: config.node_ip.or_else(|| route_address(&provider)),
            root_dir: config.root_dir.clone(),
            pod_log_dir: config.pod_log_dir.clone(),
            cluster_dns: config.cluster_dns.clone(),
            cluster_domain: config.cluster_domain.clone(),
            shares: config.shares.with_eviction(&config.duties.eviction.thresholds),
            cgroups: true,
            pod_pids_limit: config.pod_pids_limit,
            data_dir: config.data_dir.clone(),
            dead: config.duties.dead,
            seccomp_dir: config.duties.seccomp_dir.clone(),
            seccomp_default: config.duties.seccomp_default,
            parallel_pulls: config.duties.parallel_pulls,
            ..PodsConfig::default()
        },
        store.clone(),
        Arc::clone(&runtime),
        Arc::clone(&clock),
    );
    let stats = Stats::new(
        StatsConfig {
            node_name: site.to_string(),
            root_dir: config.root_dir.clone(),
            pod_log_dir: config.pod_log_dir.clone(),
            fallback_machine_id: store.id().to_owned(),
        },
        Arc::clone(&runtime),
    );
    {
        let mut registry = kubelet_registry.lock().unwrap_or_else(PoisonError::into_inner);
        pods.starts().register(&mut registry);
        pods.terminations().register(&mut registry);
    }
    let inspect = Inspect {
        node_name: site.to_string(),
        stats: stats.clone(),
        runtime: Arc::clone(&runtime),
        pods: pods.summary(),
        registry: kubelet_registry,
        probes: pods.probes(),
        config: kubelet_configuration(&config_facts(&config)),
    };
    let lookup: Arc<dyn PodLookup> = Arc::new(Lookup(store.clone(), pods.clone()));
    let streams = Streams::new(
        Arc::clone(&runtime),
        Arc::clone(&lookup),
        config.pod_log_dir.clone(),
    );
    let streams = Arc::new(streams.answering(Arc::new(inspect)));
    let greeted = site.clone();
    let greeting = Greeting {
        site: site.clone(),
        boot_id: boot_id(),
        version: env!("CARGO_PKG_VERSION").to_owned(),
        incarnation: store.begin_life()?,
        instance: uuid::Uuid::new_v4().to_string(),
    };
    let link = Link::new(
        store.clone(),
        streams,
        Arc::clone(&dial),
        greeting,
        Arc::clone(&metrics),
    );
    let link = Arc::new(link.with_bulk(config.bulk.clone()));
    let endpoints = endpoints(&metrics, &pods, &store, &identity, &time);
    let (address, metrics_task) =
        skerry_telemetry::http::serve(config.metrics_listen, endpoints, stop.clone()).await?;
    tracing::info!(metrics = %address, "health and metrics are served");

    let images = images::Collector::new(
        config.duties.images,
        images::Deps {
            node: site.clone(),
            runtime: Arc::clone(&runtime),
            needs: Arc::new(pods.clone()),
            store: store.clone(),
            events: pods.node_events(),
            clock: Arc::clone(&clock),
        },
    );
    let mut rooms = JoinSet::new();
    let (pressure, pressure_seen) = watch::channel(Pressure::default());
    let (going, going_seen) = watch::channel(false);
    // Known before anything is stopped or started.
    if let Some(files) = config.duties.manifests {
        let deps = manifests::Deps {
            node: site.clone(),
            pods: pods.clone(),
            events: pods.node_events(),
            metrics: Arc::clone(&metrics),
            clock: Arc::clone(&clock),
        };
        rooms.spawn(Manifests::open(files, deps).await.run(stop.clone()));
    }
    rooms.spawn(manifests::mirror::run(
        store.clone(),
        pods.statics(),
        Arc::clone(&clock),
        link.status(),
        stop.clone(),
    ));
    rooms.spawn(eviction::run(
        config.duties.eviction.clone(),
        eviction::Deps {
            node: site.clone(),
            runtime: Arc::clone(&runtime),
            stats,
            pods: pods.clone(),
            images: images.clone(),
            events: pods.node_events(),
        },
        pressure,
        stop.clone(),
    ));
    rooms.spawn(shutdown::serve(
        config.duties.shutdown,
        pods.clone(),
        going,
        stop.clone(),
    ));
    rooms.spawn(images.run(stop.clone()));
    rooms.spawn(rotation::run(
        config.duties.logs,
        Arc::clone(&runtime),
        Arc::clone(&clock),
        stop.clone(),
    ));
    rooms.spawn(node::run(
        NodeConfig {
            site,
            data_dir: config.data_dir.clone(),
            shares: config.shares.with_eviction(&config.duties.eviction.thresholds),
            fallback_machine_id: store.id().to_owned(),
            boot_id: boot_id(),
            pressure: pressure_seen,
            going: going_seen,
            time: Arc::clone(&time),
            events: pods.node_events(),
        },
        store.clone(),
        runtime,
        link.status(),
        stop.clone(),
    ));
    rooms.spawn(Devices::run(
        devices::Deps {
            store: Arc::new(store.clone()),
            clock: Arc::clone(&clock),
            defaults: Defaults {
                modbus: config.modbus_endpoint.clone(),
            },
        },
        stop.clone(),
    ));
    let renewer = Renewer {
        data_dir: config.data_dir.clone(),
        identity: identity_sender,
        dial,
        time,
        urge,
    };
    rooms.spawn(renewer.run(stop.clone()));
    rooms.spawn(local::serve(
        config.data_dir.clone(),
        Local {
            store: store.clone(),
            pods: pods.clone(),
            lookup,
            link: link.status(),
            identity: identity.clone(),
        },
        stop.clone(),
    ));
    let autonomy = autonomy::Watch::open(greeted.clone(), store.clone(), pods.clone(), boot_id())?;
    rooms.spawn(autonomy.run(link.status(), stop.clone()));
    rooms.spawn(say_held_back(
        link.gate(),
        pods.node_events(),
        greeted,
        Arc::clone(&metrics),
        stop.clone(),
    ));
    rooms.spawn(refresh_after_sync(pods.clone(), link.status(), stop.clone()));
    rooms.spawn(link.run(stop.clone()));
    rooms.spawn(resident::run(stop.clone()));
    let ended = pods.run(stop.clone()).await;
    // The pods room ends with `stop`, or because the store fails: then nothing else may go on either.
    stop.cancel();
    while rooms.join_next().await.is_some() {}
    metrics_task.abort();
    tracing::info!("the site's daemon has stopped; its containers go on");
    Ok(ended?)
}

fn config_facts(config: &Config) -> ConfigFacts {
    ConfigFacts {
        max_pods: config.shares.max_pods,
        cluster_dns: config.cluster_dns.clone(),
        cluster_domain: config.cluster_domain.clone(),
        runtime_endpoint: match config.runtime {
            RuntimeKind::Cri => format!("unix://{}", config.runtime_socket.display()),
            RuntimeKind::Process => String::new(),
        },
        pod_log_dir: config.pod_log_dir.display().to_string(),
        more: crate::config::shown(config),
    }
}

fn runtime(config: &Config, site: &str, registry: &Mutex<Registry>) -> Result<Arc<dyn Runtime>, DaemonError> {
    Ok(match config.runtime {
        RuntimeKind::Cri => {
            let runtime = CriRuntime::connect(config.runtime_socket.clone(), site);
            let mut registry = registry.lock().unwrap_or_else(PoisonError::into_inner);
            runtime.operations().register(&mut registry);
            Arc::new(runtime.with_cgroup_driver(config.cgroup_driver))
        }
        RuntimeKind::Process => {
            let program = std::env::current_exe().map_err(DaemonError::Program)?;
            let shim = vec![program.into_os_string(), "shim".into()];
            Arc::new(ProcessRuntime::new(&config.data_dir.join("process"), shim)?)
        }
    })
}

/// After a reconnection the API may hold a pod's status as the control plane left it while the site was away: every
/// status is reported again, and the provider writes only those that differ.
async fn refresh_after_sync(
    pods: Pods,
    mut link: watch::Receiver<crate::link::LinkStatus>,
    stop: CancellationToken,
) {
    let mut synced = false;
    loop {
        tokio::select! {
            () = stop.cancelled() => return,
            changed = link.changed() => if changed.is_err() { return },
        }
        let status = link.borrow_and_update().clone();
        pods.set_critical_priority(status.critical_priority);
        let now = status.synced;
        if now && !synced {
            pods.report_all();
        }
        synced = now;
    }
}

/// Says in events when something is held back on the link, and when it is no more.
async fn say_held_back(
    mut gate: watch::Receiver<Gate>,
    events: NodeEvents,
    site: SiteName,
    metrics: Arc<Metrics>,
    stop: CancellationToken,
) {
    let mut before = Gate::default();
    loop {
        tokio::select! {
            () = stop.cancelled() => return,
            changed = gate.changed() => if changed.is_err() { return },
        }
        let now = *gate.borrow_and_update();
        metrics.set_saturated(now.saturated);
        if now.saturated != before.saturated {
            let (level, reason, message) = if now.saturated {
                let message = "There is more to send than the uplink takes: best-effort pods' reports and streams wait.";
                (Level::Warning, "UplinkSaturated", message)
            } else {
                let message = "The uplink takes everything again: nothing waits for it any more.";
                (Level::Normal, "UplinkFree", message)
            };
            events.emit(&site, level, reason, message.to_owned()).await;
        }
        if now.deferring != before.deferring {
            let (reason, message) = match now.deferring {
                Deferring::Not => (
                    "LinkResumed",
                    "What waited for the link profile goes out.".to_owned(),
                ),
                other => (
                    "LinkDeferring",
                    format!(
                        "{}: reports and streams that are not critical wait.",
                        other.reason()
                    ),
                ),
            };
            events.emit(&site, Level::Normal, reason, message).await;
        }
        before = now;
    }
}

/// The address of this machine on its way to the provider; no packet is sent.
fn route_address(provider: &str) -> Option<IpAddr> {
    let any: SocketAddr = ([0, 0, 0, 0], 0).into();
    let socket = UdpSocket::bind(any).ok()?;
    socket.connect(provider).ok()?;
    socket
        .local_addr()
        .ok()
        .map(|address| address.ip())
        .filter(|ip| !ip.is_unspecified())
}

fn endpoints(
    metrics: &Arc<Metrics>,
    pods: &Pods,
    store: &Store,
    identity: &watch::Receiver<Arc<Identity>>,
    time: &Arc<TrustedTime>,
) -> Endpoints {
    let (shown, store, identity) = (Arc::clone(metrics), store.clone(), identity.clone());
    let time = Arc::clone(time);
    let summary = pods.summary();
    Endpoints {
        registry: Arc::clone(&metrics.registry),
        // The link may be down for weeks: a site that runs its pods is ready all the same.
        ready: Arc::new(move || {
            let summary = summary.borrow();
            if !summary.runtime_error.is_empty() {
                return Err(summary.runtime_error.clone());
            }
            if summary.synced {
                Ok(())
            } else {
                Err("the runtime's containers have not been read yet".to_owned())
            }
        }),
        refresh: Arc::new(move || {
            shown.set_skew(time.skew());
            shown.set_certificate(identity.borrow().not_after.as_second() - time.now().as_second());
            let (outbox, pods) = (
                store.outbox_len().unwrap_or(0),
                store.count(Kind::Pod).unwrap_or(0),
            );
            shown.set_store(outbox, pods, store.size_bytes());
            let (bytes, syncs) = store.traffic();
            shown.set_store_traffic(bytes, syncs);
            if let (Ok(used), Ok(drops)) = (store.outbox_use(), store.drops()) {
                shown.set_outbox(&used, &drops);
            }
        }),
    }
}

/// Finds pods for logs and exec: the stored object with the status that was last reported.
struct Lookup(Store, Pods);

impl PodLookup for Lookup {
    fn pod(&self, namespace: &str, name: &str) -> Option<Pod> {
        // A static pod runs under its own UID, whatever its mirror's is.
        let (uid, mut pod) = match self.1.static_pod(namespace, name) {
            Some(pod) => (Uid::from(pod.metadata.uid.clone()?), Pod::clone(&pod)),
            None => {
                let object = self.0.find(Kind::Pod, namespace, name).ok()??;
                (object.key.uid.clone(), object.decode().ok()?)
            }
        };
        let reported: Option<PodStatus> = pods::last_status(&self.0, &uid);
        pod.status = reported.or(pod.status);
        Some(pod)
    }

    fn has_uid(&self, pod: &Pod, uid: &str) -> bool {
        let metadata = &pod.metadata;
        if metadata.uid.as_deref() == Some(uid) {
            return true;
        }
        let (namespace, name) = (metadata.namespace.as_deref(), metadata.name.as_deref());
        let stored = self
            .0
            .find(Kind::Pod, namespace.unwrap_or_default(), name.unwrap_or_default());
        let mirror: Option<Pod> = stored
            .ok()
            .flatten()
            .filter(|o| o.key.uid.as_str() == uid)
            .and_then(|o| o.decode().ok());
        mirror.is_some_and(|m| manifests::mirror::mirrored(&m) == metadata.uid.as_deref())
    }
}
