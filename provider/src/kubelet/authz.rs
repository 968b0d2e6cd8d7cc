//! Whether a user may: a verb on `nodes/<subresource>` of the node that the request is about, as a kubelet asks.

use std::sync::Arc;
use std::time::Duration;

use http::Method;

use super::authn::User;
use super::cache::Cache;
use super::reviews::{NodeAccess, ReviewError, Reviews};

const ALLOWED_TTL: Duration = Duration::from_secs(300);
const DENIED_TTL: Duration = Duration::from_secs(30);
const ANSWERS: usize = 8192;

/// The verb that a method needs; empty for methods that no rule allows but `*`.
pub(super) fn verb(method: &Method) -> &'static str {
    match *method {
        Method::GET => "get",
        Method::POST => "create",
        Method::PUT => "update",
        Method::PATCH => "patch",
        Method::DELETE => "delete",
        _ => "",
    }
}

/// The subresources that allow a path, any of which is enough, in the order in which they are asked for.
pub(super) fn subresources(path: &str) -> &'static [&'static str] {
    let under = |root: &str| {
        path.strip_prefix(root)
            .is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
    };
    if under("/stats") {
        &["stats"]
    } else if under("/metrics") {
        &["metrics"]
    } else if under("/logs") {
        &["log"]
    } else if under("/checkpoint") {
        &["checkpoint"]
    } else if under("/statusz") {
        &["statusz"]
    } else if under("/flagz") {
        &["configz"]
    } else if under("/pods") || under("/runningpods") {
        &["pods", "proxy"]
    } else if under("/healthz") {
        &["healthz", "proxy"]
    } else if under("/configz") {
        &["configz", "proxy"]
    } else {
        &["proxy"]
    }
}

/// The text of a refusal.
pub(super) fn forbidden(user: &User, verb: &str, subresources: &[&str]) -> String {
    format!(
        "Forbidden (user={}, verb={verb}, resource=nodes, subresource(s)=[{}])\n",
        user.name,
        subresources.join(" ")
    )
}

/// Authorises requests.
pub(super) struct Authorizer {
    reviews: Arc<dyn Reviews>,
    answers: Cache<(User, NodeAccess), bool>,
}

impl Authorizer {
    pub(super) fn new(reviews: Arc<dyn Reviews>) -> Self {
        Self {
            reviews,
            answers: Cache::new(ANSWERS),
        }
    }

    /// Whether `user` has the verb on any of the subresources of `node`.
    pub(super) async fn allows(
        &self,
        user: &User,
        verb: &'static str,
        node: &str,
        subresources: &'static [&'static str],
    ) -> Result<bool, ReviewError> {
        for subresource in subresources {
            let access = NodeAccess {
                verb,
                node: node.to_owned(),
                subresource,
            };
            if self.allows_one(user, access).await? {
                return Ok(true);
            }
        }
        Ok(false)
    }

    async fn allows_one(&self, user: &User, access: NodeAccess) -> Result<bool, ReviewError> {
        let key = (user.clone(), access);
        if let Some(known) = self.answers.get(&key) {
            return Ok(known);
        }
        let allowed = self.reviews.access(user, &key.1).await?;
        self.answers
            .put(key, allowed, if allowed { ALLOWED_TTL } else { DENIED_TTL });
        Ok(allowed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kubelet::server::testing::FakeReviews;

    #[test]
    fn paths_need_the_subresources_that_a_kubelet_asks_for() {
        for (path, expected) in [
            ("/stats/summary", &["stats"][..]),
            ("/metrics/resource", &["metrics"]),
            ("/logs/", &["log"]),
            ("/checkpoint/ns/p/c", &["checkpoint"]),
            ("/statusz", &["statusz"]),
            ("/flagz", &["configz"]),
            ("/pods", &["pods", "proxy"]),
            ("/runningpods/", &["pods", "proxy"]),
            ("/healthz/ping", &["healthz", "proxy"]),
            ("/configz", &["configz", "proxy"]),
            ("/exec/ns/p/c", &["proxy"]),
            ("/containerLogs/ns/p/c", &["proxy"]),
            ("/podsecrets", &["proxy"]),
            ("/", &["proxy"]),
        ] {
            assert_eq!(subresources(path), expected, "{path}");
        }
    }

    #[test]
    fn methods_are_verbs() {
        for (method, expected) in [
            (Method::GET, "get"),
            (Method::POST, "create"),
            (Method::PUT, "update"),
            (Method::PATCH, "patch"),
            (Method::DELETE, "delete"),
            (Method::OPTIONS, ""),
        ] {
            assert_eq!(verb(&method), expected);
        }
    }

    #[tokio::test(start_paused = true)]
    async fn answers_are_remembered_five_minutes_and_refusals_thirty_seconds() {
        let reviews = Arc::new(FakeReviews::default());
        let authorizer = Authorizer::new(reviews.clone());
        let user = |name: &str| User {
            name: name.into(),
            ..User::default()
        };
        let asked = |name: &'static str, subresources| {
            let authorizer = &authorizer;
            async move {
                authorizer
                    .allows(&user(name), "get", "harbour", subresources)
                    .await
                    .unwrap()
            }
        };
        assert!(asked("good", &["healthz", "proxy"][..]).await);
        // FakeReviews allows `proxy` only: both were asked.
        assert_eq!(reviews.access_reviews(), 2);
        assert!(!asked("bad", &["proxy"]).await);
        assert!(asked("good", &["proxy"]).await && !asked("bad", &["proxy"]).await);
        assert_eq!(reviews.access_reviews(), 3);
        tokio::time::advance(DENIED_TTL).await;
        assert!(asked("good", &["proxy"]).await && !asked("bad", &["proxy"]).await);
        assert_eq!(reviews.access_reviews(), 4);
        tokio::time::advance(ALLOWED_TTL).await;
        assert!(asked("good", &["proxy"]).await);
        assert_eq!(reviews.access_reviews(), 5);
    }
}
