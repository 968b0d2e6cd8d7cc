//! The Site kind (`sites.edge.skerry.dev/v1alpha1`), whose schema is `manifests/crds/sites.yaml`.

use kube::Client;
use kube::api::{Api, DynamicObject, Patch, PatchParams};
use kube::discovery::ApiResource;
use serde_json::{Value, json};
use skerry_proto::SiteName;
use skerry_proto::object::Uid;

/// Where Sites live in the API.
pub fn resource() -> ApiResource {
    ApiResource {
        group: "edge.skerry.dev".to_owned(),
        version: "v1alpha1".to_owned(),
        api_version: "edge.skerry.dev/v1alpha1".to_owned(),
        kind: "Site".to_owned(),
        plural: "sites".to_owned(),
    }
}

/// A declared Site; `None` when it is not declared.
pub async fn get(client: &Client, site: &SiteName) -> Result<Option<DynamicObject>, kube::Error> {
    let sites: Api<DynamicObject> = Api::all_with(client.clone(), &resource());
    sites.get_opt(site.as_str()).await
}

/// The UID of a declared Site; `None` when it is not declared.
pub async fn uid(client: &Client, site: &SiteName) -> Result<Option<Uid>, kube::Error> {
    let sites: Api<DynamicObject> = Api::all_with(client.clone(), &resource());
    let found = sites.get_opt(site.as_str()).await?;
    Ok(found.and_then(|site| site.metadata.uid).map(Uid::from))
}

/// Merges fields into a Site's status; answers the Site as it is then, or `None` when it is gone, which is fine.
pub async fn patch_status(
    client: &Client,
    site: &SiteName,
    status: Value,
) -> Result<Option<DynamicObject>, kube::Error> {
    let sites: Api<DynamicObject> = Api::all_with(client.clone(), &resource());
    let patch = json!({ "status": status });
    match sites
        .patch_status(site.as_str(), &PatchParams::default(), &Patch::Merge(&patch))
        .await
    {
        Ok(site) => Ok(Some(site)),
        Err(kube::Error::Api(status)) if status.code == 404 => Ok(None),
        Err(error) => Err(error),
    }
}
