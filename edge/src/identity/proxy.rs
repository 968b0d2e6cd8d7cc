//! HTTP proxies between the site and its provider.
//!
//! The daemon asks the proxy for a tunnel (`CONNECT`, RFC 9110 §9.3.6) and speaks TLS through it, end to end: the proxy sees names and
//! sizes, nothing else, and cannot pose as the provider, who is known by his SPIFFE ID.
//!
//! Which proxy: the setting `proxy`; else the variables `HTTPS_PROXY` (or `https_proxy`) and `NO_PROXY` (or `no_proxy`), with the
//! meaning that curl and Go programs give them.

use std::fmt;
use std::net::IpAddr;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use futures::FutureExt as _;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

/// Longest head of a proxy's answer.
const HEAD_BYTES: usize = 16 * 1024;

/// An HTTP proxy.
#[derive(Clone, PartialEq, Eq)]
pub struct Proxy {
    /// Where it listens.
    pub host: String,
    /// Its port.
    pub port: u16,
    /// Value of `Proxy-Authorization`.
    authorization: Option<String>,
}

impl fmt::Debug for Proxy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Without the credentials.
        write!(f, "{}:{}", self.host, self.port)
    }
}

/// Which connections go through a proxy.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ProxyRules {
    proxy: Option<Proxy>,
    /// Whether the environment named it: then this machine itself is always reached directly.
    environment: bool,
    /// Entries of NO_PROXY.
    direct: Vec<String>,
}

impl ProxyRules {
    /// The setting over the environment; `none` as setting: no proxy, whatever the environment says. The error names what is
    /// wrong.
    pub fn new(setting: Option<&str>, variable: impl Fn(&str) -> Option<String>) -> Result<Self, String> {
        let either = |name: &str| {
            let found = variable(name).or_else(|| variable(&name.to_ascii_lowercase()));
            found.filter(|value| !value.trim().is_empty())
        };
        match setting {
            Some("none") => Ok(Self::default()),
            Some(url) => Ok(Self {
                proxy: Some(Proxy::parse(url).map_err(|e| format!("proxy: {e}"))?),
                ..Self::default()
            }),
            None => {
                let proxy = either("HTTPS_PROXY")
                    .map(|url| Proxy::parse(&url).map_err(|e| format!("HTTPS_PROXY: {e}")));
                let direct = either("NO_PROXY").unwrap_or_default();
                Ok(Self {
                    proxy: proxy.transpose()?,
                    environment: true,
                    direct: direct
                        .split(',')
                        .map(|entry| entry.trim().to_ascii_lowercase())
                        .collect(),
                })
            }
        }
    }

    /// The proxy for a connection to there, if it goes through one.
    pub fn through(&self, host: &str, port: u16) -> Option<&Proxy> {
        let proxy = self.proxy.as_ref()?;
        let host = host
            .trim_matches(['[', ']'])
            .trim_end_matches('.')
            .to_ascii_lowercase();
        let local = host == "localhost" || host.parse::<IpAddr>().is_ok_and(|ip| ip.is_loopback());
        let direct = self.environment && local || self.direct.iter().any(|entry| excepts(entry, &host, port));
        (!direct).then_some(proxy)
    }
}

/// Whether an entry of NO_PROXY means this host.
fn excepts(entry: &str, host: &str, port: u16) -> bool {
    if entry == "*" {
        return true;
    }
    if let Some((network, bits)) = entry.split_once('/') {
        let (Ok(network), Ok(bits), Ok(ip)) = (network.parse(), bits.parse(), host.parse()) else {
            return false;
        };
        return contains(network, bits, ip);
    }
    if let (Ok(excepted), Ok(ip)) = (
        entry.trim_matches(['[', ']']).parse::<IpAddr>(),
        host.parse::<IpAddr>(),
    ) {
        return excepted == ip;
    }
    let (name, only) = match entry.rsplit_once(':') {
        Some((name, digits)) if !name.contains(':') || name.ends_with(']') => match digits.parse::<u16>() {
            Ok(only) => (name.trim_matches(['[', ']']), Some(only)),
            Err(_) => return false,
        },
        _ => (entry, None),
    };
    if name.is_empty() || only.is_some_and(|only| only != port) {
        return false;
    }
    // `example.org` means the host and everything below, `.example.org` and `*.example.org` only what is below.
    let (domain, itself) = match name.strip_prefix("*.").or_else(|| name.strip_prefix('.')) {
        Some(domain) => (domain, false),
        None => (name, true),
    };
    itself && host == domain || host.strip_suffix(domain).is_some_and(|rest| rest.ends_with('.'))
}

fn contains(network: IpAddr, bits: u32, ip: IpAddr) -> bool {
    match (network, ip) {
        (IpAddr::V4(network), IpAddr::V4(ip)) if bits <= 32 => {
            let mask = u32::MAX.checked_shl(32 - bits).unwrap_or(0);
            network.to_bits() & mask == ip.to_bits() & mask
        }
        (IpAddr::V6(network), IpAddr::V6(ip)) if bits <= 128 => {
            let mask = u128::MAX.checked_shl(128 - bits).unwrap_or(0);
            network.to_bits() & mask == ip.to_bits() & mask
        }
        _ => false,
    }
}

