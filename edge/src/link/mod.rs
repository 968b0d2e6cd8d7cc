//! The edge's end of the cloud-edge link.
//!
//! In: the provider's changes, which go to the store, and its orders for streams. Out: the outbox's reports.
//! `link.proto` is the protocol's document. A session is tried for ever, with jittered back-off; the rooms notice a cut
//! only by [`Link::status`].
//!
//! What must always hold:
//! * A change is acknowledged only after the store has committed it.
//! * A report leaves the outbox only after the provider has settled it.
//! * Nothing here stops a pod: the store is changed by the provider's explicit word alone.

pub(crate) mod backoff;
mod beats;
mod critical;
mod drops;
pub mod holding;
#[cfg(test)]
mod holding_tests;
mod session;
mod thrift;
mod tunnel;
mod uplink;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use jiff::Timestamp;
use skerry_proto::SiteName;
use skerry_proto::link::Welcome;
use skerry_transport::Handle;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tonic::transport::Channel;

use crate::metrics::Metrics;
use crate::store::{Store, StoreError};
use crate::streams::Streams;
use backoff::Backoff;
use thrift::Thrift;
use uplink::Uplink;

pub use thrift::Deferring;
pub use uplink::Gate;

/// A session that lived this long was a good one: the next attempt is made at once.
const CALM: Duration = Duration::from_secs(30);

/// Opens connections to the provider, each a TCP connection of its own, mutually authenticated.
#[async_trait]
pub trait Dial: Send + Sync + 'static {
    /// Opens one. The error is for a person: it says where was dialled and what went wrong.
    async fn dial(&self) -> Result<Channel, String>;

    /// Opens one, with what reaches its socket where there is one.
    async fn dial_line(&self) -> Result<(Channel, Option<Handle>), String> {
        Ok((self.dial().await?, None))
    }

    /// Opens one for the renewal of the site's certificate only: the provider's own may be out of its time.
    async fn dial_for_renewal(&self) -> Result<Channel, String> {
        self.dial().await
    }

    /// The provider has greeted, and told its clock.
    fn greeted(&self, _provider_now: Timestamp) {}

    /// The provider wants the site's certificate to be renewed.
    fn renewal_wanted(&self) {}

    /// The provider has refused a session.
    fn refused(&self, _code: tonic::Code) {}
}

/// What the rest of the daemon may know of the link.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LinkStatus {
    /// A session is up.
    pub online: bool,
    /// When `online` took its present value.
    pub since: Timestamp,
    /// The store holds everything that the provider had when the present session began.
    pub synced: bool,
    /// Why the last attempt or session ended, empty when none did.
    pub last_error: String,
    /// From which priority on pods are critical, as the provider last said; 0: it did not.
    pub critical_priority: i32,
    /// Moves when the provider asks for the Node's status.
    pub node_asked: u64,
}

/// How bulk data is sent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BulkPolicy {
    /// It keeps the line's queue short; else TCP alone decides.
    pub paced: bool,
    /// Congestion control in place of the kernel's default.
    pub congestion: Option<String>,
}

impl Default for BulkPolicy {
    fn default() -> Self {
        Self {
            paced: true,
            congestion: None,
        }
    }
}

/// What the daemon says of itself when it greets.
#[derive(Clone, Debug)]
pub struct Greeting {
    /// The site in the certificate.
    pub site: SiteName,
    /// The machine's boot id.
    pub boot_id: String,
    /// The daemon's version.
    pub version: String,
    /// Which start on this store it is.
    pub incarnation: u64,
    /// Made anew with each start of a daemon.
    pub instance: String,
}

/// The link, ready to run.
pub struct Link {
    pub(self) store: Store,
    pub(self) streams: Arc<Streams>,
    pub(self) dial: Arc<dyn Dial>,
    pub(self) greeting: Greeting,
    pub(self) metrics: Arc<Metrics>,
    pub(self) bulk: BulkPolicy,
    pub(self) uplink: Uplink,
    pub(self) thrift: Thrift,
    status: watch::Sender<LinkStatus>,
}

