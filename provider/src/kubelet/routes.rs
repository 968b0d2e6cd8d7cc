//! Reads paths and queries as a kubelet does.

use http::{HeaderMap, Method, StatusCode, Uri, header};
use skerry_proto::SiteName;
use skerry_proto::link::{Header, LogsTarget, StreamTarget, stream_target::Verb};

use super::PodLocation;

/// Most words of a command, and bytes of a query.
const MAX_COMMAND_WORDS: usize = 4096;

/// A refusal: status and text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Refusal {
    pub(super) status: StatusCode,
    pub(super) text: String,
}

impl Refusal {
    pub(super) fn new(status: StatusCode, text: impl Into<String>) -> Self {
        Self {
            status,
            text: text.into(),
        }
    }
}

/// A path of the kubelet API.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Route {
    /// `/healthz` and below.
    Health,
    /// `/containerLogs/{namespace}/{pod}/{container}`.
    Logs(PodPath),
    /// `/exec`, `/attach` or `/portForward`.
    Stream(Verb, PodPath),
    /// `/run/{namespace}/{pod}[/{uid}]/{container}`.
    Run(PodPath),
    /// `/checkpoint/{namespace}/{pod}/{container}`.
    Checkpoint(PodPath),
    /// Something about the node as a whole.
    Node(NodePath),
    /// Anything else.
    Unknown,
}

/// A path that names no pod.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum NodePath {
    /// `/pods`.
    Pods,
    /// `/runningpods/`.
    RunningPods,
    /// `/stats/summary`.
    StatsSummary,
    /// `/metrics`.
    Metrics,
    /// `/metrics/resource`.
    MetricsResource,
    /// `/metrics/cadvisor`.
    MetricsCadvisor,
    /// `/metrics/probes`.
    MetricsProbes,
    /// `/metrics/slis`.
    MetricsSlis,
    /// `/configz`.
    Configz,
    /// `/logs/` and below.
    Logs,
}

/// Splits `/nodes/{name}/...` into the node and the path that is meant; any other path is its own.
pub(super) fn split_node(path: &str) -> (Option<SiteName>, &str) {
    let split = || {
        let rest = path.strip_prefix("/nodes/")?;
        let end = rest.find('/')?;
        Some((rest[..end].parse().ok()?, &rest[end..]))
    };
    match split() {
        Some((node, rest)) => (Some(node), rest),
        None => (None, path),
    }
}

/// What a pod path names. `uid` and `container` are empty where the path has none.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct PodPath {
    pub(super) namespace: String,
    pub(super) pod: String,
    pub(super) uid: String,
    pub(super) container: String,
}

impl PodPath {
    fn new(namespace: &str, pod: &str, uid: &str, container: &str) -> Self {
        Self {
            namespace: namespace.to_owned(),
            pod: pod.to_owned(),
            uid: uid.to_owned(),
            container: container.to_owned(),
        }
    }
}

impl Route {
    /// Reads a path.
    pub(super) fn parse(path: &str) -> Self {
        // Names of Kubernetes objects need no escaping, so none is undone.
        let segments: Vec<&str> = path.trim_start_matches('/').split('/').collect();
        match segments.as_slice() {
            ["runningpods"] | ["runningpods", ""] => return Self::Node(NodePath::RunningPods),
            ["logs", ..] => return Self::Node(NodePath::Logs),
            _ => {}
        }
        if segments.iter().skip(1).any(|segment| segment.is_empty()) {
            return Self::Unknown;
        }
        match segments.as_slice() {
            ["healthz"] | ["healthz", "ping" | "log" | "syncloop"] => Self::Health,
            ["pods"] => Self::Node(NodePath::Pods),
            ["stats"] | ["stats", "summary"] => Self::Node(NodePath::StatsSummary),
            ["metrics"] => Self::Node(NodePath::Metrics),
            ["metrics", "resource"] => Self::Node(NodePath::MetricsResource),
            ["metrics", "cadvisor"] => Self::Node(NodePath::MetricsCadvisor),
            ["metrics", "probes"] => Self::Node(NodePath::MetricsProbes),
            ["metrics", "slis"] => Self::Node(NodePath::MetricsSlis),
            ["configz"] => Self::Node(NodePath::Configz),
            ["run", namespace, pod, container] => Self::Run(PodPath::new(namespace, pod, "", container)),
            ["run", namespace, pod, uid, container] => {
                Self::Run(PodPath::new(namespace, pod, uid, container))
            }
            ["checkpoint", namespace, pod, container] => {
                Self::Checkpoint(PodPath::new(namespace, pod, "", container))
            }
            ["containerLogs", namespace, pod, container] => {
                Self::Logs(PodPath::new(namespace, pod, "", container))
            }
            [verb @ ("exec" | "attach"), namespace, pod, container] => {
                Self::Stream(streamed(verb), PodPath::new(namespace, pod, "", container))
            }
            [verb @ ("exec" | "attach"), namespace, pod, uid, container] => {
                Self::Stream(streamed(verb), PodPath::new(namespace, pod, uid, container))
            }
            ["portForward", namespace, pod] => {
                Self::Stream(Verb::PortForward, PodPath::new(namespace, pod, "", ""))
            }
            ["portForward", namespace, pod, uid] => {
                Self::Stream(Verb::PortForward, PodPath::new(namespace, pod, uid, ""))
            }
            _ => Self::Unknown,
        }
    }

