//! The daemon's end of the socket.

use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use nix::unistd::Gid;
use skerry_proto::link::Kind;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{Semaphore, mpsc, watch};
use tokio_util::sync::CancellationToken;

use super::{Line, QUESTION_BYTES, Question, Row, SiteStatus, socket};
use crate::identity::Identity;
use crate::link::LinkStatus;
use crate::pods::{Pods, StaticPods};
use crate::store::{Lane, Store};
use crate::streams::PodLookup;

/// Members may ask, where there is such a group.
const GROUP: &str = "skerry";
/// Where groups of this machine stand. Not asked of the name service: its libraries would stay in memory for this.
const GROUPS: &str = "/etc/group";
/// Connections at one time.
const CONNECTIONS: usize = 8;
/// How long a client may take for its question, and for reading each line of the answer.
const PATIENCE: Duration = Duration::from_secs(10);
/// Lines under way to a client.
const QUEUE: usize = 32;

/// What the answers are made from.
pub struct Local {
    /// The objects.
    pub store: Store,
    /// The pods in numbers, and those from files.
    pub pods: Pods,
    /// Finds a pod with the status that the site knows.
    pub lookup: Arc<dyn PodLookup>,
    /// The link's state.
    pub link: watch::Receiver<LinkStatus>,
    /// The certificate.
    pub identity: watch::Receiver<Arc<Identity>>,
}

/// Answers until `stop`. A socket that cannot be made is an operator's matter and stops nothing.
pub async fn serve(data_dir: PathBuf, local: Local, stop: CancellationToken) {
    let path = socket(&data_dir);
    let listener = match listen(&path) {
        Ok(listener) => listener,
        Err(error) => {
            tracing::error!(path = %path.display(), %error, "there is no local socket: skerry-edge pods will not work");
            return;
        }
    };
    let (local, places) = (Arc::new(local), Arc::new(Semaphore::new(CONNECTIONS)));
    loop {
        let accepted = tokio::select! {
            () = stop.cancelled() => break,
            accepted = listener.accept() => accepted,
        };
        let Ok((stream, _)) = accepted else {
            // Out of descriptors, say: not to be tried again at once.
            tokio::time::sleep(Duration::from_millis(100)).await;
            continue;
        };
        // The semaphore is never closed.
        let Ok(place) = Arc::clone(&places).acquire_owned().await else {
            break;
        };
        let local = Arc::clone(&local);
        tokio::spawn(async move {
            if let Err(error) = answer(stream, local).await {
                tracing::debug!(%error, "a local question could not be answered");
            }
            drop(place);
        });
    }
    let _ = std::fs::remove_file(&path);
}

fn listen(path: &Path) -> io::Result<UnixListener> {
    // Left by a daemon that was killed; the store's lock says that no other runs.
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let listener = UnixListener::bind(path)?;
    let group = std::fs::read_to_string(GROUPS).unwrap_or_default();
    let group = group_of(&group, GROUP);
    let shared = group.is_some_and(|group| nix::unistd::chown(path, None, Some(group)).is_ok());
    let mode = if shared { 0o660 } else { 0o600 };
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode))?;
    Ok(listener)
}

/// The number of a group in the text of [`GROUPS`].
fn group_of(groups: &str, name: &str) -> Option<Gid> {
    groups.lines().find_map(|line| {
        let mut fields = line.split(':');
        (fields.next() == Some(name)).then_some(())?;
        fields.nth(1)?.parse().ok().map(Gid::from_raw)
    })
}

async fn answer(stream: UnixStream, local: Arc<Local>) -> io::Result<()> {
    let (read, mut write) = stream.into_split();
    let mut text = String::new();
    let mut read = BufReader::new(read.take(QUESTION_BYTES));
    tokio::time::timeout(PATIENCE, read.read_line(&mut text)).await??;
    let (lines, mut queue) = mpsc::channel(QUEUE);
    // The store's reads block.
    let work = tokio::task::spawn_blocking(move || {
        let last = match serde_json::from_str(&text) {
            Ok(question) => tell(&local, &question, &lines),
            Err(error) => Err(format!("the question cannot be read: {error}")),
        };
        let last = last.map_or_else(Line::Error, |()| Line::End);
        let _ = lines.blocking_send(last);
    });
    while let Some(line) = queue.recv().await {
        let mut json = serde_json::to_vec(&line).map_err(io::Error::other)?;
        json.push(b'\n');
        tokio::time::timeout(PATIENCE, write.write_all(&json)).await??;
    }
    work.await.map_err(io::Error::other)
}

