//! HTTP GET as probes and hooks do it: one connection, no verification, redirects on the same host only.

use std::sync::Arc;
use std::time::Duration;

use http_body_util::{BodyExt, Empty};
use hyper_util::rt::TokioIo;
use k8s_openapi::api::core::v1::{Container, HTTPGetAction};
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::{ClientConfig, DigitallySignedStruct, SignatureScheme};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;

/// Most of a body that is read.
const MAX_BODY: usize = 10 * 1024;
/// Most redirects that are followed.
const MAX_REDIRECTS: usize = 10;

/// Plain or encrypted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Scheme {
    Http,
    Https,
}

/// Where a request goes.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Target {
    scheme: Scheme,
    host: String,
    port: u16,
    /// Path and query, as they go over the line.
    path: String,
}

/// A request that is ready to be made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Get {
    target: Target,
    /// Instead of the target's own.
    host: Option<String>,
    headers: http::HeaderMap,
}

/// What came back, after redirects.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Answer {
    /// Status code; a redirect (300 to 399) when it leads to another host.
    pub(super) code: u16,
    /// At most 10 KiB of the body.
    pub(super) body: Vec<u8>,
}

/// Why nothing came back.
#[derive(Debug, thiserror::Error)]
#[error("Get \"{url}\": {why}")]
pub(super) struct GetError {
    url: String,
    why: String,
    /// The server speaks plain HTTP although HTTPS was asked for.
    pub(super) plain_server: bool,
}

/// A container's port by number or by name.
pub(super) fn port(wanted: &IntOrString, container: &Container) -> Result<u16, String> {
    let number = match wanted {
        IntOrString::Int(number) => *number,
        IntOrString::String(name) => {
            let named = container
                .ports
                .iter()
                .flatten()
                .find(|p| p.name.as_deref() == Some(name));
            match named {
                Some(port) => port.container_port,
                None => name.parse().map_err(|_| format!("port {name} not found"))?,
            }
        }
    };
    u16::try_from(number)
        .ok()
        .filter(|n| *n > 0)
        .ok_or_else(|| format!("invalid port number: {number}"))
}

/// `host:port`, with brackets where IPv6 needs them.
pub(super) fn join(host: &str, port: u16) -> String {
    if host.contains(':') {
        format!("[{host}]:{port}")
    } else {
        format!("{host}:{port}")
    }
}

/// Opens a TCP connection; the error reads as a kubelet's.
pub(super) async fn connect(host: &str, port: u16) -> Result<TcpStream, String> {
    TcpStream::connect((host, port))
        .await
        .map_err(|e| format!("dial tcp {}: connect: {}", join(host, port), words(&e)))
}

/// An operating system's error without its number and its capital.
fn words(error: &std::io::Error) -> String {
    let text = error.to_string();
    let text = text.split(" (os error").next().unwrap_or_default();
    let mut letters = text.chars();
    letters
        .next()
        .map(|first| first.to_lowercase().chain(letters).collect())
        .unwrap_or_default()
}

impl Get {
    /// The request that an action asks for. `host` is used where the action names none; `agent` is who asks.
    pub(super) fn new(
        action: &HTTPGetAction,
        container: &Container,
        host: &str,
        agent: &'static str,
    ) -> Result<Self, String> {
        let scheme = match action.scheme.as_deref().unwrap_or_default() {
            "HTTPS" | "https" => Scheme::Https,
            "" | "HTTP" | "http" => Scheme::Http,
            other => return Err(format!("unsupported protocol scheme \"{other}\"")),
        };
        let target = Target {
            scheme,
            host: action
                .host
                .as_deref()
                .filter(|h| !h.is_empty())
                .unwrap_or(host)
                .to_owned(),
            port: port(&action.port, container)?,
            path: escaped(action.path.as_deref().unwrap_or_default()),
        };
        let mut headers = http::HeaderMap::new();
        let mut own_host = None;
        for header in action.http_headers.iter().flatten() {
            if header.name.eq_ignore_ascii_case("host") {
                own_host = Some(header.value.clone()).filter(|h| !h.is_empty());
                continue;
            }
            let name = http::HeaderName::try_from(header.name.as_str())
                .map_err(|_| format!("net/http: invalid header field name \"{}\"", header.name))?;
            let value = http::HeaderValue::try_from(header.value.as_str())
                .map_err(|_| format!("net/http: invalid header field value for \"{}\"", header.name))?;
            headers.append(name, value);
        }
        if !headers.contains_key(http::header::USER_AGENT) {
            headers.insert(http::header::USER_AGENT, http::HeaderValue::from_static(agent));
        }
        if !headers.contains_key(http::header::ACCEPT) {
            headers.insert(http::header::ACCEPT, http::HeaderValue::from_static("*/*"));
        }
        // An empty value means: send none.
        for name in [http::header::USER_AGENT, http::header::ACCEPT] {
            if headers.get(&name).is_some_and(|v| v.is_empty()) {
                headers.remove(&name);
            }
        }
        Ok(Self {
            target,
            host: own_host,
            headers,
        })
    }