    /// The pod that the path names.
    pub(super) fn pod(&self) -> Option<&PodPath> {
        match self {
            Self::Logs(path) | Self::Stream(_, path) | Self::Run(path) | Self::Checkpoint(path) => Some(path),
            Self::Health | Self::Node(_) | Self::Unknown => None,
        }
    }
}

fn streamed(segment: &str) -> Verb {
    if segment == "exec" {
        Verb::Exec
    } else {
        Verb::Attach
    }
}

/// The pod, when it is the one that the path means.
pub(super) fn check_pod(
    path: &PodPath,
    location: Option<PodLocation>,
    logs: bool,
) -> Result<PodLocation, Refusal> {
    let absent = || match logs {
        true => Refusal::new(
            StatusCode::NOT_FOUND,
            format!("pod {:?} does not exist\n", path.pod),
        ),
        false => Refusal::new(StatusCode::NOT_FOUND, "pod does not exist\n"),
    };
    let location = location
        .filter(|location| path.uid.is_empty() || location.uid.as_str() == path.uid)
        .ok_or_else(absent)?;
    if !path.container.is_empty() && !location.containers.contains(&path.container) {
        let text = format!("container {:?} not found in pod {:?}\n", path.container, path.pod);
        return Err(Refusal::new(StatusCode::NOT_FOUND, text));
    }
    Ok(location)
}

/// The query's pairs, decoded.
fn pairs(uri: &Uri) -> Vec<(String, String)> {
    let query = uri.query().unwrap_or_default();
    form_urlencoded::parse(query.as_bytes()).into_owned().collect()
}

/// Reads the query of a log request. 400: cannot be read; 422: makes no sense.
pub(super) fn logs(uri: &Uri, path: &PodPath) -> Result<LogsTarget, Refusal> {
    let pairs = pairs(uri);
    let get = |name: &str| {
        pairs
            .iter()
            .find(|(key, _)| key == name)
            .map(|(_, value)| value.as_str())
    };
    let flag =
        |name: &str| get(name).is_some_and(|value| value != "0" && !value.eq_ignore_ascii_case("false"));
    let number = |name: &str| match get(name).filter(|value| !value.is_empty()) {
        None => Ok(None),
        Some(value) => value.parse::<i64>().map(Some).map_err(|_| {
            Refusal::new(
                StatusCode::BAD_REQUEST,
                format!("Unable to decode query: {name}={value:?} is not a number.\n"),
            )
        }),
    };
    let tail = match get("tail").filter(|tail| !tail.is_empty()) {
        Some("all") => None,
        Some(_) => number("tail")?,
        None => number("tailLines")?,
    };
    let since_time = match get("sinceTime").filter(|time| !time.is_empty()) {
        Some(time) if time.parse::<jiff::Timestamp>().is_err() => {
            let text = format!("Unable to decode query: sinceTime={time:?} is not an RFC 3339 time.\n");
            return Err(Refusal::new(StatusCode::BAD_REQUEST, text));
        }
        time => time.map(str::to_owned),
    };
    let target = LogsTarget {
        namespace: path.namespace.clone(),
        pod: path.pod.clone(),
        container: path.container.clone(),
        follow: flag("follow"),
        previous: flag("previous"),
        timestamps: flag("timestamps"),
        tail_lines: tail,
        since_seconds: number("sinceSeconds")?,
        since_time,
        limit_bytes: number("limitBytes")?,
    };
    validate(target)
}

fn validate(target: LogsTarget) -> Result<LogsTarget, Refusal> {
    let problem = if target.tail_lines.is_some_and(|lines| lines < 0) {
        "tailLines must be greater than or equal to 0"
    } else if target.limit_bytes.is_some_and(|bytes| bytes < 1) {
        "limitBytes must be greater than 0"
    } else if target.since_seconds.is_some_and(|seconds| seconds < 1) {
        "sinceSeconds must be greater than 0"
    } else if target.since_seconds.is_some() && target.since_time.is_some() {
        "at most one of sinceTime or sinceSeconds may be specified"
    } else {
        return Ok(target);
    };
    Err(Refusal::new(
        StatusCode::UNPROCESSABLE_ENTITY,
        format!("Invalid request: {problem}.\n"),
    ))
}

