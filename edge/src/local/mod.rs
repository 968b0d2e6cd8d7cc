//! What a person at the site may ask, with or without a cloud: which pods there are and how they are, how the link, the
//! store and the certificate are.
//!
//! The running daemon has the store's lock, so it answers: on a socket in its data directory ([`SOCKET`]), which only its
//! own user may open, and members of the group `skerry` of `/etc/group` where there is one. One connection, one [`Question`], a line of
//! JSON; the answer is lines of JSON ([`Line`]), the last of which says that it was complete. Nothing can be changed here.

mod client;
mod row;
mod server;
mod table;

use std::path::Path;

use serde::{Deserialize, Serialize};
use serde_json::Value;

pub use client::{AskError, pods, status};
pub use row::Row;
pub use server::{Local, serve};
pub use table::{Output, human};

/// Name of the socket in the data directory.
pub const SOCKET: &str = "local.sock";

/// Longest question that is read.
const QUESTION_BYTES: u64 = 4096;
/// Longest line of an answer that a client reads: one pod with all that the API allows in it, and some.
const LINE_BYTES: u64 = 8 * 1024 * 1024;

/// What is asked.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", tag = "what")]
pub enum Question {
    /// Pods, ordered by namespace and name.
    Pods {
        /// Of this namespace; `None` = of all.
        namespace: Option<String>,
        /// The one of that name.
        name: Option<String>,
        /// Whole objects instead of rows.
        whole: bool,
    },
    /// How the site is.
    Status,
}

/// A line of an answer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Line {
    /// A pod in short.
    Row(Row),
    /// A pod, core/v1, with the status that the site knows.
    Pod(Value),
    /// How the site is.
    Status(Box<SiteStatus>),
    /// Why there is no answer, or no more of it.
    Error(String),
    /// That was all.
    End,
}

/// How the site is.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct SiteStatus {
    /// A session with the provider is up.
    pub online: bool,
    /// Since then it is so.
    pub since: String,
    /// The store holds everything that the provider had when the session began.
    pub synced: bool,
    /// Why the last attempt or session ended; empty when none did.
    pub last_error: String,
    /// Pods by phase.
    pub pods: std::collections::BTreeMap<String, usize>,
    /// Why the runtime does not answer; empty when it does.
    pub runtime_error: String,
    /// Bytes of the store's file.
    pub store_bytes: u64,
    /// What waits for the provider, by lane: reports and bytes.
    pub outbox: Vec<(String, u64, u64)>,
    /// Reports that were dropped, by lane and reason.
    pub drops: Vec<(String, String, u64)>,
    /// When the certificate expires.
    pub certificate_expires: String,
}

fn socket(data_dir: &Path) -> std::path::PathBuf {
    data_dir.join(SOCKET)
}
