//! Which certificate of a site counts: kept in the Site's status, so that every provider knows it.

use jiff::Timestamp;
use kube::Client;
use kube::api::{Api, DynamicObject, Patch, PatchParams};
use serde_json::{Value, json};
use skerry_proto::SiteName;
use skerry_proto::object::Uid;

use super::{Issued, Revoked, SitePeer};
use crate::sites;

/// `status.certificate` of a Site.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CertificateRecord {
    /// Serial number of the newest certificate; empty when none is known.
    pub serial: String,
    /// Which CA has signed it; empty in what an older provider wrote.
    pub issuer: String,
    /// When it was made; absent in what an older provider wrote.
    pub issued: Option<Timestamp>,
    /// When it expires.
    pub not_after: Option<Timestamp>,
    /// The certificate that the newest one was issued against, until the newest one is used: its answer may be lost.
    pub previous: Option<String>,
}

impl CertificateRecord {
    /// What a Site's status says.
    pub fn of(status: &Value) -> Self {
        let certificate = &status["certificate"];
        let text = |key: &str| certificate[key].as_str().map(str::to_owned);
        let time = |key: &str| certificate[key].as_str().and_then(|t| t.parse().ok());
        Self {
            serial: text("serial").unwrap_or_default(),
            issuer: text("issuer").unwrap_or_default(),
            issued: time("issuedAt"),
            not_after: time("notAfter"),
            previous: text("previousSerial"),
        }
    }

    /// The record of a new certificate, issued against `previous`, if against any.
    pub fn new(issued: &Issued, previous: Option<&str>) -> Self {
        Self {
            serial: issued.serial.clone(),
            issuer: issued.issuer.clone(),
            issued: Some(issued.not_before),
            not_after: Some(issued.not_after),
            previous: previous.map(str::to_owned),
        }
    }

    /// The same for the API; what is absent is taken away by a merge.
    pub fn to_json(&self) -> Value {
        json!({
            "serial": self.serial,
            "issuer": self.issuer,
            "issuedAt": self.issued,
            "notAfter": self.not_after,
            "previousSerial": self.previous,
        })
    }

    /// Whether the site has used a younger certificate than this one, so that this one is a copy that stayed behind.
    ///
    /// A certificate that is younger than the record is none: the record may come from a backup of the cluster.
    pub fn supersedes(&self, peer: &SitePeer) -> bool {
        let known = peer.serial == self.serial || self.previous.as_ref() == Some(&peer.serial);
        !known && self.issued.is_some_and(|issued| peer.not_before < issued)
    }

    /// Whether this certificate's first use ends the time of the one before it.
    pub fn first_use(&self, peer: &SitePeer) -> bool {
        peer.serial == self.serial && self.previous.is_some()
    }
}

/// A Site as the ledger holds it.
#[derive(Clone, Debug)]
pub struct Page {
    /// The Site object's UID.
    pub uid: Uid,
    /// Its certificate.
    pub record: CertificateRecord,
    /// Which certificates count no more.
    pub revoked: Revoked,
    /// For [`Ledger::write`].
    pub version: String,
}

/// Where the records are kept. Errors are for a person; retry later.
#[async_trait::async_trait]
pub trait Ledger: Send + Sync + 'static {
    /// A site's page; `None` when there is no such Site.
    async fn read(&self, site: &SiteName) -> Result<Option<Page>, String>;
    /// Writes a site's record if the page has still that version; whether it had.
    async fn write(&self, site: &SiteName, version: &str, record: &CertificateRecord)
    -> Result<bool, String>;
}

/// The ledger in the cluster.
pub struct SiteLedger(pub Client);

#[async_trait::async_trait]
impl Ledger for SiteLedger {
    async fn read(&self, site: &SiteName) -> Result<Option<Page>, String> {
        let sites: Api<DynamicObject> = Api::all_with(self.0.clone(), &sites::resource());
        let found = sites.get_opt(site.as_str()).await.map_err(|e| e.to_string())?;
        Ok(found.map(|site| Page {
            uid: Uid::from(site.metadata.uid.unwrap_or_default()),
            record: CertificateRecord::of(&site.data["status"]),
            revoked: Revoked::of(&site.data["spec"]),
            version: site.metadata.resource_version.unwrap_or_default(),
        }))
    }

    async fn write(
        &self,
        site: &SiteName,
        version: &str,
        record: &CertificateRecord,
    ) -> Result<bool, String> {
        let sites: Api<DynamicObject> = Api::all_with(self.0.clone(), &sites::resource());
        let patch = json!({
            "metadata": {"resourceVersion": version},
            "status": {"certificate": record.to_json()},
        });
        match sites
            .patch_status(site.as_str(), &PatchParams::default(), &Patch::Merge(&patch))
            .await
        {
            Ok(_) => Ok(true),
            Err(kube::Error::Api(status)) if matches!(status.code, 404 | 409) => Ok(false),
            Err(error) => Err(error.to_string()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(second).unwrap()
    }

    fn peer(serial: &str, not_before: i64) -> SitePeer {
        SitePeer {
            site: "harbour".parse().unwrap(),
            uid: Uid::from("u".to_owned()),
            serial: serial.to_owned(),
            not_before: at(not_before),
            not_after: at(not_before + 100),
        }
    }

    #[test]
    fn a_copy_that_stayed_behind_is_told_from_the_newest_its_predecessor_and_a_younger_one() {
        let record = CertificateRecord {
            serial: "b".to_owned(),
            issuer: "ca".to_owned(),
            issued: Some(at(50)),
            not_after: Some(at(150)),
            previous: Some("a".to_owned()),
        };
        assert!(!record.supersedes(&peer("b", 50)));
        assert!(!record.supersedes(&peer("a", 0)));
        assert!(record.supersedes(&peer("0", 0)));
        // The cluster was restored from a backup that is older than this certificate.
        assert!(!record.supersedes(&peer("c", 90)));
        let used = CertificateRecord {
            previous: None,
            ..record.clone()
        };
        assert!(used.supersedes(&peer("a", 0)));
        assert!(record.first_use(&peer("b", 50)) && !used.first_use(&peer("b", 50)));
        // What an older provider wrote has no time: nothing can be said.
        assert!(!CertificateRecord::of(&json!({"certificate": {"serial": "b"}})).supersedes(&peer("a", 0)));
    }

    #[test]
    fn a_record_survives_the_status_of_a_site() {
        let record = CertificateRecord {
            serial: "b".to_owned(),
            issuer: "ca".to_owned(),
            issued: Some(at(50)),
            not_after: Some(at(150)),
            previous: Some("a".to_owned()),
        };
        assert_eq!(
            CertificateRecord::of(&json!({"certificate": record.to_json()})),
            record
        );
    }
}