/// Reads an exec, attach or port-forward request, its upgrade included.
pub(super) fn stream(
    verb: Verb,
    path: &PodPath,
    method: &Method,
    uri: &Uri,
    headers: &HeaderMap,
) -> Result<StreamTarget, Refusal> {
    let bad = |text: &str| Refusal::new(StatusCode::BAD_REQUEST, format!("{text}\n"));
    let pairs = pairs(uri);
    let all = |name: &'static str| {
        pairs
            .iter()
            .filter(move |(key, _)| key == name)
            .map(|(_, value)| value)
    };
    let flag = |name: &'static str| {
        all(name)
            .next()
            .is_some_and(|value| value == "1" || value == "true")
    };
    let tty = flag("tty");
    let (stdin, stdout, stderr) = (flag("input"), flag("output"), flag("error") && !tty);
    if verb != Verb::PortForward && !(stdin || stdout || stderr) {
        return Err(bad("you must specify at least 1 of stdin, stdout, stderr"));
    }
    let command: Vec<String> = all("command").cloned().collect();
    if verb == Verb::Exec && command.is_empty() {
        return Err(bad("you must specify a command"));
    }
    if command.len() > MAX_COMMAND_WORDS {
        return Err(bad("the command has too many words"));
    }
    let mut ports = Vec::new();
    for port in all("port").flat_map(|ports| ports.split(',')) {
        let port: u16 = port
            .trim()
            .parse()
            .map_err(|_| bad(&format!("port {port:?} is not a port number")))?;
        ports.push(i32::from(port));
    }
    if !is_upgrade(headers) {
        return Err(bad("Upgrade request required"));
    }
    Ok(StreamTarget {
        verb: verb.into(),
        namespace: path.namespace.clone(),
        pod: path.pod.clone(),
        uid: path.uid.clone(),
        container: path.container.clone(),
        command,
        stdin,
        stdout,
        stderr,
        tty,
        ports,
        method: method.to_string(),
        headers: passed_on(headers),
    })
}

fn is_upgrade(headers: &HeaderMap) -> bool {
    let connection = headers
        .get_all(header::CONNECTION)
        .iter()
        .filter_map(|value| value.to_str().ok());
    let mut tokens = connection.flat_map(|value| value.split(','));
    headers.contains_key(header::UPGRADE) && tokens.any(|token| token.trim().eq_ignore_ascii_case("upgrade"))
}