impl Proxy {
    /// Reads `[http://][USER:PASSWORD@]HOST[:PORT]`. The error does not repeat what may hold a password.
    fn parse(url: &str) -> Result<Self, String> {
        const USE: &str = "use http://[USER:PASSWORD@]HOST:PORT";
        let url = url.trim().trim_end_matches('/');
        let rest = match url.split_once("://") {
            None => url,
            Some((scheme, rest)) if scheme.eq_ignore_ascii_case("http") => rest,
            Some((scheme, _)) => {
                return Err(format!(
                    "proxies of the kind {scheme}:// are not supported; {USE}. TLS to the provider goes through it end to end"
                ));
            }
        };
        let (credentials, address) = match rest.rsplit_once('@') {
            Some((credentials, address)) => (Some(credentials), address),
            None => (None, rest),
        };
        let (host, port) = match address.rsplit_once(':') {
            Some((host, port)) if !host.contains(':') || host.ends_with(']') => (
                host,
                port.parse()
                    .map_err(|_| format!("its port is no number; {USE}"))?,
            ),
            _ => (address, 80),
        };
        let host = host.trim_matches(['[', ']']);
        if host.is_empty() || host.contains(['/', '?', '#', ' ']) {
            return Err(format!("it names no host; {USE}"));
        }
        let authorization = credentials
            .map(|credentials| {
                let plain = unescape(credentials)
                    .ok_or_else(|| format!("its user or password is escaped wrongly; {USE}"))?;
                Ok::<_, String>(format!("Basic {}", STANDARD.encode(plain)))
            })
            .transpose()?;
        Ok(Self {
            host: host.to_owned(),
            port,
            authorization,
        })
    }

    /// Asks for a tunnel to there on a connection to the proxy. The error is for a person.
    pub(super) async fn connect<S>(&self, stream: &mut S, host: &str, port: u16) -> Result<(), String>
    where
        S: AsyncRead + AsyncWrite + Unpin,
    {
        let target = format!("{host}:{port}");
        let authorization = match &self.authorization {
            Some(value) => format!("Proxy-Authorization: {value}\r\n"),
            None => String::new(),
        };
        let request = format!(
            "CONNECT {target} HTTP/1.1\r\nHost: {target}\r\nUser-Agent: skerry-edge/{}\r\n{authorization}\r\n",
            env!("CARGO_PKG_VERSION")
        );
        let failed = |e: std::io::Error| format!("the proxy {self:?} broke off: {e}");
        stream.write_all(request.as_bytes()).await.map_err(failed)?;
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            if head.len() >= HEAD_BYTES {
                return Err(format!("the proxy {self:?} answered at too great a length"));
            }
            // One at a time: what follows the head is the provider's.
            head.push(stream.read_u8().await.map_err(failed)?);
        }
        let line = String::from_utf8_lossy(&head);
        let line = line.lines().next().unwrap_or_default().trim();
        let status = line
            .strip_prefix("HTTP/1.")
            .and_then(|rest| rest.split(' ').nth(1)?.parse::<u16>().ok());
        match status {
            Some(200..=299) => Ok(()),
            Some(407) => Err(match self.authorization {
                Some(_) => format!("the proxy {self:?} refuses its user and password ({line})"),
                None => format!(
                    "the proxy {self:?} wants a user and a password ({line}): proxy = http://USER:PASSWORD@HOST:PORT"
                ),
            }),
            Some(_) => Err(format!("the proxy {self:?} does not connect to {target}: {line}")),
            None => Err(format!("{self:?} is no HTTP proxy")),
        }
    }
}

/// Hostile bytes as a proxy's answer, and as its URL.
pub(crate) fn any_answer(bytes: &[u8]) {
    let proxy = Proxy {
        host: "proxy".to_owned(),
        port: 3128,
        authorization: None,
    };
    let mut stream = tokio::io::join(bytes, tokio::io::sink());
    // All bytes are there: nothing has to be waited for.
    let _ = proxy.connect(&mut stream, "provider", 443).now_or_never();
    let _ = ProxyRules::new(Some(&String::from_utf8_lossy(bytes)), |_| None);
    if let Ok(rules) = ProxyRules::new(None, |name| {
        let value = if name == "NO_PROXY" { bytes } else { b"proxy:1" };
        Some(String::from_utf8_lossy(value).into_owned())
    }) {
        let _ = (rules.through("10.0.0.1", 443), rules.through("a.example", 443));
    }
}