    /// The same request without encryption and without credentials.
    pub(super) fn in_plain(&self) -> Self {
        let mut plain = self.clone();
        plain.target.scheme = Scheme::Http;
        plain.headers.remove(http::header::AUTHORIZATION);
        plain
    }

    /// `host:port` that it goes to.
    pub(super) fn address(&self) -> String {
        join(&self.target.host, self.target.port)
    }

    /// Makes the request within `limit`, following redirects on the same host.
    pub(super) async fn fetch(&self, limit: Duration) -> Result<Answer, GetError> {
        let late = || GetError {
            url: self.target.url(),
            why: "context deadline exceeded (Client.Timeout exceeded while awaiting headers)".to_owned(),
            plain_server: false,
        };
        match tokio::time::timeout(limit, self.follow()).await {
            Ok(result) => result,
            Err(_) => Err(late()),
        }
    }

    async fn follow(&self) -> Result<Answer, GetError> {
        let mut target = self.target.clone();
        let mut host = self.host.clone();
        for _ in 0..=MAX_REDIRECTS {
            let (answer, location) = self.ask(&target, host.as_deref()).await?;
            let Some(location) = location.filter(|_| matches!(answer.code, 301 | 302 | 303 | 307 | 308))
            else {
                return Ok(answer);
            };
            let Some(next) = target.resolve(&location) else {
                return Err(GetError {
                    url: target.url(),
                    why: format!("failed to parse Location header \"{location}\""),
                    plain_server: false,
                });
            };
            if next.host != self.target.host {
                return Ok(answer);
            }
            // The name that the action gave holds as long as the server does not name itself.
            if location.contains("://") || location.starts_with("//") {
                host = None;
            }
            target = next;
        }
        Err(GetError {
            url: target.url(),
            why: format!("stopped after {MAX_REDIRECTS} redirects"),
            plain_server: false,
        })
    }

    async fn ask(&self, target: &Target, host: Option<&str>) -> Result<(Answer, Option<String>), GetError> {
        let failed = |why: String| GetError {
            url: target.url(),
            why,
            plain_server: false,
        };
        let address = join(&target.host, target.port);
        let mut request = http::Request::get(&target.path)
            .header(http::header::HOST, host.unwrap_or(&address))
            .body(Empty::<bytes::Bytes>::new())
            .map_err(|e| failed(e.to_string()))?;
        for (name, value) in &self.headers {
            request.headers_mut().append(name, value.clone());
        }
        request
            .headers_mut()
            .insert(http::header::CONNECTION, http::HeaderValue::from_static("close"));
        let stream = connect(&target.host, target.port).await.map_err(failed)?;
        let response = match target.scheme {
            Scheme::Http => exchange(stream, request).await,
            Scheme::Https => {
                let name = ServerName::try_from(target.host.clone())
                    .map_err(|e| failed(format!("tls: {}: {e}", target.host)))?;
                let config = unverified().map_err(|e| failed(format!("tls: {e}")))?;
                let secured = TlsConnector::from(config).connect(name, stream).await;
                let secured = secured.map_err(|e| {
                    let plain_server = speaks_plain(&e);
                    let why = if plain_server {
                        "http: server gave HTTP response to HTTPS client".to_owned()
                    } else {
                        format!("tls: {e}")
                    };
                    GetError {
                        url: target.url(),
                        why,
                        plain_server,
                    }
                })?;
                exchange(secured, request).await
            }
        };
        response.map_err(|e| failed(e.to_string()))
    }
}

/// One request and its answer over a connection of its own.
async fn exchange(
    stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
    request: http::Request<Empty<bytes::Bytes>>,
) -> Result<(Answer, Option<String>), hyper::Error> {
    let (mut sender, connection) = hyper::client::conn::http1::Builder::new()
        .title_case_headers(true)
        .handshake(TokioIo::new(stream))
        .await?;
    let ask = async {
        let response = sender.send_request(request).await?;
        let code = response.status().as_u16();
        let location = response.headers().get(http::header::LOCATION);
        let location = location.map(|v| String::from_utf8_lossy(v.as_bytes()).into_owned());
        let mut rest = response.into_body();
        let mut body = Vec::new();
        while let Some(frame) = rest.frame().await {
            if let Ok(data) = frame?.into_data() {
                let room = MAX_BODY - body.len();
                body.extend_from_slice(&data[..data.len().min(room)]);
                if body.len() == MAX_BODY {
                    break;
                }
            }
        }
        Ok((Answer { code, body }, location))
    };
    let drive = async {
        // Its failure shows in the request.
        let _ = connection.await;
        std::future::pending::<()>().await;
    };
    tokio::select! {
        answer = ask => answer,
        () = drive => unreachable!("waits for ever"),
    }
}