/// The headers that the site needs: those of the upgrade. Credentials and what proxies added stay here.
fn passed_on(headers: &HeaderMap) -> Vec<Header> {
    let needed = |name: &str| {
        matches!(
            name,
            "connection" | "upgrade" | "x-stream-protocol-version" | "origin" | "user-agent"
        ) || name.starts_with("sec-websocket-")
    };
    headers
        .iter()
        .filter(|(name, _)| needed(name.as_str()))
        .map(|(name, value)| Header {
            name: name.as_str().to_owned(),
            value: bytes::Bytes::copy_from_slice(value.as_bytes()),
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn upgrade() -> HeaderMap {
        HeaderMap::from_iter([
            (header::CONNECTION, "keep-alive, Upgrade".parse().unwrap()),
            (header::UPGRADE, "SPDY/3.1".parse().unwrap()),
            (header::AUTHORIZATION, "Bearer secret".parse().unwrap()),
        ])
    }

    fn path() -> PodPath {
        PodPath::new("ns", "p", "", "c")
    }

    fn logs_of(query: &str) -> Result<LogsTarget, Refusal> {
        logs(
            &format!("/containerLogs/ns/p/c?{query}").parse().unwrap(),
            &path(),
        )
    }

    fn exec(query: &str, headers: &HeaderMap) -> Result<StreamTarget, Refusal> {
        let uri = format!("/exec/ns/p/c?{query}").parse().unwrap();
        stream(Verb::Exec, &path(), &Method::POST, &uri, headers)
    }

    #[test]
    fn paths_are_those_of_a_kubelet() {
        let with_uid = PodPath::new("ns", "p", "u", "c");
        for (text, route) in [
            ("/healthz", Route::Health),
            ("/healthz/syncloop", Route::Health),
            ("/containerLogs/ns/p/c", Route::Logs(path())),
            ("/exec/ns/p/c", Route::Stream(Verb::Exec, path())),
            ("/exec/ns/p/u/c", Route::Stream(Verb::Exec, with_uid.clone())),
            ("/attach/ns/p/u/c", Route::Stream(Verb::Attach, with_uid)),
            (
                "/portForward/ns/p",
                Route::Stream(Verb::PortForward, PodPath::new("ns", "p", "", "")),
            ),
            (
                "/portForward/ns/p/u",
                Route::Stream(Verb::PortForward, PodPath::new("ns", "p", "u", "")),
            ),
            ("/containerLogs/ns/p", Route::Unknown),
            ("/containerLogs/ns//c", Route::Unknown),
            ("/healthz/other", Route::Unknown),
            ("/pods", Route::Node(NodePath::Pods)),
            ("/runningpods/", Route::Node(NodePath::RunningPods)),
            ("/stats/summary", Route::Node(NodePath::StatsSummary)),
            ("/metrics/resource", Route::Node(NodePath::MetricsResource)),
            ("/logs/", Route::Node(NodePath::Logs)),
            ("/run/ns/p/c", Route::Run(path())),
            ("/checkpoint/ns/p/c", Route::Checkpoint(path())),
            ("/metrics/other", Route::Unknown),
            ("/", Route::Unknown),
        ] {
            assert_eq!(Route::parse(text), route, "{text}");
        }
    }

    #[test]
    fn a_path_may_name_its_node() {
        let harbour = Some("harbour".parse().unwrap());
        assert_eq!(
            split_node("/nodes/harbour/metrics/resource"),
            (harbour, "/metrics/resource")
        );
        for path in ["/metrics/resource", "/nodes/harbour", "/nodes/No_Name/pods", "/"] {
            assert_eq!(split_node(path), (None, path));
        }
    }

    #[test]
    fn every_log_option_is_read() {
        let target =
            logs_of("follow=true&previous=true&timestamps=true&sinceSeconds=5&tailLines=7&limitBytes=9")
                .unwrap();
        assert!(target.follow && target.previous && target.timestamps);
        assert_eq!(
            (target.since_seconds, target.tail_lines, target.limit_bytes),
            (Some(5), Some(7), Some(9))
        );
        let target = logs_of("sinceTime=2026-01-01T00%3A00%3A00Z&follow=false&tail=all").unwrap();
        assert_eq!(target.since_time.as_deref(), Some("2026-01-01T00:00:00Z"));
        assert!(!target.follow && target.tail_lines.is_none());
        assert_eq!(logs_of("tail=3").unwrap().tail_lines, Some(3));
    }

    #[test]
    fn bad_log_options_are_400_and_senseless_ones_422() {
        for (query, status) in [
            ("tailLines=x", 400),
            ("sinceTime=yesterday", 400),
            ("tailLines=-1", 422),
            ("limitBytes=0", 422),
            ("sinceSeconds=0", 422),
            ("sinceSeconds=1&sinceTime=2026-01-01T00:00:00Z", 422),
        ] {
            assert_eq!(logs_of(query).unwrap_err().status.as_u16(), status, "{query}");
        }
    }

    #[test]
    fn an_exec_keeps_its_command_and_upgrade_and_loses_credentials() {
        let target = exec(
            "command=sh&command=-c&command=a+b%26&input=1&output=1&error=1&tty=1",
            &upgrade(),
        )
        .unwrap();
        assert_eq!(target.command, ["sh", "-c", "a b&"]);
        assert!(target.stdin && target.stdout && target.tty && !target.stderr);
        let names: Vec<_> = target.headers.iter().map(|header| header.name.as_str()).collect();
        assert_eq!(names, ["connection", "upgrade"]);
    }

    #[test]
    fn an_exec_without_streams_command_or_upgrade_is_refused() {
        for (query, headers) in [
            ("command=sh", upgrade()),
            ("output=1", upgrade()),
            ("command=sh&output=1", HeaderMap::new()),
        ] {
            assert_eq!(
                exec(query, &headers).unwrap_err().status,
                StatusCode::BAD_REQUEST,
                "{query}"
            );
        }
    }

    #[test]
    fn the_pod_must_be_the_one_that_is_meant() {
        let location = || {
            Some(PodLocation {
                site: "harbour".parse().unwrap(),
                uid: "u".into(),
                containers: vec!["c".into()],
            })
        };
        assert!(check_pod(&PodPath::new("ns", "p", "u", "c"), location(), false).is_ok());
        assert!(check_pod(&PodPath::new("ns", "p", "other", "c"), location(), false).is_err());
        assert!(check_pod(&PodPath::new("ns", "p", "", "x"), location(), true).is_err());
        let absent = check_pod(&path(), None, true).unwrap_err();
        assert_eq!(
            absent,
            Refusal::new(StatusCode::NOT_FOUND, "pod \"p\" does not exist\n")
        );
    }
}
