//! The identity on disk.

use std::fs;
use std::io::Write;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use jiff::Timestamp;
use rustls::pki_types::CertificateDer;
use serde::{Deserialize, Serialize};
use skerry_proto::{SiteName, SpiffeId};
use x509_parser::prelude::{FromDer, X509Certificate};

use super::{Identity, IdentityError};

const FACTS: &str = "identity.json";
const SECRETS: &str = "identity.pem";
const ROOTS: &str = "roots.pem";
/// Written and removed before joining.
const PROBE: &str = "probe";
const PROBE_BYTES: usize = 16 * 1024;

/// What is not in the certificates.
#[derive(Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Facts {
    site: SiteName,
    trust_domain: String,
    provider: String,
}

/// What is to be written.
pub(super) struct Material<'a> {
    pub(super) site: &'a SiteName,
    pub(super) trust_domain: &'a str,
    pub(super) provider: &'a str,
    pub(super) key_pem: &'a str,
    pub(super) chain: &'a [Vec<u8>],
    pub(super) roots: &'a [Vec<u8>],
}

pub(super) fn dir(data_dir: &Path) -> PathBuf {
    data_dir.join("identity")
}

pub(super) fn load(data_dir: &Path) -> Result<Identity, IdentityError> {
    let dir = dir(data_dir);
    let facts_file = dir.join(FACTS);
    let facts = match fs::read(&facts_file) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            return Err(IdentityError::NotJoined(facts_file));
        }
        Err(source) => {
            return Err(IdentityError::Io {
                file: facts_file,
                source,
            });
        }
    };
    let (secrets_file, roots_file) = (dir.join(SECRETS), dir.join(ROOTS));
    let secrets = read(&secrets_file)?;
    closed(&secrets_file)?;
    let roots = read(&roots_file)?;
    assemble(&dir, &facts, &secrets, &roots)
}

/// The identity that the content of the three files in `dir` makes.
fn assemble(dir: &Path, facts: &[u8], secrets: &[u8], roots: &[u8]) -> Result<Identity, IdentityError> {
    let (facts_file, secrets_file, roots_file) = (dir.join(FACTS), dir.join(SECRETS), dir.join(ROOTS));
    let facts: Facts = serde_json::from_slice(facts).map_err(|e| damaged(&facts_file, e))?;
    let chain = certificates(&secrets_file, secrets)?;
    let key = rustls_pemfile::private_key(&mut &*secrets)
        .map_err(|e| damaged(&secrets_file, e))?
        .ok_or_else(|| damaged(&secrets_file, "no private key in it"))?;
    let roots = certificates(&roots_file, roots)?;
    let trust_domain = facts.trust_domain.parse().map_err(|e| damaged(&facts_file, e))?;
    let leaf = chain
        .first()
        .ok_or_else(|| damaged(&secrets_file, "no certificate in it"))?;
    let (not_before, not_after) = validity(leaf).map_err(|e| damaged(&secrets_file, e))?;
    let identity = Identity {
        site: facts.site,
        trust_domain,
        provider: facts.provider,
        key,
        roots,
        not_before,
        not_after,
        chain,
    };
    // The certificate is not compared with the claimed site here: the provider does that, and a cloned or edited
    // directory must show itself there.
    SpiffeId::from_certificate_der(&identity.chain[0]).map_err(|e| damaged(&secrets_file, e))?;
    rustls::crypto::ring::sign::any_supported_type(&identity.key).map_err(|e| damaged(&secrets_file, e))?;
    Ok(identity)
}

/// Hostile bytes as the three files.
pub(crate) fn any_files(facts: &[u8], secrets: &[u8], roots: &[u8]) {
    let _ = assemble(Path::new("/d"), facts, secrets, roots);
}

