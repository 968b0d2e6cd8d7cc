//! Wires the rooms of the provider together and runs them.

use std::net::{IpAddr, SocketAddr};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use jiff::Timestamp;
use kube::Client;
use kube::client::ClientBuilder;
use kube::config::{KubeConfigOptions, Kubeconfig};
use rustls::RootCertStore;
use skerry_proto::SiteName;
use skerry_proto::limits::{
    LINK_CONNECTION_WINDOW, LINK_STREAM_WINDOW, MAX_MESSAGE_BYTES, MAX_TUNNELS_PER_SITE,
};
use skerry_proto::link::enrolment_server::EnrolmentServer;
use skerry_proto::link::link_server::LinkServer;
use skerry_proto::link::{Report, report};
use skerry_telemetry::http::{Endpoints, ListenError};
use tokio::net::TcpListener;
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use tower::ServiceBuilder;

use crate::clock::SystemClock;
use crate::cluster::{self, Mirror};
use crate::config::{Config, ConfigError};
use crate::devices;
use crate::kubelet::ports::NodePorts;
use crate::kubelet::{
    self, ClusterIssuer, KubeReviews, KubeletDeps, KubeletServer, NodeDirectory, PodDirectory, PodLocation,
};
use crate::link::reports::{Outcome, ReportSink, Reports};
use crate::link::sessions::Sessions;
use crate::link::tunnels::Tunnels;
use crate::link::{self, Arrivals, LinkDeps, LinkService};
use crate::metrics::Metrics;
use crate::node::status::KubeletAddress;
use crate::node::{self, NodeDeps, NodeWrites};
use crate::pace::Pace;
use crate::pki::rotation;
use crate::pki::{Authority, AuthorityError, EnrolmentService, Names, Renewals, SiteEvents, SiteLedger};
use crate::pods;

/// How long sites get to read their goodbye.
const FAREWELL: Duration = Duration::from_millis(300);

