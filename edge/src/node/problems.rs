//! What goes wrong with the node, and what gets well again, as events.
//!
//! Conditions show a state, events its changes: a Node's history is read in them. Source: kubelet, setters of node
//! status and the watcher of the kernel's log.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom};
use std::os::unix::fs::OpenOptionsExt;

use serde_json::Value;
use skerry_proto::SiteName;
use tokio::io::unix::AsyncFd;
use tokio_util::sync::CancellationToken;

use crate::pods::{Level, NodeEvents};
use crate::readable::readable;
use crate::store::Store;

/// The room's name for its records in the store.
const ROOM: &str = "node";
const BOOT: &str = "boot";
/// The kernel's log.
const KERNEL_LOG: &str = "/dev/kmsg";
/// Longest record of the kernel's log.
const RECORD_BYTES: usize = 8192;

/// Says that the node starts, and whether the machine was restarted since it last ran here.
pub(super) async fn say_start(store: &Store, events: &NodeEvents, node: &SiteName, boot_id: &str) {
    let text = "Starting kubelet.".to_owned();
    events.emit(node, Level::Normal, "Starting", text).await;
    let before = store.state_get::<String>(ROOM, BOOT).unwrap_or_else(|error| {
        tracing::warn!(%error, "the last boot is not known");
        None
    });
    if before.as_deref() == Some(boot_id) || boot_id.is_empty() {
        return;
    }
    if before.is_some() {
        let text = format!("Node {node} has been rebooted, boot id: {boot_id}");
        events.emit(node, Level::Warning, "Rebooted", text).await;
    }
    if let Err(error) = store.state_put(ROOM, BOOT, &boot_id) {
        tracing::warn!(%error, "this boot could not be written down");
    }
}

/// Says which conditions have changed between two statuses. `None` is before the first.
pub(super) async fn say_changes(events: &NodeEvents, node: &SiteName, old: Option<&Value>, new: &Value) {
    for reason in changes(old, new) {
        let text = format!("Node {node} status is now: {reason}");
        events.emit(node, Level::Normal, reason, text).await;
    }
}

fn changes(old: Option<&Value>, new: &Value) -> Vec<&'static str> {
    const NAMES: [(&str, &str, &str); 5] = [
        (
            "MemoryPressure",
            "NodeHasInsufficientMemory",
            "NodeHasSufficientMemory",
        ),
        ("DiskPressure", "NodeHasDiskPressure", "NodeHasNoDiskPressure"),
        ("PIDPressure", "NodeHasInsufficientPID", "NodeHasSufficientPID"),
        (super::skew::KIND, "NodeClockSkewed", "NodeClockInStep"),
        ("Ready", "NodeReady", "NodeNotReady"),
    ];
    NAMES
        .iter()
        .filter_map(|(kind, yes, no)| {
            let status = |of: &Value| {
                let all = of["conditions"].as_array()?;
                all.iter().find(|c| c["type"] == *kind)?["status"]
                    .as_str()
                    .map(str::to_owned)
            };
            let (before, now) = (old.and_then(status), status(new)?);
            // A node that starts is not ready yet, and one whose clock is right has nothing to tell.
            let quiet = *kind == "Ready" || *kind == super::skew::KIND;
            let news =
                before.as_deref() != Some(now.as_str()) && !(before.is_none() && quiet && now != "True");
            news.then_some(if now == "True" { *yes } else { *no })
        })
        .collect()
}

/// Says when the kernel kills a process because the machine as a whole has no memory left. Where its log cannot be
/// read, as in a container, nothing is said.
pub(super) async fn watch_kernel(events: NodeEvents, node: SiteName, stop: CancellationToken) {
    let log = match open() {
        Ok(log) => log,
        Err(error) => {
            tracing::info!(%error, "the kernel's log cannot be read: a machine without memory is not told in events");
            return;
        }
    };
    let read = async {
        loop {
            match next(&log).await {
                Ok(record) => {
                    if let Some((process, pid)) = victim(&record) {
                        let text = format!("System OOM encountered, victim process: {process}, pid: {pid}");
                        tracing::error!(
                            process,
                            pid,
                            "the machine has no memory left; the kernel killed a process"
                        );
                        events.emit(&node, Level::Warning, "SystemOOM", text).await;
                    }
                }
                // Records were overwritten before they could be read.
                Err(error) if error.kind() == io::ErrorKind::BrokenPipe => {}
                Err(error) => {
                    tracing::warn!(%error, "the kernel's log cannot be read any more");
                    return;
                }
            }
        }
    };
    tokio::select! {
        () = stop.cancelled() => {}
        () = read => {}
    }
}

