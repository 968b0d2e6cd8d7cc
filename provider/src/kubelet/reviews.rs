//! Asks the API server who a token belongs to and what a user may do.

use std::collections::BTreeMap;

use futures::future::BoxFuture;
use k8s_openapi::api::authentication::v1::{TokenReview, TokenReviewSpec};
use k8s_openapi::api::authorization::v1::{ResourceAttributes, SubjectAccessReview, SubjectAccessReviewSpec};
use kube::api::{Api, PostParams};

use super::authn::User;

/// The API server could not be asked. Retry.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the API server cannot review the request: {0}")]
pub struct ReviewError(pub String);

/// What a request needs: a verb on a subresource of one node.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct NodeAccess {
    /// `get`, `create`...
    pub verb: &'static str,
    /// Name of the node; empty when the request is about no node in particular.
    pub node: String,
    /// `proxy`, `log`, `healthz`...
    pub subresource: &'static str,
}

/// Token and access reviews.
pub trait Reviews: Send + Sync + 'static {
    /// The user whom a bearer token authenticates, or `None`.
    fn token<'a>(&'a self, token: &'a str) -> BoxFuture<'a, Result<Option<User>, ReviewError>>;

    /// Whether `user` has `access`.
    fn access<'a>(
        &'a self,
        user: &'a User,
        access: &'a NodeAccess,
    ) -> BoxFuture<'a, Result<bool, ReviewError>>;
}

/// Reviews by the API server: needs `create` on `tokenreviews` and `subjectaccessreviews`.
pub struct KubeReviews {
    client: kube::Client,
}

impl KubeReviews {
    /// Asks through `client`.
    pub fn new(client: kube::Client) -> Self {
        Self { client }
    }

    async fn review_token(&self, token: &str) -> Result<Option<User>, ReviewError> {
        let review = TokenReview {
            spec: TokenReviewSpec {
                token: token.to_owned(),
                audiences: None,
            },
            ..TokenReview::default()
        };
        let api: Api<TokenReview> = Api::all(self.client.clone());
        let answer = api
            .create(&PostParams::default(), &review)
            .await
            .map_err(failed)?;
        let status = answer.status.unwrap_or_default();
        if status.authenticated != Some(true) {
            return Ok(None);
        }
        let user = status.user.unwrap_or_default();
        Ok(Some(User {
            name: user.username.unwrap_or_default(),
            uid: user.uid.unwrap_or_default(),
            groups: user.groups.unwrap_or_default(),
            extra: user.extra.unwrap_or_default(),
        }))
    }

    async fn review_access(&self, user: &User, access: &NodeAccess) -> Result<bool, ReviewError> {
        let attributes = ResourceAttributes {
            verb: Some(access.verb.to_owned()),
            version: Some("v1".to_owned()),
            resource: Some("nodes".to_owned()),
            subresource: Some(access.subresource.to_owned()),
            name: Some(access.node.clone()),
            ..ResourceAttributes::default()
        };
        let some = |text: &str| Some(text.to_owned()).filter(|text| !text.is_empty());
        let extra: BTreeMap<_, _> = user.extra.clone();
        let review = SubjectAccessReview {
            spec: SubjectAccessReviewSpec {
                user: some(&user.name),
                uid: some(&user.uid),
                groups: Some(user.groups.clone()),
                extra: Some(extra),
                resource_attributes: Some(attributes),
                ..SubjectAccessReviewSpec::default()
            },
            ..SubjectAccessReview::default()
        };
        let api: Api<SubjectAccessReview> = Api::all(self.client.clone());
        let answer = api
            .create(&PostParams::default(), &review)
            .await
            .map_err(failed)?;
        Ok(answer.status.is_some_and(|status| status.allowed))
    }
}

fn failed(error: kube::Error) -> ReviewError {
    ReviewError(error.to_string())
}

impl Reviews for KubeReviews {
    fn token<'a>(&'a self, token: &'a str) -> BoxFuture<'a, Result<Option<User>, ReviewError>> {
        Box::pin(self.review_token(token))
    }

    fn access<'a>(
        &'a self,
        user: &'a User,
        access: &'a NodeAccess,
    ) -> BoxFuture<'a, Result<bool, ReviewError>> {
        Box::pin(self.review_access(user, access))
    }
}