/// Why the provider could not start. Exit code 1, or 2 for a wrong configuration.
#[derive(Debug, thiserror::Error)]
pub enum ServerError {
    /// A setting is wrong.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// No access to the cluster.
    #[error("no access to a Kubernetes cluster: {0}; name a kubeconfig with --kubeconfig")]
    Cluster(String),
    /// The CA cannot be used.
    #[error(transparent)]
    Authority(#[from] AuthorityError),
    /// A port is taken.
    #[error("cannot listen on {address} for {purpose}: {source}")]
    Listen {
        /// Where.
        address: SocketAddr,
        /// What for.
        purpose: &'static str,
        /// Why not.
        source: std::io::Error,
    },
    /// The metrics port is taken.
    #[error(transparent)]
    Metrics(#[from] ListenError),
    /// The cluster's past is another: nothing that this process remembers of it may survive. Start it again.
    #[error("the cluster was restored from an older backup")]
    Restored,
    /// The client CA file.
    #[error("the kubelet client CA cannot be read: {0}")]
    ClientCa(String),
}

/// A client of the Kubernetes API; with metrics, it measures every request.
pub async fn client(kubeconfig: Option<&Path>, metrics: Option<Arc<Metrics>>) -> Result<Client, ServerError> {
    let wrong = |e: &dyn std::fmt::Display| ServerError::Cluster(e.to_string());
    let config = match kubeconfig {
        Some(file) => {
            let file = Kubeconfig::read_from(file).map_err(|e| wrong(&e))?;
            kube::Config::from_custom_kubeconfig(file, &KubeConfigOptions::default())
                .await
                .map_err(|e| wrong(&e))?
        }
        None => kube::Config::infer().await.map_err(|e| wrong(&e))?,
    };
    let Some(metrics) = metrics else {
        return Client::try_from(config).map_err(|e| wrong(&e));
    };
    let pace = Pace::default();
    let measure = tower::layer::layer_fn(move |service| Measured {
        service,
        metrics: Arc::clone(&metrics),
    });
    let builder = ClientBuilder::try_from(config).map_err(|e| wrong(&e))?;
    Ok(builder
        .with_layer(&ServiceBuilder::new().layer(pace).layer(measure).into_inner())
        .build())
}

/// Measures the time from a request to the head of its answer.
#[derive(Clone)]
struct Measured<S> {
    service: S,
    metrics: Arc<Metrics>,
}

impl<S, B, R> tower::Service<http::Request<B>> for Measured<S>
where
    S: tower::Service<http::Request<B>, Response = http::Response<R>>,
    S::Future: Send + 'static,
{
    type Response = S::Response;
    type Error = S::Error;
    type Future = std::pin::Pin<Box<dyn Future<Output = Result<S::Response, S::Error>> + Send>>;

    fn poll_ready(&mut self, cx: &mut std::task::Context<'_>) -> std::task::Poll<Result<(), S::Error>> {
        self.service.poll_ready(cx)
    }

    fn call(&mut self, request: http::Request<B>) -> Self::Future {
        let (method, metrics, began) = (
            request.method().clone(),
            Arc::clone(&self.metrics),
            Instant::now(),
        );
        let answer = self.service.call(request);
        Box::pin(async move {
            let answer = answer.await;
            let code = answer.as_ref().map_or(0, |response| response.status().as_u16());
            metrics.observe_request(&method, code, began.elapsed());
            answer
        })
    }
}

/// Runs the provider until `stop`.
pub async fn run(config: Config, stop: CancellationToken) -> Result<(), ServerError> {
    let address = KubeletAddress {
        ip: config.published_address()?,
        port: config.kubelet_listen.port(),
    };
    let (ports, listeners) = NodePorts::new(
        config.kubelet_listen.ip(),
        address.port,
        config.node_ports.clone(),
    );
    let ports = Arc::new(ports);
    let metrics = Arc::new(Metrics::new());
    let client = client(config.kubeconfig.as_deref(), Some(Arc::clone(&metrics))).await?;
    let authority = Authority::load_or_create(&client, &config.namespace, &config.trust_domain)
        .await?
        .with_life(config.certificate_life);
    let mirror = Arc::new(Mirror::new());
    let sessions = Sessions::new(Timestamp::now());
    let tunnels = Tunnels::new(Arc::new(sessions.clone()));
    let (reachability, reachable) = mpsc::unbounded_channel();

    let link_listener = link::listen(config.link_listen).map_err(|source| ServerError::Listen {
        address: config.link_listen,
        purpose: "sites",
        source,
    })?;
    let kubelet_listener = listen(config.kubelet_listen, "the kubelet API").await?;
    let names = names(&config, &address);
    let link_tls = authority.link_tls(names.clone(), stop.clone())?;
    let client_ca = client_ca(&config, &client).await?;
    // The signer for kubelets takes no names that are only of this machine.
    let kubelet_names = Names {
        dns: names
            .dns
            .iter()
            .filter(|name| *name != "localhost")
            .cloned()
            .collect(),
        ips: names.ips.iter().filter(|ip| !ip.is_loopback()).copied().collect(),
    };
    let own_tls = authority.kubelet_tls(names, client_ca.clone(), stop.clone())?;
    let kubelet_tls = if kubelet_names.ips.is_empty() {
        own_tls
    } else {
        let issuer = ClusterIssuer::new(client.clone(), &config.namespace, kubelet_names);
        let metrics = Arc::clone(&metrics);
        kubelet::serving::serve(Arc::new(issuer), client_ca, own_tls, metrics, stop.clone())
    };
    let (metrics_address, metrics_task) = skerry_telemetry::http::serve(
        config.metrics_listen,
        endpoints(&mirror, &metrics, &authority, &tunnels),
        stop.clone(),
    )
    .await?;
    tracing::info!(link = %config.link_listen, kubelet = %config.kubelet_listen, metrics = %metrics_address,
        trust_domain = %config.trust_domain, "the provider is starting");

    let writes = Arc::new(NodeWrites::default());
    let arrivals = Arrivals::new(metrics.link_shed.clone());
    let sink = Sink {
        client: client.clone(),
        mirror: Arc::clone(&mirror),
        address,
        ports: Arc::clone(&ports),
        written: pods::Written::default(),
        writes: Arc::clone(&writes),
    };
    let link_deps = Arc::new(LinkDeps {
        client: client.clone(),
        mirror: Arc::clone(&mirror),
        sessions: sessions.clone(),
        tunnels: tunnels.clone(),
        renewals: Renewals {
            authority: authority.clone(),
            ledger: Arc::new(SiteLedger(client.clone())),
            audit: Arc::new(SiteEvents::new(client.clone())),
            clock: Arc::new(SystemClock),
            grace: config.expired_grace,
        },
        reports: Arc::new(Reports::new(sink)),
        arrivals,
        timings: config.timings,
        metrics: Arc::clone(&metrics),
    });
    let node_deps = Arc::new(NodeDeps {
        client: client.clone(),
        mirror: Arc::clone(&mirror),
        sessions: sessions.clone(),
        timings: config.timings,
        metrics: Arc::clone(&metrics),
        reachability,
        writes,
    });
    let kubelet_deps = KubeletDeps {
        pods: Arc::new(Directory(Arc::clone(&mirror))),
        nodes: Arc::new(Directory(Arc::clone(&mirror))),
        listeners,
        tunnels,
        reviews: Arc::new(KubeReviews::new(client.clone())),
    };
    let watched = client.clone();
    let mut rooms = JoinSet::new();
    rooms.spawn(rotation::tend(
        rotation::Tending {
            client: client.clone(),
            namespace: config.namespace.clone(),
            authority: authority.clone(),
            mirror: Arc::clone(&mirror),
            sessions: sessions.clone(),
            audit: Arc::new(SiteEvents::new(client.clone())),
            metrics: Arc::clone(&metrics),
        },
        stop.clone(),
    ));
    rooms.spawn(kubelet::ports::run(ports, Arc::clone(&mirror), stop.clone()));
    rooms.spawn(cluster::run(client.clone(), Arc::clone(&mirror), stop.clone()));
    rooms.spawn(node::run(node_deps, stop.clone()));
    rooms.spawn(devices::run(client.clone(), stop.clone()));
    rooms.spawn(devices::tell(
        client.clone(),
        Arc::clone(&mirror),
        reachable,
        stop.clone(),
    ));
    rooms.spawn(KubeletServer::serve(
        kubelet_listener,
        kubelet_tls,
        kubelet_deps,
        stop.clone(),
    ));
    // The link outlives `stop` by the farewell, so that sites read why it ends.
    let link_stop = CancellationToken::new();
    let enrolment = EnrolmentService::new(authority.clone(), client, config.namespace);
    let connections = link::serve(
        link_listener,
        link_tls,
        authority,
        metrics.link_refused.clone(),
        link_stop.clone(),
    );
    let server = tonic::transport::Server::builder()
        // No HTTP/2 pings: heartbeats and the kernel (transport) watch over connections, and the latter costs nothing.
        .initial_stream_window_size(LINK_STREAM_WINDOW)
        .initial_connection_window_size(LINK_CONNECTION_WINDOW)
        // Every tunnel is a stream, and so is the session itself.
        .max_concurrent_streams(u32::try_from(MAX_TUNNELS_PER_SITE + 64).ok())
        .add_service(EnrolmentServer::new(enrolment))
        .add_service(
            LinkServer::new(LinkService::new(link_deps))
                .max_decoding_message_size(MAX_MESSAGE_BYTES)
                .max_encoding_message_size(MAX_MESSAGE_BYTES),
        )
        .serve_with_incoming_shutdown(connections, link_stop.clone().cancelled_owned());
    let link = tokio::spawn(server);
    let restored = tokio::select! {
        () = stop.cancelled() => false,
        () = cluster::restored(watched) => true,
    };
    sessions.dismiss_all(if restored {
        "the cluster was restored from an older backup; the provider starts anew"
    } else {
        "the provider is stopping"
    });
    tokio::time::sleep(FAREWELL).await;
    link_stop.cancel();
    // Streams of sites that do not read their goodbye must not hold up the end.
    link.abort();
    rooms.shutdown().await;
    metrics_task.abort();
    if restored {
        return Err(ServerError::Restored);
    }
    tracing::info!("the provider has stopped");
    Ok(())
}

async fn listen(address: SocketAddr, purpose: &'static str) -> Result<TcpListener, ServerError> {
    TcpListener::bind(address)
        .await
        .map_err(|source| ServerError::Listen {
            address,
            purpose,
            source,
        })
}

fn names(config: &Config, address: &KubeletAddress) -> Names {
    let mut names = Names {
        dns: vec!["localhost".to_owned()],
        ips: vec![address.ip],
    };
    for given in &config.link_address {
        // An address may be given with its port, as sites dial it.
        let host = given.rsplit_once(':').map_or(given.as_str(), |(host, port)| {
            if port.bytes().all(|c| c.is_ascii_digit()) {
                host
            } else {
                given
            }
        });
        match host.trim_matches(['[', ']']).parse::<IpAddr>() {
            Ok(ip) => names.ips.push(ip),
            Err(_) => names.dns.push(host.to_owned()),
        }
    }
    names
}

async fn client_ca(config: &Config, client: &Client) -> Result<Option<RootCertStore>, ServerError> {
    let Some(file) = &config.kubelet_client_ca else {
        return match kubelet::load_client_ca(client).await {
            Ok(found) => Ok(found),
            Err(error) => {
                tracing::warn!(%error, "client certificates are not accepted at the kubelet API; name the CA with --kubelet-client-ca");
                Ok(None)
            }
        };
    };
    let wrong = |e: &dyn std::fmt::Display| ServerError::ClientCa(format!("{}: {e}", file.display()));
    let pem = std::fs::read(file).map_err(|e| wrong(&e))?;
    kubelet::parse_bundle(&pem).map(Some).map_err(|e| wrong(&e))
}

fn endpoints(
    mirror: &Arc<Mirror>,
    metrics: &Arc<Metrics>,
    authority: &Authority,
    tunnels: &Tunnels,
) -> Endpoints {
    let tunnels = tunnels.clone();
    let (mirror, shown) = (Arc::clone(mirror), Arc::clone(metrics));
    let authority = authority.clone();
    Endpoints {
        registry: Arc::clone(&metrics.registry),
        ready: Arc::new(move || {
            if mirror.is_synced() {
                Ok(())
            } else {
                Err("the cluster has not been read yet".to_owned())
            }
        }),
        refresh: Arc::new(move || {
            shown.set_tunnels(tunnels.by_site());
            shown.set_certificate(
                "ca",
                authority.not_after().as_second() - Timestamp::now().as_second(),
            );
        }),
    }
}

/// Where each kind of report goes.
struct Sink {
    client: Client,
    mirror: Arc<Mirror>,
    address: KubeletAddress,
    ports: Arc<NodePorts>,
    written: pods::Written,
    writes: Arc<NodeWrites>,
}

#[tonic::async_trait]
impl ReportSink for Sink {
    async fn take(&self, site: &SiteName, report: &Report) -> Outcome {
        if let Some(field) = link::names::malformed(report) {
            return Outcome::Dropped(format!("the report's {field} is no name of an object"));
        }
        match &report.report {
            Some(report::Report::PodStatus(status)) => {
                pods::status::apply(&self.client, &self.mirror, &self.written, site, status).await
            }
            Some(report::Report::NodeStatus(status)) => {
                let address = KubeletAddress {
                    port: kubelet::ports::port_of(&self.ports, &self.mirror, site),
                    ..self.address.clone()
                };
                node::status::apply(&self.client, &self.mirror, &self.writes, &address, site, status).await
            }
            Some(report::Report::Event(event)) => {
                pods::events::apply(&self.client, &self.mirror, site, event).await
            }
            Some(report::Report::MirrorPod(mirror)) => {
                pods::mirrors::apply(&self.client, &self.mirror, site, mirror).await
            }
            Some(report::Report::DeviceStatus(status)) => {
                devices::apply_report(self.client.clone(), site, status).await
            }
            None => Outcome::Dropped("this provider does not know such reports; upgrade it".to_owned()),
        }
    }
}

/// Finds pods for the kubelet API in the mirror.
struct Directory(Arc<Mirror>);

impl NodeDirectory for Directory {
    fn pods(&self, site: &SiteName) -> Vec<serde_json::Value> {
        let pods = self.0.pods_of(site);
        pods.iter().map(|pod| pod.value.clone()).collect()
    }
}

impl PodDirectory for Directory {
    fn locate(&self, namespace: &str, pod: &str) -> Option<PodLocation> {
        let (site, object) = self.0.locate(namespace, pod)?;
        let spec = &object.value["spec"];
        let containers = ["initContainers", "containers", "ephemeralContainers"]
            .iter()
            .filter_map(|list| spec[*list].as_array())
            .flatten()
            .filter_map(|container| container["name"].as_str().map(str::to_owned));
        Some(PodLocation {
            site,
            uid: object.key.uid.clone(),
            containers: containers.collect(),
        })
    }
}