fn open() -> io::Result<AsyncFd<File>> {
    let mut log = OpenOptions::new()
        .read(true)
        .custom_flags(nix::libc::O_NONBLOCK)
        .open(KERNEL_LOG)?;
    log.seek(SeekFrom::End(0))?;
    readable(log)
}

async fn next(log: &AsyncFd<File>) -> io::Result<String> {
    let mut buffer = [0; RECORD_BYTES];
    loop {
        let mut ready = log.readable().await?;
        match ready.try_io(|file| file.get_ref().read(&mut buffer)) {
            Ok(Ok(0)) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(Ok(count)) => return Ok(String::from_utf8_lossy(&buffer[..count]).into_owned()),
            Ok(Err(error)) => return Err(error),
            Err(_not_yet) => {}
        }
    }
}

/// The process of a record such as `Out of memory: Killed process 12 (name) total-vm:…`. A container that reached its
/// own limit (`Memory cgroup out of memory: …`) is another matter.
fn victim(record: &str) -> Option<(&str, u32)> {
    let text = record.split_once(';')?.1;
    let rest = text.strip_prefix("Out of memory: Killed process ")?;
    let (pid, rest) = rest.split_once(" (")?;
    // A name may itself hold parentheses.
    let line = rest.lines().next()?;
    let end = line.find(") total-vm").or_else(|| line.rfind(')'))?;
    Some((&line[..end], pid.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn status(memory: &str, ready: &str) -> Value {
        json!({"conditions": [{"type": "MemoryPressure", "status": memory}, {"type": "Ready", "status": ready}]})
    }

    #[test]
    fn only_changes_are_news() {
        let (calm, short) = (status("False", "True"), status("True", "True"));
        assert_eq!(changes(Some(&calm), &calm), Vec::<&str>::new());
        assert_eq!(changes(Some(&calm), &short), ["NodeHasInsufficientMemory"]);
        assert_eq!(changes(Some(&short), &calm), ["NodeHasSufficientMemory"]);
        assert_eq!(changes(Some(&calm), &status("False", "False")), ["NodeNotReady"]);
        assert_eq!(changes(None, &calm), ["NodeHasSufficientMemory", "NodeReady"]);
        assert_eq!(
            changes(None, &status("False", "False")),
            ["NodeHasSufficientMemory"]
        );
    }

    #[test]
    fn a_machine_without_memory_is_told_from_a_container_at_its_limit() {
        let system =
            "4,1,2,-;Out of memory: Killed process 12 (a (b) c) total-vm:1kB, anon-rss:2kB\n SUB=x\n";
        assert_eq!(victim(system), Some(("a (b) c", 12)));
        let container = "4,1,2,-;Memory cgroup out of memory: Killed process 12 (a) total-vm:1kB\n";
        assert_eq!(victim(container), None);
        assert_eq!(victim("nonsense"), None);
    }

    #[tokio::test]
    async fn a_restart_of_the_machine_is_told_once_and_the_first_start_is_none() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        let events = NodeEvents::new(store.clone(), std::sync::Arc::new(crate::clock::SystemClock));
        let node: SiteName = "n".parse().unwrap();
        let mut told = Vec::new();
        for boot in ["one", "one", "two", "two"] {
            say_start(&store, &events, &node, boot).await;
            // Events are queued: what is written after them is written when they are.
            let after = store.queue_state_end(ROOM, "nothing");
            after.on_disk().await.unwrap();
            let all = store.waiting_reports(0, 100).unwrap();
            let rebooted = all
                .iter()
                .filter(|r| format!("{r:?}").contains("Rebooted"))
                .count();
            told.push(rebooted);
        }
        assert_eq!(told, [0, 0, 1, 1]);
    }
}
