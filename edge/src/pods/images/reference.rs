//! Names of images, as the distribution project's reference grammar has them.

/// A name in the form that engines take: with `:latest` where it has neither tag nor digest. Fails with what is wrong
/// with it.
pub(super) fn tagged(image: &str) -> Result<String, String> {
    let wrong = |why: &str| format!("couldn't parse image name \"{image}\": invalid reference format{why}");
    let (name, digest) = match image.split_once('@') {
        Some((name, digest)) => (name, Some(digest)),
        None => (image, None),
    };
    let (repository, tag) = match name.rsplit_once(':') {
        Some((repository, tag)) if !tag.contains('/') => (repository, Some(tag)),
        _ => (name, None),
    };
    if digest.is_some_and(|d| !is_digest(d)) || tag.is_some_and(|t| !is_tag(t)) || repository.is_empty() {
        return Err(wrong(""));
    }
    let (host, path) = split_host(repository);
    if host.is_some_and(|h| !is_host(h)) {
        return Err(wrong(""));
    }
    if path.bytes().any(|b| b.is_ascii_uppercase()) {
        let full = normalised(repository);
        let shown = full.split_once('/').map_or(full.as_str(), |(_, path)| path);
        return Err(wrong(&format!(": repository name ({shown}) must be lowercase")));
    }
    if !path.split('/').all(is_component) {
        return Err(wrong(""));
    }
    if path.len() == 64 && host.is_none() && path.bytes().all(|b| b.is_ascii_hexdigit()) {
        return Err(format!(
            "couldn't parse image name \"{image}\": invalid repository name ({path}), cannot specify 64-byte \
             hexadecimal strings"
        ));
    }
    Ok(if tag.is_none() && digest.is_none() {
        format!("{image}:latest")
    } else {
        image.to_owned()
    })
}

/// The repository of an image with its registry, `docker.io/library/busybox` for `busybox:1`.
pub(super) fn normalised(image: &str) -> String {
    let name = image.split('@').next().unwrap_or(image);
    let name = match name.rsplit_once(':') {
        Some((repository, tag)) if !tag.contains('/') => repository,
        _ => name,
    };
    match split_host(name) {
        (None, path) if path.contains('/') => format!("docker.io/{path}"),
        (None, path) => format!("docker.io/library/{path}"),
        (Some("index.docker.io"), path) => format!("docker.io/{path}"),
        (Some(host), path) => format!("{host}/{path}"),
    }
}

/// The registry, where the first part of a name can be one.
fn split_host(repository: &str) -> (Option<&str>, &str) {
    match repository.split_once('/') {
        Some((host, path))
            if host.contains(['.', ':'])
                || host == "localhost"
                || host.bytes().any(|b| b.is_ascii_uppercase()) =>
        {
            (Some(host), path)
        }
        _ => (None, repository),
    }
}

fn is_host(host: &str) -> bool {
    let (name, port) = host.rsplit_once(':').unwrap_or((host, "0"));
    let name_fits = if name.starts_with('[') {
        name.ends_with(']')
    } else {
        name.split('.').all(|part| {
            !part.is_empty()
                && part.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-')
                && !part.starts_with('-')
                && !part.ends_with('-')
        })
    };
    name_fits && !port.is_empty() && port.bytes().all(|b| b.is_ascii_digit())
}

/// Letters and digits, with single `.`, one or two `_`, or any number of `-` between them.
fn is_component(component: &str) -> bool {
    let plain = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit();
    let bytes = component.as_bytes();
    if !(bytes.first().is_some_and(|b| plain(*b)) && bytes.last().is_some_and(|b| plain(*b))) {
        return false;
    }
    component
        .split(|c: char| c.is_ascii_lowercase() || c.is_ascii_digit())
        .all(|between| matches!(between, "" | "." | "_" | "__") || between.bytes().all(|b| b == b'-'))
}

fn is_tag(tag: &str) -> bool {
    let word = |b: u8| b.is_ascii_alphanumeric() || b == b'_';
    tag.len() <= 128
        && tag.bytes().next().is_some_and(word)
        && tag.bytes().all(|b| word(b) || matches!(b, b'.' | b'-'))
}

fn is_digest(digest: &str) -> bool {
    let Some((algorithm, hex)) = digest.split_once(':') else {
        return false;
    };
    algorithm.bytes().next().is_some_and(|b| b.is_ascii_alphabetic())
        && algorithm
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || matches!(b, b'+' | b'.' | b'-' | b'_'))
        && hex.len() >= 32
        && hex.bytes().all(|b| b.is_ascii_hexdigit())
        && (algorithm != "sha256" || hex.len() == 64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_without_tag_and_digest_means_the_latest() {
        for (image, wanted) in [
            ("busybox", "busybox:latest"),
            ("h:5000/a/b", "h:5000/a/b:latest"),
            ("busybox:1.36", "busybox:1.36"),
            ("localhost/a__b.c-d:V1", "localhost/a__b.c-d:V1"),
        ] {
            assert_eq!(tagged(image).unwrap(), wanted);
        }
        let digest = format!("a@sha256:{}", "0".repeat(64));
        assert_eq!(tagged(&digest).unwrap(), digest);
    }

    #[test]
    fn a_name_that_is_none_is_refused_with_the_reason() {
        for image in [
            "",
            "a b",
            "a:",
            "-a",
            "a//b",
            "a@sha256:00",
            "a:b:c",
            "h:x/a",
            "a..b",
            "a/",
            ":1",
        ] {
            assert!(
                tagged(image).unwrap_err().contains("invalid reference format"),
                "{image}"
            );
        }
        assert_eq!(
            tagged("INVALID_IMAGE").unwrap_err(),
            "couldn't parse image name \"INVALID_IMAGE\": invalid reference format: repository name \
             (library/INVALID_IMAGE) must be lowercase"
        );
        assert!(
            tagged(&"a".repeat(64))
                .unwrap_err()
                .contains("cannot specify 64-byte")
        );
    }
}