/// Makes the directory and proves that files can be written there, so that a token is not spent in vain.
pub(super) fn prepare(data_dir: &Path) -> Result<PathBuf, IdentityError> {
    let dir = dir(data_dir);
    let io = |source| IdentityError::Io {
        file: dir.clone(),
        source,
    };
    fs::create_dir_all(&dir).map_err(io)?;
    fs::set_permissions(&dir, fs::Permissions::from_mode(0o700)).map_err(io)?;
    let probe = dir.join(PROBE);
    // As large as all that will be written: a full disk shows itself now.
    write(&probe, &[0; PROBE_BYTES])?;
    fs::remove_file(&probe).map_err(io)?;
    Ok(dir)
}

/// Writes everything, each file atomically; the facts last, since they say that the site has joined.
pub(super) fn save(data_dir: &Path, material: &Material<'_>) -> Result<(), IdentityError> {
    let dir = prepare(data_dir)?;
    let secrets = format!("{}{}", material.key_pem, pem_of(material.chain));
    write(&dir.join(ROOTS), pem_of(material.roots).as_bytes())?;
    write(&dir.join(SECRETS), secrets.as_bytes())?;
    let facts = Facts {
        site: material.site.clone(),
        trust_domain: material.trust_domain.to_owned(),
        provider: material.provider.to_owned(),
    };
    let facts = serde_json::to_vec_pretty(&facts).map_err(|e| damaged(&dir.join(FACTS), e))?;
    write(&dir.join(FACTS), &facts)
}

fn write(file: &Path, content: &[u8]) -> Result<(), IdentityError> {
    let io = |source| IdentityError::Io {
        file: file.to_owned(),
        source,
    };
    let next = file.with_extension("new");
    // A file left by an interrupted attempt would keep its own permissions.
    match fs::remove_file(&next) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(io(error)),
        _ => {}
    }
    let mut out = fs::OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(&next)
        .map_err(io)?;
    out.write_all(content).and_then(|()| out.sync_all()).map_err(io)?;
    fs::rename(&next, file).map_err(io)?;
    // The rename is on disk only when its directory is.
    let parent = file.parent().unwrap_or(Path::new("."));
    fs::File::open(parent).and_then(|dir| dir.sync_all()).map_err(io)
}

/// The private key's file must be its owner's alone.
fn closed(file: &Path) -> Result<(), IdentityError> {
    let metadata = fs::metadata(file).map_err(|source| IdentityError::Io {
        file: file.to_owned(),
        source,
    })?;
    let mode = metadata.permissions().mode() & 0o777;
    if mode & 0o077 == 0 {
        return Ok(());
    }
    Err(IdentityError::Exposed {
        file: file.to_owned(),
        mode,
    })
}

fn read(file: &Path) -> Result<Vec<u8>, IdentityError> {
    fs::read(file).map_err(|source| IdentityError::Io {
        file: file.to_owned(),
        source,
    })
}

fn certificates(file: &Path, pem: &[u8]) -> Result<Vec<CertificateDer<'static>>, IdentityError> {
    let all: Result<Vec<_>, _> = rustls_pemfile::certs(&mut &*pem).collect();
    let all = all.map_err(|e| damaged(file, e))?;
    if all.is_empty() {
        return Err(damaged(file, "no certificate in it"));
    }
    Ok(all)
}

pub(super) fn validity(certificate: &[u8]) -> Result<(Timestamp, Timestamp), String> {
    let (_, certificate) = X509Certificate::from_der(certificate).map_err(|e| e.to_string())?;
    let time =
        |t: x509_parser::time::ASN1Time| Timestamp::from_second(t.timestamp()).map_err(|e| e.to_string());
    Ok((
        time(certificate.validity().not_before)?,
        time(certificate.validity().not_after)?,
    ))
}

fn pem_of(certificates: &[Vec<u8>]) -> String {
    let mut text = String::new();
    for der in certificates {
        text.push_str("-----BEGIN CERTIFICATE-----\n");
        let body = STANDARD.encode(der);
        for line in body.as_bytes().chunks(64) {
            // Base64 is ASCII.
            text.push_str(&String::from_utf8_lossy(line));
            text.push('\n');
        }
        text.push_str("-----END CERTIFICATE-----\n");
    }
    text
}