/// Why a session could not be had, or ended.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SessionError {
    /// No connection.
    #[error("{0}")]
    Dial(String),
    /// The provider refused or broke off.
    #[error("the provider says: {message}")]
    Refused {
        /// gRPC code.
        code: tonic::Code,
        /// Its words.
        message: String,
    },
    /// The provider asked for it.
    #[error("the provider ended the session: {reason}")]
    Goodbye {
        /// Its words.
        reason: String,
        /// Not before.
        retry_after: Duration,
    },
    /// Half-open: nothing came any more.
    #[error("nothing was heard from the provider for {0:?}")]
    Silent(Duration),
    /// The provider does not keep to link.proto.
    #[error("the provider broke the protocol: {0}")]
    Protocol(&'static str),
    /// So does one that loses changes.
    #[error("the provider broke the protocol: {0}")]
    OutOfOrder(#[from] holding::OutOfOrder),
    /// The store cannot be read.
    #[error(transparent)]
    Store(#[from] StoreError),
}

impl From<tonic::Status> for SessionError {
    fn from(status: tonic::Status) -> Self {
        Self::Refused {
            code: status.code(),
            message: status.message().to_owned(),
        }
    }
}

impl Link {
    /// A link that is not running yet.
    pub fn new(
        store: Store,
        streams: Arc<Streams>,
        dial: Arc<dyn Dial>,
        greeting: Greeting,
        metrics: Arc<Metrics>,
    ) -> Self {
        let status = LinkStatus {
            online: false,
            since: Timestamp::now(),
            synced: false,
            last_error: String::new(),
            critical_priority: 0,
            node_asked: 0,
        };
        Self {
            thrift: Thrift::new(greeting.site.clone(), store.clone()),
            store,
            streams,
            dial,
            greeting,
            metrics,
            bulk: BulkPolicy::default(),
            uplink: Uplink::default(),
            status: watch::Sender::new(status),
        }
    }

    /// The same, sending bulk data otherwise.
    #[must_use]
    pub fn with_bulk(mut self, bulk: BulkPolicy) -> Self {
        self.bulk = bulk;
        self
    }

    /// The link's state, to be watched.
    pub fn status(&self) -> watch::Receiver<LinkStatus> {
        self.status.subscribe()
    }

    /// What is held back, to be watched.
    pub fn gate(&self) -> watch::Receiver<Gate> {
        self.uplink.watch()
    }

    /// Keeps a session up until `stop`.
    pub async fn run(self: Arc<Self>, stop: CancellationToken) {
        let mut backoff = Backoff::new(Duration::from_millis(500), Duration::from_secs(30));
        loop {
            let began = tokio::time::Instant::now();
            let ended = tokio::select! {
                () = stop.cancelled() => return,
                ended = session::run(&self) => ended,
            };
            let was_online = self.status.borrow().online;
            if began.elapsed() >= CALM && was_online {
                backoff.reset();
            }
            let mut pause = backoff.next();
            if let SessionError::Goodbye { retry_after, .. } = &ended {
                pause = pause.max(*retry_after);
            }
            if let SessionError::Refused { code, .. } = &ended {
                self.dial.refused(*code);
            }
            self.note_end(&ended, was_online, pause);
            tokio::select! {
                () = stop.cancelled() => return,
                () = tokio::time::sleep(pause) => {}
            }
        }
    }

    fn note_end(&self, ended: &SessionError, was_online: bool, pause: Duration) {
        let reason = ended.to_string();
        let repeated = !was_online && self.status.borrow().last_error == reason;
        // The same failure again and again needs one line, not one a minute.
        if repeated {
            tracing::debug!(%reason, ?pause, "the provider is still not reached");
        } else {
            tracing::warn!(%reason, ?pause, "the link is down; pods and devices go on, and it is tried again");
        }
        self.status.send_modify(|status| {
            if status.online {
                status.since = Timestamp::now();
            }
            status.online = false;
            status.synced = false;
            status.last_error = reason;
        });
        self.uplink.reset();
        self.metrics.set_link(false);
    }

    pub(self) fn note_online(&self, welcome: &Welcome) {
        self.status.send_modify(|status| {
            status.critical_priority = welcome.critical_priority;
            status.online = true;
            status.since = Timestamp::now();
            status.last_error.clear();
        });
        self.metrics.set_link(true);
    }

    pub(self) fn note_node_asked(&self) {
        self.status.send_modify(|status| status.node_asked += 1);
    }

    pub(self) fn note_synced(&self) {
        self.status.send_modify(|status| status.synced = true);
    }
}

/// Where the boot id is read; another machine, another id.
pub fn boot_id() -> String {
    let path = PathBuf::from("/proc/sys/kernel/random/boot_id");
    std::fs::read_to_string(path)
        .map(|text| text.trim().to_owned())
        .unwrap_or_default()
}
