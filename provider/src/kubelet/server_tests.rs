//! The server over real TLS on loopback, with an edge in memory.

use rustls::pki_types::{PrivateKeyDer, ServerName};
use skerry_proto::SiteName;
use skerry_proto::link::{
    Header, OpenTunnel, TunnelFrame, TunnelOpen, TunnelReady, open_tunnel, tunnel_frame::Frame,
};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::sync::mpsc;
use tokio_rustls::client::TlsStream;

use super::testing::FakeReviews;
use super::*;
use crate::kubelet::{PodLocation, server_config};
use crate::link::tunnels::{Orders, SiteAway};
use futures::StreamExt;

struct OnePod;

impl PodDirectory for OnePod {
    fn locate(&self, namespace: &str, pod: &str) -> Option<PodLocation> {
        (namespace == "ns" && pod == "p").then(|| PodLocation {
            site: "harbour".parse().unwrap(),
            uid: "u".into(),
            containers: vec!["c".into()],
        })
    }
}

impl crate::kubelet::NodeDirectory for OnePod {
    fn pods(&self, site: &SiteName) -> Vec<serde_json::Value> {
        vec![serde_json::json!({"metadata": {"name": format!("pod-of-{site}")}})]
    }
}

struct Queue(mpsc::UnboundedSender<OpenTunnel>);

impl Orders for Queue {
    fn send(&self, site: &SiteName, order: OpenTunnel) -> Result<(), SiteAway> {
        let away = |_| SiteAway {
            site: site.clone(),
            since: None,
        };
        self.0.send(order).map_err(away)
    }
}

/// An edge that answers every log with `log text` and echoes every stream after 101.
async fn edge(tunnels: Tunnels, mut orders: mpsc::UnboundedReceiver<OpenTunnel>) {
    while let Some(order) = orders.recv().await {
        let site: SiteName = "harbour".parse().unwrap();
        let (to_cloud, inbound) = mpsc::channel::<Result<TunnelFrame, tonic::Status>>(4);
        let open = TunnelOpen {
            session: String::new(),
            id: order.id,
        };
        let inbound = tokio_stream::wrappers::ReceiverStream::new(inbound);
        let mut from_cloud = tunnels.accept(&site, open, inbound);
        let frame = |frame| Ok(TunnelFrame { frame: Some(frame) });
        tokio::spawn(async move {
            let logs = matches!(order.target, Some(open_tunnel::Target::Logs(_)));
            let header = |name: &str, value: &'static str| Header {
                name: name.into(),
                value: value.into(),
            };
            let ready = match logs {
                true => TunnelReady {
                    status: 200,
                    headers: vec![],
                },
                false => TunnelReady {
                    status: 101,
                    headers: vec![header("Connection", "Upgrade"), header("Upgrade", "SPDY/3.1")],
                },
            };
            to_cloud.send(frame(Frame::Ready(ready))).await.unwrap();
            if logs {
                to_cloud
                    .send(frame(Frame::Data("log text".into())))
                    .await
                    .unwrap();
                return;
            }
            while let Some(Ok(echoed)) = from_cloud.next().await {
                to_cloud.send(Ok(echoed)).await.unwrap();
            }
        });
    }
}

struct Running {
    address: std::net::SocketAddr,
    roots: rustls::RootCertStore,
    listeners: mpsc::UnboundedSender<NodeListener>,
    stop: CancellationToken,
    server: tokio::task::JoinHandle<()>,
}

/// Starts a server; without an edge its site is away.
async fn start(with_edge: bool) -> Running {
    let key = rcgen::KeyPair::generate().unwrap();
    let certificate = rcgen::CertificateParams::new(vec!["kubelet".to_owned()])
        .unwrap()
        .self_signed(&key)
        .unwrap();
    let mut roots = rustls::RootCertStore::empty();
    roots.add(certificate.der().clone()).unwrap();
    let key = PrivateKeyDer::try_from(key.serialize_der()).unwrap();
    // The CA of clients is the same one: any will do where no client shows a certificate.
    let config = server_config(vec![certificate.der().clone()], key, Some(roots.clone())).unwrap();
    let (orders, queue) = mpsc::unbounded_channel();
    let tunnels = Tunnels::new(Arc::new(Queue(orders)));
    if with_edge {
        tokio::spawn(edge(tunnels.clone(), queue));
    }
    let (listeners, made) = mpsc::unbounded_channel();
    let deps = KubeletDeps {
        pods: Arc::new(OnePod),
        nodes: Arc::new(OnePod),
        listeners: made,
        tunnels,
        reviews: Arc::new(FakeReviews::default()),
    };
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let stop = CancellationToken::new();
    let (_, tls) = watch::channel(Arc::new(config));
    let server = tokio::spawn(KubeletServer::serve(listener, tls, deps, stop.clone()));
    Running {
        address,
        roots,
        listeners,
        stop,
        server,
    }
}

impl Running {
    async fn connect(&self) -> TlsStream<TcpStream> {
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let config = rustls::ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_root_certificates(self.roots.clone())
            .with_no_client_auth();
        let stream = TcpStream::connect(self.address).await.unwrap();
        let name = ServerName::try_from("kubelet").unwrap();
        tokio_rustls::TlsConnector::from(Arc::new(config))
            .connect(name, stream)
            .await
            .unwrap()
    }

    /// The whole answer to one request.
    async fn ask(&self, line: &str, token: &str) -> String {
        let mut stream = self.connect().await;
        let request = format!(
            "{line} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {token}\r\nConnection: close\r\n\r\n"
        );
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        answer
    }
}