impl Target {
    fn url(&self) -> String {
        let scheme = match self.scheme {
            Scheme::Http => "http",
            Scheme::Https => "https",
        };
        format!("{scheme}://{}{}", join(&self.host, self.port), self.path)
    }

    /// Where a `Location` header leads from here.
    fn resolve(&self, location: &str) -> Option<Self> {
        let (scheme, rest) = if let Some(rest) = location.strip_prefix("http://") {
            (Scheme::Http, Some(rest))
        } else if let Some(rest) = location.strip_prefix("https://") {
            (Scheme::Https, Some(rest))
        } else if let Some(rest) = location.strip_prefix("//") {
            (self.scheme, Some(rest))
        } else if location.contains("://") {
            return None;
        } else {
            (self.scheme, None)
        };
        let Some(rest) = rest else {
            let path = match location.as_bytes().first() {
                Some(b'/') => location.to_owned(),
                Some(b'?') => format!("{}{location}", self.path.split('?').next().unwrap_or_default()),
                None | Some(b'#') => self.path.clone(),
                Some(_) => {
                    let here = self.path.split('?').next().unwrap_or_default();
                    let dir = here.rfind('/').map_or("/", |at| &here[..=at]);
                    format!("{dir}{location}")
                }
            };
            return Some(Self {
                path: escaped(&without_dots(&path)),
                ..self.clone()
            });
        };
        let at = rest.find(['/', '?', '#']).unwrap_or(rest.len());
        let (authority, path) = rest.split_at(at);
        let authority: http::uri::Authority = authority.parse().ok()?;
        Some(Self {
            scheme,
            host: authority.host().trim_matches(['[', ']']).to_owned(),
            port: authority.port_u16().unwrap_or(match scheme {
                Scheme::Http => 80,
                Scheme::Https => 443,
            }),
            path: escaped(path),
        })
    }
}

/// A path without `.` and `..` segments; the query stays.
fn without_dots(path: &str) -> String {
    let (path, query) = path.find('?').map_or((path, ""), |at| path.split_at(at));
    let mut out: Vec<&str> = Vec::new();
    let segments: Vec<&str> = path.split('/').skip(1).collect();
    for (index, segment) in segments.iter().enumerate() {
        let last = index + 1 == segments.len();
        match *segment {
            "." | ".." => {
                if *segment == ".." {
                    out.pop();
                }
                if last {
                    out.push("");
                }
            }
            other => out.push(other),
        }
    }
    format!("/{}{query}", out.join("/"))
}

/// Path and query as they may stand in a request line: a leading slash, no fragment, nothing that must be escaped.
fn escaped(text: &str) -> String {
    let bytes = text.as_bytes();
    let hex = |at: usize| bytes.get(at).is_some_and(u8::is_ascii_hexdigit);
    let well_formed = (0..bytes.len()).all(|i| bytes[i] != b'%' || (hex(i + 1) && hex(i + 2)));
    let mut out = String::with_capacity(text.len() + 1);
    let text = if well_formed {
        text.split('#').next().unwrap_or_default()
    } else {
        text
    };
    if !text.starts_with('/') {
        out.push('/');
    }
    for byte in text.bytes() {
        let plain = byte.is_ascii_alphanumeric() || b"-._~!$&'()*+,;=:@/".contains(&byte);
        // Text that is no URL is a path as it stands: then these two are letters like others.
        if plain || (well_formed && b"%?".contains(&byte)) {
            out.push(char::from(byte));
        } else {
            out.push_str(&format!("%{byte:02X}"));
        }
    }
    out
}

/// Whether a TLS handshake failed because the server answered in plain HTTP.
fn speaks_plain(error: &std::io::Error) -> bool {
    use rustls::{Error, InvalidMessage};
    let inner = error.get_ref().and_then(|e| e.downcast_ref::<Error>());
    matches!(
        inner,
        Some(Error::InvalidMessage(InvalidMessage::InvalidContentType))
    )
}

/// TLS settings that trust everyone: what a probe asks is whether somebody answers.
fn unverified() -> Result<Arc<ClientConfig>, rustls::Error> {
    static CONFIG: std::sync::OnceLock<Arc<ClientConfig>> = std::sync::OnceLock::new();
    if let Some(config) = CONFIG.get() {
        return Ok(Arc::clone(config));
    }
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let schemes = provider.signature_verification_algorithms.supported_schemes();
    let mut config = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(TrustsAnyone(schemes)))
        .with_no_client_auth();
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    Ok(Arc::clone(CONFIG.get_or_init(|| Arc::new(config))))
}

/// Accepts every certificate.
#[derive(Debug)]
struct TrustsAnyone(Vec<SignatureScheme>);

impl ServerCertVerifier for TrustsAnyone {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn verify_tls13_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.clone()
    }
}

#[cfg(test)]
#[path = "httpget_tests.rs"]
mod tests;