/// Undoes percent-encoding.
fn unescape(text: &str) -> Option<Vec<u8>> {
    let mut bytes = text.bytes();
    let mut plain = Vec::new();
    while let Some(byte) = bytes.next() {
        plain.push(match byte {
            b'%' => {
                let digits = [bytes.next()?, bytes.next()?];
                u8::from_str_radix(std::str::from_utf8(&digits).ok()?, 16).ok()?
            }
            other => other,
        });
    }
    Some(plain)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rules(no_proxy: &str) -> ProxyRules {
        ProxyRules::new(None, |name| match name {
            "https_proxy" => Some("http://proxy.example:3128".to_owned()),
            "NO_PROXY" => Some(no_proxy.to_owned()),
            _ => None,
        })
        .unwrap()
    }

    #[test]
    fn a_proxy_is_read_with_its_credentials_and_never_prints_them() {
        let proxy = Proxy::parse("http://me:p%40ss@proxy.example:3128/").unwrap();
        assert_eq!((proxy.host.as_str(), proxy.port), ("proxy.example", 3128));
        assert_eq!(proxy.authorization.as_deref(), Some("Basic bWU6cEBzcw=="));
        assert_eq!(format!("{proxy:?}"), "proxy.example:3128");
        assert_eq!(Proxy::parse("proxy").unwrap().port, 80);
        assert_eq!(Proxy::parse("[::1]:8080").unwrap().host, "::1");
        for wrong in [
            "https://secret:secret@x:1",
            "socks5://x",
            "http://:1",
            "http://x:y",
            "a%4@x:1",
            "http://a/b:1",
        ] {
            let error = Proxy::parse(wrong).unwrap_err();
            assert!(
                error.contains("HOST:PORT") && !error.contains("secret"),
                "{error}"
            );
        }
    }

    #[test]
    fn exceptions_mean_what_they_mean_elsewhere() {
        let direct = |no_proxy: &str, host: &str| rules(no_proxy).through(host, 443).is_none();
        assert!(!direct("", "provider.example.org"));
        assert!(direct("*", "provider.example.org"));
        assert!(direct("other, Example.org", "provider.example.org"));
        assert!(direct("example.org", "example.org."));
        assert!(!direct(".example.org", "example.org"));
        assert!(direct(".example.org", "a.example.org"));
        assert!(direct("*.example.org", "a.example.org"));
        assert!(!direct("example.org", "anexample.org"));
        assert!(direct("example.org:443", "example.org"));
        assert!(!direct("example.org:444", "example.org"));
        assert!(direct("10.0.0.0/8", "10.1.2.3"));
        assert!(!direct("10.0.0.0/8", "11.1.2.3"));
        assert!(direct("0.0.0.0/0", "11.1.2.3"));
        assert!(direct("fd00::/8", "[fd12::1]"));
        assert!(direct("10.1.2.3", "10.1.2.3"));
        assert!(direct("x", "localhost") && direct("x", "127.0.0.1") && direct("x", "[::1]"));
    }

    #[test]
    fn the_setting_goes_over_the_environment() {
        let variable = |_: &str| Some("http://environment:1".to_owned());
        let named = ProxyRules::new(Some("http://setting:2"), variable).unwrap();
        assert_eq!(named.through("environment", 5).unwrap().host, "setting");
        assert_eq!(
            ProxyRules::new(Some("none"), variable).unwrap().through("x", 5),
            None
        );
        assert_eq!(ProxyRules::new(None, |_| None).unwrap().through("x", 5), None);
        assert!(
            ProxyRules::new(None, |_| Some("ftp://x".to_owned()))
                .unwrap_err()
                .contains("HTTPS_PROXY")
        );
    }

    #[tokio::test]
    async fn a_proxy_that_refuses_is_quoted_with_the_remedy() {
        for (answer, expected) in [
            (
                "HTTP/1.1 407 Proxy Authentication Required\r\n\r\n",
                "USER:PASSWORD",
            ),
            (
                "HTTP/1.1 403 Forbidden\r\nX: y\r\n\r\n",
                "does not connect to provider:10443: HTTP/1.1 403 Forbidden",
            ),
            ("SSH-2.0-x\r\n\r\n", "is no HTTP proxy"),
        ] {
            let (mut near, mut far) = tokio::io::duplex(4096);
            far.write_all(answer.as_bytes()).await.unwrap();
            let proxy = Proxy::parse("proxy:1").unwrap();
            let error = proxy.connect(&mut near, "provider", 10443).await.unwrap_err();
            assert!(error.contains(expected), "{error}");
        }
    }

    #[tokio::test]
    async fn what_follows_the_proxys_answer_is_left_for_tls() {
        let (mut near, mut far) = tokio::io::duplex(4096);
        far.write_all(b"HTTP/1.1 200 OK\r\nVia: x\r\n\r\nrest")
            .await
            .unwrap();
        let proxy = Proxy::parse("me:secret@proxy:1").unwrap();
        proxy.connect(&mut near, "fd00::1", 10443).await.unwrap();
        let mut rest = [0; 4];
        near.read_exact(&mut rest).await.unwrap();
        assert_eq!(&rest, b"rest");
        let mut asked = vec![0; 512];
        let count = far.read(&mut asked).await.unwrap();
        let asked = String::from_utf8_lossy(&asked[..count]);
        assert!(
            asked.contains("\r\nProxy-Authorization: Basic bWU6c2VjcmV0\r\n"),
            "{asked}"
        );
    }
}
