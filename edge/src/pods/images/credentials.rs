//! Registry credentials in pull secrets, and which of them fit an image.

use std::collections::HashMap;

use base64::Engine;
use k8s_openapi::api::core::v1::Secret;
use serde::Deserialize;
use skerry_proto::object::ContentHash;

use super::access::Source;
use super::reference;
use crate::runtime::RegistryAuth;

/// Credentials that fit an image, and the Secret that they come from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Credential {
    /// What the registry is told.
    pub(crate) auth: RegistryAuth,
    /// Where it comes from.
    pub(crate) source: Source,
}

#[derive(Deserialize, Default)]
struct DockerAuth {
    #[serde(default)]
    username: String,
    #[serde(default)]
    password: String,
    #[serde(default)]
    auth: String,
    #[serde(default, rename = "identitytoken")]
    identity_token: String,
}

#[derive(Deserialize)]
struct DockerConfig {
    auths: HashMap<String, DockerAuth>,
}

/// The credentials in pull secrets that match an image, longest match first.
pub(crate) fn credentials(image: &str, secrets: &[Secret]) -> Vec<Credential> {
    let repository = reference::normalised(image);
    let mut found = Vec::new();
    for secret in secrets {
        let Some(data) = &secret.data else { continue };
        let auths = if let Some(json) = data.get(".dockerconfigjson") {
            serde_json::from_slice::<DockerConfig>(&json.0).map(|c| c.auths)
        } else if let Some(json) = data.get(".dockercfg") {
            serde_json::from_slice::<HashMap<String, DockerAuth>>(&json.0)
        } else {
            continue;
        };
        let auths = auths.unwrap_or_else(|error| {
            let name = secret.metadata.name.as_deref().unwrap_or_default();
            tracing::warn!(secret = name, %error, "a pull secret is not JSON");
            HashMap::new()
        });
        for (registry, auth) in auths {
            if let Some(length) = matches(&repository, &registry) {
                let auth = decode_auth(auth);
                let source = source(secret, &auth);
                found.push((length, registry, Credential { auth, source }));
            }
        }
    }
    // By name where the length is the same, so that the order does not depend on a map's.
    found.sort_by(|a, b| b.0.cmp(&a.0).then_with(|| a.1.cmp(&b.1)));
    found.into_iter().map(|(_, _, credential)| credential).collect()
}

fn source(secret: &Secret, auth: &RegistryAuth) -> Source {
    let text = serde_json::json!([auth.username, auth.password, auth.identity_token]).to_string();
    let hash = ContentHash::of_bytes(text.as_bytes());
    Source {
        uid: secret.metadata.uid.clone().unwrap_or_default(),
        namespace: secret.metadata.namespace.clone().unwrap_or_default(),
        name: secret.metadata.name.clone().unwrap_or_default(),
        hash: hash.0.iter().map(|b| format!("{b:02x}")).collect(),
    }
}

fn decode_auth(auth: DockerAuth) -> RegistryAuth {
    let pair = base64::engine::general_purpose::STANDARD
        .decode(auth.auth.trim())
        .ok()
        .and_then(|bytes| String::from_utf8(bytes).ok())
        .and_then(|text| text.split_once(':').map(|(u, p)| (u.to_owned(), p.to_owned())));
    let (username, password) = match pair {
        Some(pair) if auth.username.is_empty() => pair,
        _ => (auth.username, auth.password),
    };
    RegistryAuth {
        username,
        password,
        identity_token: auth.identity_token,
    }
}

/// Length of the match of a credential's registry on a repository.
///
/// The host must match part by part, `*` and `?` standing for what is inside one part; the port as it is; and the
/// path must begin the repository's.
fn matches(repository: &str, registry: &str) -> Option<usize> {
    let bare = registry
        .trim_start_matches("https://")
        .trim_start_matches("http://");
    let (host, path) = bare.split_once('/').unwrap_or((bare, ""));
    // What old clients wrote for "the whole registry".
    let path = match path {
        "v1" | "v2" | "v1/" | "v2/" => "",
        path => path
            .strip_prefix("v1/")
            .or_else(|| path.strip_prefix("v2/"))
            .unwrap_or(path),
    };
    let path = path.trim_end_matches('/');
    let host = if host == "index.docker.io" {
        "docker.io"
    } else {
        host
    };
    let (own_host, own_path) = repository.split_once('/')?;
    let (own_name, own_port) = own_host.split_once(':').unwrap_or((own_host, ""));
    let (name, port) = host.split_once(':').unwrap_or((host, ""));
    let (parts, own_parts): (Vec<_>, Vec<_>) = (name.split('.').collect(), own_name.split('.').collect());
    let fits = port == own_port
        && parts.len() == own_parts.len()
        && parts
            .iter()
            .zip(&own_parts)
            .all(|(pattern, part)| glob(pattern.as_bytes(), part.as_bytes()))
        && own_path.starts_with(path);
    fits.then_some(host.len() + path.len())
}

fn glob(pattern: &[u8], text: &[u8]) -> bool {
    match (pattern.first(), text.first()) {
        (None, None) => true,
        (Some(b'*'), _) => glob(&pattern[1..], text) || (!text.is_empty() && glob(pattern, &text[1..])),
        (Some(b'?'), Some(_)) => glob(&pattern[1..], &text[1..]),
        (Some(p), Some(t)) => p == t && glob(&pattern[1..], &text[1..]),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn encoded(text: &str) -> String {
        base64::engine::general_purpose::STANDARD.encode(text)
    }

    #[test]
    fn the_longest_matching_credential_comes_first() {
        let config = json!({"auths": {
            "r.example": {"username": "short", "password": "p"},
            "r.example/team": {"auth": encoded("long:a:b")},
            "other.example": {"username": "x", "password": "y"}}});
        let secret: Secret = serde_json::from_value(json!({"metadata": {"name": "s", "uid": "u"},
            "data": {".dockerconfigjson": encoded(&config.to_string())}}))
        .unwrap();
        let found = credentials("r.example/team/app:1", &[secret]);
        let names: Vec<_> = found
            .iter()
            .map(|c| (c.auth.username.as_str(), c.auth.password.as_str()))
            .collect();
        assert_eq!(names, [("long", "a:b"), ("short", "p")]);
        assert_eq!(found[0].source.name, "s");
        assert_ne!(found[0].source.hash, found[1].source.hash);
    }

    #[test]
    fn the_old_format_is_read_as_well() {
        let config = json!({"https://r.example/v1/": {"username": "u", "password": "p"}});
        let secret: Secret =
            serde_json::from_value(json!({"data": {".dockercfg": encoded(&config.to_string())}})).unwrap();
        assert_eq!(credentials("r.example/app", &[secret])[0].auth.username, "u");
    }

    #[test]
    fn a_credential_of_a_similar_host_does_not_match() {
        for (repository, registry) in [
            ("r.example.evil/app", "r.example"),
            ("a.b.r.example/app", "*.r.example"),
            ("r.example:5000/app", "r.example"),
            ("r.example/other", "r.example/team"),
            ("evil/app", "*"),
        ] {
            assert_eq!(
                matches(&reference::normalised(repository), registry),
                None,
                "{registry}"
            );
        }
        for (repository, registry) in [
            ("a.r.example/app", "*.r.example"),
            ("busybox", "https://index.docker.io/v1/"),
            ("team/app", "docker.io/team"),
            ("r.example:5000/app", "https://r.example:5000"),
            ("eu-1.r.example/app", "eu-?.r.example"),
        ] {
            assert!(
                matches(&reference::normalised(repository), registry).is_some(),
                "{registry}"
            );
        }
    }
}
