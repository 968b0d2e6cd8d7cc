//! The class of a connected site, kept true to its Site object.

use std::sync::Arc;

use skerry_proto::link::{self, CloudControl, Goodbye, Hello, Kind, Retime, cloud_control};
use skerry_proto::{Class, SiteName};
use tokio::sync::{mpsc, watch};
use tonic::Status;

use super::service::millis;
use super::sessions::Session;
use super::timing::{Timing, Timings};
use crate::cluster::Mirror;

/// Feature of an edge that takes new timings without a new session.
const RETIME: &str = "retime";

/// The class of one session's site.
pub(super) struct SiteClass {
    mirror: Arc<Mirror>,
    timings: Timings,
    session: Session,
    changes: watch::Receiver<u64>,
    class: Class,
    /// The edge understands Retime.
    live: bool,
}

/// The Site's class as it is declared now.
pub(super) fn declared(mirror: &Mirror, site: &SiteName) -> Class {
    let site = mirror.named(Kind::Site, "", site.as_str());
    site.map(|site| Class::of_site(&site.value)).unwrap_or_default()
}

impl SiteClass {
    /// For a session whose Welcome names the declared class.
    pub(super) fn new(
        mirror: &Arc<Mirror>,
        timings: Timings,
        session: &Session,
        hello: &Hello,
        class: Class,
    ) -> Self {
        Self {
            mirror: Arc::clone(mirror),
            timings,
            session: session.clone(),
            changes: mirror.changes(&session.peer.site),
            class,
            live: hello.features.iter().any(|feature| feature == RETIME),
        }
    }

    /// The class that both sides act on.
    pub(super) fn class(&self) -> Class {
        self.class
    }

    /// Its timing.
    pub(super) fn timing(&self) -> Timing {
        self.timings.of(self.class)
    }

    /// Waits for another class of the Site. Cancellation safe.
    pub(super) async fn changed(&mut self) -> Class {
        loop {
            let now = declared(&self.mirror, &self.session.peer.site);
            if now != self.class {
                return now;
            }
            if self.changes.changed().await.is_err() {
                // The provider ends, and the session with it.
                std::future::pending::<()>().await;
            }
        }
    }

    /// Takes the class up and tells the edge. An error is why the session ends: an older edge learns of it by its next Welcome.
    pub(super) fn take(
        &mut self,
        class: Class,
        orders: &mpsc::Sender<Result<CloudControl, Status>>,
    ) -> Result<(), String> {
        tracing::info!(site = %self.session.peer.site, from = %self.class, to = %class, "the site's class has changed");
        self.class = class;
        let timing = self.timing();
        self.session.lines.set(class, timing.life_signs());
        let message = if self.live {
            cloud_control::Message::Retime(Retime {
                heartbeat_millis: millis(timing.heartbeat),
                deadline_millis: millis(timing.deadline),
                class: link::Class::from(class).into(),
            })
        } else {
            cloud_control::Message::Goodbye(Goodbye {
                reason: format!("the Site is {class} now"),
                retry_after_millis: 0,
            })
        };
        let sent = orders.try_send(Ok(CloudControl {
            message: Some(message),
        }));
        match sent {
            Ok(()) if self.live => Ok(()),
            Ok(()) => Err(format!(
                "the Site is {class} now, and the edge is too old to change at once"
            )),
            Err(_) => Err("the edge does not read its control stream".to_owned()),
        }
    }
}

#[cfg(test)]
mod tests {
    use jiff::Timestamp;
    use serde_json::json;
    use skerry_proto::object::Uid;

    use super::*;
    use crate::link::sessions::Sessions;
    use crate::pki::SitePeer;

    fn declare(mirror: &Mirror, class: &str) {
        let value = json!({"metadata": {"name": "harbour", "uid": "u"}, "spec": {"class": class}});
        mirror.apply(Kind::Site, value);
    }

    /// A session of an edge with these features, whose Site has become critical.
    async fn became_critical(features: &[&str]) -> (Result<(), String>, CloudControl, Timing) {
        let mirror = Arc::new(Mirror::new());
        let peer = SitePeer {
            site: "harbour".parse().unwrap(),
            uid: Uid::from("u".to_owned()),
            serial: "1".to_owned(),
            not_before: Timestamp::MIN,
            not_after: Timestamp::MAX,
        };
        let hello = Hello {
            features: features.iter().map(|f| (*f).to_owned()).collect(),
            ..Default::default()
        };
        let (orders, mut queue) = mpsc::channel(1);
        let session = Sessions::new(Timestamp::UNIX_EPOCH)
            .begin(
                &peer,
                &hello,
                &serde_json::Value::Null,
                orders.clone(),
                Timestamp::UNIX_EPOCH,
            )
            .unwrap();
        declare(&mirror, "standard");
        let class = declared(&mirror, &peer.site);
        let mut class = SiteClass::new(&mirror, Timings::default(), &session, &hello, class);
        declare(&mirror, "critical");
        let changed = class.changed().await;
        assert_eq!(changed, Class::Critical);
        let taken = class.take(changed, &orders);
        (taken, queue.try_recv().unwrap().unwrap(), class.timing())
    }

    #[tokio::test]
    async fn an_edge_that_can_gets_new_timings_in_its_session() {
        let (taken, told, timing) = became_critical(&[RETIME]).await;
        assert_eq!(taken, Ok(()));
        assert_eq!(timing, Timings::default().critical);
        let expected = Retime {
            heartbeat_millis: 2_000,
            deadline_millis: 10_000,
            class: link::Class::Critical.into(),
        };
        assert_eq!(told.message, Some(cloud_control::Message::Retime(expected)));
    }

    #[tokio::test]
    async fn an_older_edge_is_asked_to_come_again_at_once() {
        let (taken, told, _) = became_critical(&[]).await;
        assert!(taken.is_err());
        let Some(cloud_control::Message::Goodbye(bye)) = told.message else {
            panic!("{told:?}")
        };
        assert_eq!(bye.retry_after_millis, 0);
    }
}
