//! TLS of the kubelet API, and where the API server's client CA is found.

use std::sync::Arc;

use k8s_openapi::api::core::v1::ConfigMap;
use kube::api::Api;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::WebPkiClientVerifier;
use rustls::{RootCertStore, ServerConfig};

/// Namespace, name and key of the API server's published client CA bundle.
const CLIENT_CA: (&str, &str, &str) = (
    "kube-system",
    "extension-apiserver-authentication",
    "client-ca-file",
);

/// Why the client CA could not be read. Retry when it is the API server that failed; else go on without.
#[derive(Debug, thiserror::Error)]
pub enum ClientCaError {
    /// The ConfigMap could not be read.
    #[error(
        "ConfigMap kube-system/extension-apiserver-authentication cannot be read; allow `get` on it: {0}"
    )]
    Read(#[from] kube::Error),
    /// The bundle holds something that is no CA certificate.
    #[error("client-ca-file of ConfigMap kube-system/extension-apiserver-authentication is malformed: {0}")]
    Malformed(String),
}

/// Reads the CA bundle that the API server publishes for client certificates; `None` when it publishes none.
pub async fn load_client_ca(client: &kube::Client) -> Result<Option<RootCertStore>, ClientCaError> {
    let (namespace, name, key) = CLIENT_CA;
    let api: Api<ConfigMap> = Api::namespaced(client.clone(), namespace);
    let map = api.get_opt(name).await?;
    match map.and_then(|map| map.data).and_then(|mut data| data.remove(key)) {
        Some(pem) => parse_bundle(pem.as_bytes())
            .map(Some)
            .map_err(ClientCaError::Malformed),
        None => Ok(None),
    }
}

/// The CA certificates of a PEM bundle, at least one; else what is wrong with it.
pub fn parse_bundle(pem: &[u8]) -> Result<RootCertStore, String> {
    let mut roots = RootCertStore::empty();
    for certificate in rustls_pemfile::certs(&mut &*pem) {
        let certificate = certificate.map_err(|error| error.to_string())?;
        roots.add(certificate).map_err(|error| error.to_string())?;
    }
    if roots.is_empty() {
        return Err("it has no certificate".to_owned());
    }
    Ok(roots)
}

/// TLS settings of the listener: HTTP/1.1, client certificates optional and accepted only from `client_ca`.
pub fn server_config(
    chain: Vec<CertificateDer<'static>>,
    key: PrivateKeyDer<'static>,
    client_ca: Option<RootCertStore>,
) -> Result<ServerConfig, rustls::Error> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let builder =
        ServerConfig::builder_with_provider(provider.clone()).with_safe_default_protocol_versions()?;
    let builder = match client_ca {
        Some(roots) => {
            let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider)
                .allow_unauthenticated()
                .build()
                .map_err(|error| rustls::Error::General(format!("the client CA is unusable: {error}")))?;
            builder.with_client_cert_verifier(verifier)
        }
        None => builder.with_no_client_auth(),
    };
    let mut config = builder.with_single_cert(chain, key)?;
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    Ok(config)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bundle_without_a_certificate_is_refused() {
        for pem in [
            "",
            "nonsense",
            "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n",
        ] {
            assert!(parse_bundle(pem.as_bytes()).is_err(), "{pem:?}");
        }
    }
}