#[tokio::test]
async fn a_log_is_answered_chunked_to_its_end() {
    let running = start(true).await;
    let answer = running.ask("GET /containerLogs/ns/p/c?tailLines=3", "good").await;
    assert!(answer.starts_with("HTTP/1.1 200 OK\r\n"), "{answer}");
    assert!(
        answer.to_lowercase().contains("transfer-encoding: chunked"),
        "{answer}"
    );
    assert!(answer.ends_with("8\r\nlog text\r\n0\r\n\r\n"), "{answer}");
}

#[tokio::test]
async fn an_upgrade_is_relayed_both_ways() {
    let running = start(true).await;
    let mut stream = running.connect().await;
    let request = "POST /exec/ns/p/c?command=sh&input=1&output=1 HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer good\r\n\
                   Connection: Upgrade\r\nUpgrade: SPDY/3.1\r\nX-Stream-Protocol-Version: v4.channel.k8s.io\r\n\
                   Content-Length: 0\r\n\r\n";
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut head = vec![];
    while !head.ends_with(b"\r\n\r\n") {
        head.push(stream.read_u8().await.unwrap());
    }
    let head = String::from_utf8(head).unwrap().to_lowercase();
    assert!(
        head.starts_with("http/1.1 101") && head.contains("upgrade: spdy/3.1"),
        "{head}"
    );
    stream.write_all(b"ping").await.unwrap();
    let mut echo = [0; 4];
    stream.read_exact(&mut echo).await.unwrap();
    assert_eq!(&echo, b"ping");
    stream.shutdown().await.unwrap();
    let mut rest = vec![];
    stream.read_to_end(&mut rest).await.unwrap();
    assert!(rest.is_empty());
}

#[tokio::test]
async fn requests_are_refused_with_a_kubelets_words() {
    let running = start(false).await;
    for (line, token, status, text) in [
        ("GET /containerLogs/ns/p/c", "unknown", 401, "Unauthorized"),
        (
            "GET /containerLogs/ns/p/c",
            "bad",
            403,
            "Forbidden (user=bad, verb=get, resource=nodes, subresource(s)=[proxy])",
        ),
        ("GET /healthz", "bad", 403, "subresource(s)=[healthz proxy]"),
        ("GET /healthz", "good", 200, "ok"),
        (
            "GET /containerLogs/ns/nope/c",
            "good",
            404,
            "pod \"nope\" does not exist",
        ),
        (
            "GET /containerLogs/ns/p/x",
            "good",
            404,
            "container \"x\" not found in pod \"p\"",
        ),
        ("GET /containerLogs/ns/p/c?tailLines=-1", "good", 422, "tailLines"),
        ("GET /containerLogs/ns/p/c?tailLines=x", "good", 400, "tailLines"),
        ("POST /containerLogs/ns/p/c", "good", 405, "GET"),
        (
            "POST /exec/ns/p/c?command=sh&output=1",
            "good",
            400,
            "Upgrade request required",
        ),
        ("GET /nothing", "good", 404, "/nothing"),
        ("GET /pods", "good", 404, "this port serves all"),
        ("GET /pods", "bad", 403, "subresource(s)=[pods proxy]"),
        ("GET /nodes/harbour/pods", "good", 200, "pod-of-harbour"),
        ("POST /nodes/harbour/pods", "good", 405, "Method Not Allowed"),
        (
            "GET /nodes/harbour/metrics/resource",
            "good",
            403,
            "subresource(s)=[metrics]",
        ),
        ("GET /nodes/harbour/configz", "good", 503, "\"harbour\""),
        ("GET /nodes/harbour/healthz", "good", 503, "\"harbour\""),
        (
            "GET /nodes/other/containerLogs/ns/p/c",
            "good",
            404,
            "pod \"p\" does not exist",
        ),
        ("GET /run/ns/p/c?cmd=ls", "good", 405, "POST"),
        ("POST /run/ns/p/c", "good", 400, "you must specify a command"),
        ("POST /run/ns/p/other/c?cmd=ls", "good", 404, "pod does not exist"),
        ("GET /containerLogs/ns/p/c", "good", 503, "\"harbour\""),
    ] {
        let answer = running.ask(line, token).await;
        assert!(
            answer.starts_with(&format!("HTTP/1.1 {status} ")),
            "{line}: {answer}"
        );
        assert!(answer.contains(text), "{line}: {answer}");
    }
}

#[tokio::test]
async fn a_port_of_its_own_says_which_node_is_meant() {
    let mut running = start(false).await;
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let own = listener.local_addr().unwrap();
    let stop = CancellationToken::new();
    let one = NodeListener {
        site: "quay".parse().unwrap(),
        listener,
        stop: stop.clone(),
    };
    running.listeners.send(one).map_err(drop).unwrap();
    running.address = own;
    let answer = running.ask("GET /pods", "good").await;
    assert!(answer.contains("pod-of-quay"), "{answer}");
    // The pod is harbour's.
    let answer = running.ask("GET /containerLogs/ns/p/c", "good").await;
    assert!(answer.starts_with("HTTP/1.1 404 "), "{answer}");
    stop.cancel();
    // The listener is closed once its task has seen that.
    while TcpStream::connect(own).await.is_ok() {
        tokio::task::yield_now().await;
    }
}

#[tokio::test]
async fn the_server_stops_when_told() {
    let running = start(true).await;
    let _idle = running.connect().await;
    running.stop.cancel();
    tokio::time::timeout(STOP_LIMIT * 2, running.server)
        .await
        .unwrap()
        .unwrap();
}