fn damaged(file: &Path, reason: impl std::fmt::Display) -> IdentityError {
    IdentityError::Damaged {
        file: file.to_owned(),
        reason: reason.to_string(),
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// A joined data directory with a self-made certificate.
    pub(crate) fn joined(dir: &Path) {
        let key = rcgen::KeyPair::generate().unwrap();
        let mut params = rcgen::CertificateParams::default();
        params.subject_alt_names = vec![rcgen::SanType::URI(
            "spiffe://skerry.local/site/harbour".try_into().unwrap(),
        )];
        let certificate = params.self_signed(&key).unwrap().der().to_vec();
        let material = Material {
            site: &"harbour".parse().unwrap(),
            trust_domain: "skerry.local",
            provider: "127.0.0.1:1",
            key_pem: &key.serialize_pem(),
            chain: std::slice::from_ref(&certificate),
            roots: std::slice::from_ref(&certificate),
        };
        save(dir, &material).unwrap();
    }

    #[test]
    fn what_was_saved_is_loaded_and_readable_by_its_owner_alone() {
        let data = tempfile::tempdir().unwrap();
        joined(data.path());
        let identity = load(data.path()).unwrap();
        assert_eq!(
            identity.spiffe_id().to_string(),
            "spiffe://skerry.local/site/harbour"
        );
        let mode = |path: PathBuf| fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!(mode(dir(data.path())), 0o700);
        assert_eq!(mode(dir(data.path()).join(SECRETS)), 0o600);
    }

    #[test]
    fn a_key_that_others_can_read_is_refused_with_the_remedy() {
        let data = tempfile::tempdir().unwrap();
        joined(data.path());
        let file = dir(data.path()).join(SECRETS);
        for mode in [0o640, 0o604, 0o644] {
            fs::set_permissions(&file, fs::Permissions::from_mode(mode)).unwrap();
            let error = load(data.path()).unwrap_err();
            assert!(matches!(error, IdentityError::Exposed { .. }), "{error}");
            let text = error.to_string();
            assert!(
                text.contains("chmod 600") && text.contains(&format!("{mode:o}")),
                "{text}"
            );
        }
    }

    #[test]
    fn a_leftover_file_does_not_lend_its_permissions_to_the_key() {
        let data = tempfile::tempdir().unwrap();
        fs::create_dir_all(dir(data.path())).unwrap();
        let leftover = dir(data.path()).join(SECRETS).with_extension("new");
        fs::write(&leftover, "half").unwrap();
        fs::set_permissions(&leftover, fs::Permissions::from_mode(0o644)).unwrap();
        joined(data.path());
        let key = dir(data.path()).join(SECRETS);
        assert_eq!(fs::metadata(key).unwrap().permissions().mode() & 0o777, 0o600);
    }

    #[test]
    fn preparing_leaves_nothing_behind_and_names_a_directory_that_cannot_be_made() {
        let data = tempfile::tempdir().unwrap();
        let made = prepare(data.path()).unwrap();
        assert_eq!(fs::read_dir(made).unwrap().count(), 0);
        let file = data.path().join("file");
        fs::write(&file, "").unwrap();
        let error = prepare(&file).unwrap_err().to_string();
        assert!(error.contains(file.to_str().unwrap()), "{error}");
    }

    #[test]
    fn a_machine_that_has_not_joined_is_told_how() {
        let data = tempfile::tempdir().unwrap();
        let error = load(data.path()).unwrap_err();
        assert!(
            matches!(error, IdentityError::NotJoined(_)) && error.to_string().contains("skerry-edge join")
        );
    }

    #[test]
    fn a_truncated_file_is_named_with_the_remedy() {
        for file in [FACTS, SECRETS, ROOTS] {
            let data = tempfile::tempdir().unwrap();
            joined(data.path());
            let path = dir(data.path()).join(file);
            let whole = fs::read(&path).unwrap();
            for length in [0, 1, whole.len() / 3] {
                fs::write(&path, &whole[..length]).unwrap();
                let error = load(data.path()).unwrap_err().to_string();
                assert!(error.contains(file) && error.contains("join again"), "{error}");
            }
        }
    }
}