type Lines = mpsc::Sender<Line>;

/// Sends the answer but for its last line. Blocking.
fn tell(local: &Local, question: &Question, lines: &Lines) -> Result<(), String> {
    match question {
        Question::Status => {
            let status = status(local)?;
            let _ = lines.blocking_send(Line::Status(Box::new(status)));
            Ok(())
        }
        Question::Pods {
            namespace,
            name,
            whole,
        } => {
            // Names first: no snapshot of the store is held while a client reads.
            for (namespace, name) in names(local, namespace.as_deref(), name.as_deref())? {
                let Some(pod) = local.lookup.pod(&namespace, &name) else {
                    continue;
                };
                let line = match whole {
                    true => {
                        let mut value = serde_json::to_value(&pod).map_err(|error| error.to_string())?;
                        value["apiVersion"] = "v1".into();
                        value["kind"] = "Pod".into();
                        Line::Pod(value)
                    }
                    false => Line::Row(Row::of(&pod)),
                };
                if lines.blocking_send(line).is_err() {
                    // Nobody reads on.
                    return Ok(());
                }
            }
            Ok(())
        }
    }
}

/// Namespaces and names of the pods that are asked for, in order: stored ones, and those from files.
fn names(
    local: &Local,
    namespace: Option<&str>,
    name: Option<&str>,
) -> Result<std::collections::BTreeSet<(String, String)>, String> {
    let wanted = |its_namespace: &str, its_name: &str| {
        namespace.is_none_or(|n| n == its_namespace) && name.is_none_or(|n| n == its_name)
    };
    let mut names = std::collections::BTreeSet::new();
    let read = local.store.each(Kind::Pod, |object| {
        if wanted(&object.namespace, &object.name) {
            names.insert((object.namespace, object.name));
        }
    });
    read.map_err(|error| error.to_string())?;
    if let StaticPods::Known(statics) = &*local.pods.statics().borrow() {
        for pod in statics.values() {
            let namespace = pod.metadata.namespace.clone().unwrap_or_default();
            let name = pod.metadata.name.clone().unwrap_or_default();
            if wanted(&namespace, &name) {
                names.insert((namespace, name));
            }
        }
    }
    Ok(names)
}

fn status(local: &Local) -> Result<SiteStatus, String> {
    let failed = |error: crate::store::StoreError| error.to_string();
    let link = local.link.borrow().clone();
    let summary = local.pods.summary().borrow().clone();
    let used = local.store.outbox_use().map_err(failed)?;
    let drops = local.store.drops().map_err(failed)?;
    let lane =
        |(lane, used): (&Lane, &crate::store::LaneUse)| (lane.name().to_owned(), used.reports, used.bytes);
    Ok(SiteStatus {
        online: link.online,
        since: link.since.to_string(),
        synced: link.synced,
        last_error: link.last_error,
        pods: summary.by_phase,
        runtime_error: summary.runtime_error,
        store_bytes: local.store.size_bytes(),
        outbox: Lane::ALL.iter().zip(&used).map(lane).collect(),
        drops: drops
            .iter()
            .map(|(lane, reason, count)| (lane.name().to_owned(), reason.name().to_owned(), *count))
            .collect(),
        certificate_expires: local.identity.borrow().not_after.to_string(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_group_is_found_by_its_whole_name() {
        let text = "root:x:0:\nskerry-dev:x:5:\nskerry:x:998:ann,bob\nbroken\n";
        assert_eq!(group_of(text, "skerry"), Some(Gid::from_raw(998)));
        assert_eq!(group_of(text, "bob"), None);
        assert_eq!(group_of("skerry:x:many:\nskerry:x\n", "skerry"), None);
    }
}
