//! Certificates made to measure: a site's as the CA would have issued it at another time, and those of a signer of the
//! cluster.

use std::path::PathBuf;
use std::time::{Duration, SystemTime};

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use rcgen::{
    BasicConstraints, CertificateParams, CertificateSigningRequestParams, DnType, ExtendedKeyUsagePurpose,
    IsCa, Issuer, KeyPair, SanType, SerialNumber,
};
use serde_json::Value;

use crate::kubectl::Kubectl;
use crate::site::Site;

/// The attribute `serialNumber` of a subject, where the Site's UID stands.
const SERIAL_NUMBER: [u64; 4] = [2, 5, 4, 5];

/// The file with the site's key and certificate.
pub fn file(site: &Site) -> PathBuf {
    site.data_dir().join("identity/identity.pem")
}

/// `status.certificate` of the Site.
pub fn record(kubectl: &Kubectl, site: &Site) -> Result<Value, String> {
    Ok(kubectl.get("site", site.name())?["status"]["certificate"].clone())
}

/// Puts a certificate into the site's directory that differs from the present one in its time alone: it has expired that
/// long ago, after a life of 90 days. The daemon must not be running.
///
/// # Panics
/// When that fails.
pub fn expire(kubectl: &Kubectl, site: &Site, ago: Duration) {
    let pem = std::fs::read_to_string(file(site)).expect("the identity is there");
    let key_end = pem.find("-----BEGIN CERTIFICATE").expect("the key stands first");
    let key = KeyPair::from_pem(&pem[..key_end]).expect("the key is readable");
    let object = kubectl.get("site", site.name()).expect("the Site is there");
    let serial = object["status"]["certificate"]["serial"]
        .as_str()
        .expect("a serial number");
    let uid = object["metadata"]["uid"].as_str().expect("a UID");

    let mut params = CertificateParams::default();
    params.distinguished_name.push(DnType::OrganizationName, "skerry");
    params.distinguished_name.push(DnType::CommonName, site.name());
    params
        .distinguished_name
        .push(DnType::CustomDnType(SERIAL_NUMBER.to_vec()), uid);
    let id = format!("spiffe://skerry.local/site/{}", site.name());
    params.subject_alt_names = vec![SanType::URI(id.try_into().expect("ASCII"))];
    params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
    params.serial_number = Some(SerialNumber::from(unhex(serial)));
    let not_after = SystemTime::now() - ago;
    params.not_after = not_after.into();
    params.not_before = (not_after - Duration::from_secs(90 * 86_400)).into();

    let secret = kubectl
        .in_namespace("skerry-system")
        .get("secret", "skerry-ca")
        .expect("the CA is there");
    let part = |name: &str| {
        let text = secret["data"][name].as_str().expect("a part of the CA");
        String::from_utf8(STANDARD.decode(text).expect("base64")).expect("PEM")
    };
    let ca_key = KeyPair::from_pem(&part("tls.key")).expect("the CA's key");
    let issuer = Issuer::from_ca_cert_pem(&part("tls.crt"), ca_key).expect("the CA's certificate");
    let certificate = params.signed_by(&key, &issuer).expect("a certificate");
    // Written in place: its permissions stay.
    std::fs::write(file(site), format!("{}{}", &pem[..key_end], certificate.pem()))
        .expect("the identity can be written");
}

/// Signs a CertificateSigningRequest in the signer's place, with a CA of its own: answers that CA and the certificate, both
/// as PEM. The certificate is good for some minutes more, but most of its life is over.
///
/// # Panics
/// When the request cannot be signed.
pub fn sign_aged(request: &Value) -> (String, String) {
    let pem = request["spec"]["request"].as_str().expect("a request");
    let pem = String::from_utf8(STANDARD.decode(pem).expect("base64")).expect("PEM");
    let mut wanted = CertificateSigningRequestParams::from_pem(&pem).expect("a readable request");
    let now = SystemTime::now();
    wanted.params.not_before = (now - Duration::from_secs(6_000)).into();
    wanted.params.not_after = (now + Duration::from_secs(600)).into();

    let key = KeyPair::generate().expect("a key");
    let mut params = CertificateParams::default();
    params
        .distinguished_name
        .push(DnType::CommonName, "another signer");
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let ca = params.self_signed(&key).expect("a CA").pem();
    let issuer = Issuer::new(params, key);
    let certificate = wanted.signed_by(&issuer).expect("a certificate");
    (ca, certificate.pem())
}

fn unhex(text: &str) -> Vec<u8> {
    let digit = |at: usize| u8::from_str_radix(&text[at..at + 2], 16).expect("hexadecimal");
    (0..text.len()).step_by(2).map(digit).collect()
}
