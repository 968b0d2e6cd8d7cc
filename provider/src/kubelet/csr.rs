//! Certificates by CertificateSigningRequest to the signer `kubernetes.io/kubelet-serving`.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::time::Duration;

use futures::future::BoxFuture;
use jiff::Timestamp;
use k8s_openapi::ByteString;
use k8s_openapi::api::certificates::v1::CertificateSigningRequest;
use k8s_openapi::api::core::v1::Secret;
use kube::Client;
use kube::api::{Api, Patch, PatchParams, PostParams};
use rcgen::{CertificateParams, DnType, KeyPair, SanType};
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use serde_json::json;
use x509_parser::extensions::GeneralName;
use x509_parser::prelude::{FromDer, X509Certificate};

use super::serving::{Issued, Issuer, ServingError};
use crate::pki::Names;

/// Where the issued certificate is kept, in the provider's namespace.
const SECRET: &str = "skerry-kubelet-serving";
const SIGNER: &str = "kubernetes.io/kubelet-serving";
/// The signer wants a node's name; one certificate serves all nodes.
const COMMON_NAME: &str = "system:node:skerry-provider";
const ORGANIZATION: &str = "system:nodes";
const FIELD_MANAGER: &str = "skerry-provider";

/// How often a request is looked at: at first, and when it has waited for a while.
const LOOK: Duration = Duration::from_secs(2);
const LOOK_LATER: Duration = Duration::from_secs(15);
const PATIENCE: u32 = 60;

/// Asks the cluster.
pub struct ClusterIssuer {
    client: Client,
    namespace: String,
    names: Names,
}

impl ClusterIssuer {
    /// Asks for certificates with `names`; keeps them in `namespace`.
    pub fn new(client: Client, namespace: &str, names: Names) -> Self {
        Self {
            client,
            namespace: namespace.to_owned(),
            names,
        }
    }

    fn requests(&self) -> Api<CertificateSigningRequest> {
        Api::all(self.client.clone())
    }

    fn secrets(&self) -> Api<Secret> {
        Api::namespaced(self.client.clone(), &self.namespace)
    }

    async fn read(&self) -> Option<Issued> {
        let secret = match self.secrets().get_opt(SECRET).await {
            Ok(secret) => secret?,
            Err(error) => {
                tracing::warn!(%error, "Secret {SECRET} cannot be read; a new serving certificate is asked for");
                return None;
            }
        };
        let data = secret.data.unwrap_or_default();
        let text = |key: &str| {
            data.get(key)
                .map(|bytes| String::from_utf8_lossy(&bytes.0).into_owned())
        };
        let issued = issued(&text("tls.crt")?, &text("tls.key")?).ok()?;
        (covers(&issued.chain[0], &self.names) && issued.not_after > Timestamp::now()).then_some(issued)
    }

    async fn ask(&self) -> Result<Issued, ServingError> {
        let key = KeyPair::generate().map_err(|e| ServingError::Unusable(e.to_string()))?;
        let request = request_pem(&key, &self.names).map_err(|e| ServingError::Unusable(e.to_string()))?;
        let object: CertificateSigningRequest = serde_json::from_value(json!({
            "metadata": {"generateName": "skerry-kubelet-"},
            "spec": {
                "request": ByteString(request.into_bytes()),
                "signerName": SIGNER,
                "usages": ["digital signature", "server auth"],
            },
        }))
        .map_err(|e| ServingError::Unusable(e.to_string()))?;
        let api = |what: &str| {
            let what = what.to_owned();
            move |source| ServingError::Api { what, source }
        };
        let made = self.requests().create(&PostParams::default(), &object).await;
        let made = made.map_err(api("a CertificateSigningRequest cannot be made"))?;
        let name = made.metadata.name.unwrap_or_default();
        tracing::info!(%name, "a serving certificate of the cluster was asked for; until it is approved the kubelet API \
            shows one of Skerry's own CA. To approve: kubectl certificate approve {name}");
        let certificate = self.wait(&name).await?;
        let key = key.serialize_pem();
        let issued = issued(&certificate, &key).map_err(ServingError::Unusable)?;
        if !covers(&issued.chain[0], &self.names) {
            let text = "it does not have every address of this provider".to_owned();
            return Err(ServingError::Unusable(text));
        }
        if let Err(error) = self.keep(&certificate, &key).await {
            tracing::warn!(%error, "the serving certificate cannot be kept in Secret {SECRET}; after a restart a new one must be approved");
        }
        Ok(issued)
    }

    async fn wait(&self, name: &str) -> Result<String, ServingError> {
        let mut looks = 0;
        loop {
            let request = self.requests().get(name).await;
            let request = request.map_err(|source| ServingError::Api {
                what: format!("CertificateSigningRequest {name} cannot be read"),
                source,
            });
            match request {
                Ok(request) => {
                    let status = request.status.unwrap_or_default();
                    let refused = status.conditions.iter().flatten();
                    let mut refused = refused.filter(|c| matches!(c.type_.as_str(), "Denied" | "Failed"));
                    if let Some(condition) = refused.next() {
                        return Err(ServingError::Refused {
                            name: name.to_owned(),
                            reason: format!(
                                "{} {}",
                                condition.type_,
                                condition.message.as_deref().unwrap_or_default()
                            ),
                        });
                    }
                    if let Some(certificate) = status.certificate.filter(|pem| !pem.0.is_empty()) {
                        return String::from_utf8(certificate.0)
                            .map_err(|_| ServingError::Unusable("it is no PEM text".to_owned()));
                    }
                }
                // The cluster's own cleaner takes old requests away.
                Err(ServingError::Api {
                    source: kube::Error::Api(status),
                    what,
                }) if status.code == 404 => {
                    let source = kube::Error::Api(status);
                    return Err(ServingError::Api { what, source });
                }
                Err(error) => tracing::debug!(%error, "looking at the request again later"),
            }
            looks += 1;
            tokio::time::sleep(if looks < PATIENCE { LOOK } else { LOOK_LATER }).await;
        }
    }

    async fn keep(&self, certificate: &str, key: &str) -> Result<(), kube::Error> {
        let data = BTreeMap::from([
            ("tls.crt", ByteString(certificate.as_bytes().to_vec())),
            ("tls.key", ByteString(key.as_bytes().to_vec())),
        ]);
        let secret = json!({
            "apiVersion": "v1", "kind": "Secret", "type": "kubernetes.io/tls",
            "metadata": {"name": SECRET, "namespace": self.namespace}, "data": data,
        });
        let params = PatchParams::apply(FIELD_MANAGER).force();
        self.secrets()
            .patch(SECRET, &params, &Patch::Apply(&secret))
            .await
            .map(drop)
    }
}

impl Issuer for ClusterIssuer {
    fn kept(&self) -> BoxFuture<'_, Option<Issued>> {
        Box::pin(self.read())
    }

    fn issue(&self) -> BoxFuture<'_, Result<Issued, ServingError>> {
        Box::pin(self.ask())
    }
}

/// Subject and names as the signer demands them: `O=system:nodes`, a node's CN, DNS and IP names only.
fn request_pem(key: &KeyPair, names: &Names) -> Result<String, rcgen::Error> {
    let mut params = CertificateParams::new(names.dns.clone())?;
    params
        .subject_alt_names
        .extend(names.ips.iter().map(|ip| SanType::IpAddress(*ip)));
    params.distinguished_name = rcgen::DistinguishedName::new();
    params
        .distinguished_name
        .push(DnType::OrganizationName, ORGANIZATION);
    params.distinguished_name.push(DnType::CommonName, COMMON_NAME);
    params.serialize_request(key)?.pem()
}

fn issued(certificate: &str, key: &str) -> Result<Issued, String> {
    let chain: Vec<CertificateDer<'static>> = rustls_pemfile::certs(&mut certificate.as_bytes())
        .collect::<Result<_, _>>()
        .map_err(|e| e.to_string())?;
    let leaf = chain.first().ok_or("it holds no certificate")?;
    let (_, parsed) = X509Certificate::from_der(leaf).map_err(|e| e.to_string())?;
    let pair = KeyPair::from_pem(key).map_err(|e| e.to_string())?;
    let time = |seconds: i64| Timestamp::from_second(seconds).map_err(|e| e.to_string());
    let validity = parsed.validity();
    let (not_before, not_after) = (
        time(validity.not_before.timestamp())?,
        time(validity.not_after.timestamp())?,
    );
    Ok(Issued {
        chain,
        key: PrivateKeyDer::try_from(pair.serialize_der()).map_err(str::to_owned)?,
        not_before,
        not_after,
    })
}

/// Whether a certificate is good for every name.
fn covers(certificate: &CertificateDer<'_>, names: &Names) -> bool {
    let Ok((_, parsed)) = X509Certificate::from_der(certificate) else {
        return false;
    };
    let found = parsed.subject_alternative_name().ok().flatten();
    let found = found.map(|extension| extension.value.general_names.as_slice());
    let (mut dns, mut ips) = (Vec::new(), Vec::new());
    for name in found.unwrap_or_default() {
        match name {
            GeneralName::DNSName(name) => dns.push(*name),
            GeneralName::IPAddress(bytes) => ips.extend(address(bytes)),
            _ => {}
        }
    }
    names.dns.iter().all(|name| dns.contains(&name.as_str())) && names.ips.iter().all(|ip| ips.contains(ip))
}

fn address(bytes: &[u8]) -> Option<IpAddr> {
    if let Ok(four) = <[u8; 4]>::try_from(bytes) {
        return Some(four.into());
    }
    <[u8; 16]>::try_from(bytes).ok().map(IpAddr::from)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names() -> Names {
        Names {
            dns: vec!["provider.example".into()],
            ips: vec!["10.0.0.7".parse().unwrap(), "fd00::7".parse().unwrap()],
        }
    }

    #[test]
    fn a_request_has_the_subject_and_the_names_that_the_signer_demands() {
        let key = KeyPair::generate().unwrap();
        let pem = request_pem(&key, &names()).unwrap();
        let der = x509_parser::pem::parse_x509_pem(pem.as_bytes()).unwrap().1;
        let (_, request) =
            x509_parser::certification_request::X509CertificationRequest::from_der(&der.contents).unwrap();
        let subject = request.certification_request_info.subject.to_string();
        assert_eq!(subject, "O=system:nodes, CN=system:node:skerry-provider");
    }

    #[test]
    fn a_kept_certificate_must_have_every_name_of_today() {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::new(names().dns).unwrap();
        let ips = names().ips.into_iter().map(SanType::IpAddress);
        params.subject_alt_names.extend(ips);
        let certificate = params.self_signed(&key).unwrap();
        let issued = issued(&certificate.pem(), &key.serialize_pem()).unwrap();
        assert!(covers(&issued.chain[0], &names()));
        let mut more = names();
        more.ips.push("10.0.0.8".parse().unwrap());
        assert!(!covers(&issued.chain[0], &more));
        let mut renamed = names();
        renamed.dns = vec!["other.example".into()];
        assert!(!covers(&issued.chain[0], &renamed));
    }

    #[test]
    fn what_is_no_certificate_is_told() {
        assert!(issued("nonsense", "nonsense").is_err());
    }
}
