//! Slices: the same values as properties, set through `systemctl`, so that systemd knows them and keeps them.

use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use tokio::process::Command;

use super::{PERIOD, Values, weight};

/// systemd answers within milliseconds, or hangs.
const LIMIT: Duration = Duration::from_secs(30);

/// Properties of a slice on v1 or v2.
fn properties(v2: bool, values: &Values) -> Vec<String> {
    let mut out = vec!["CPUAccounting=yes".to_owned(), "MemoryAccounting=yes".to_owned()];
    if let Some(shares) = values.cpu_shares {
        out.push(if v2 {
            format!("CPUWeight={}", weight(shares))
        } else {
            format!("CPUShares={shares}")
        });
    }
    if let Some(quota) = values.cpu_quota {
        // A percentage of one processor; systemd rounds up to whole ones of 10 ms, as runc does for it.
        out.push(if quota < 0 {
            "CPUQuota=".to_owned()
        } else {
            format!("CPUQuota={}%", (quota * 100 + PERIOD - 1) / PERIOD)
        });
    }
    if let Some(bytes) = values.memory_bytes {
        let name = if v2 { "MemoryMax" } else { "MemoryLimit" };
        out.push(if bytes < 0 {
            format!("{name}=infinity")
        } else {
            format!("{name}={bytes}")
        });
    }
    if let Some(pids) = values.pids {
        out.push("TasksAccounting=yes".to_owned());
        out.push(format!("TasksMax={pids}"));
    }
    out
}

/// Starts a slice, whose parents systemd starts itself, and gives it its values until the next boot.
pub(super) async fn apply(slice: &str, v2: bool, values: &Values) -> Result<(), String> {
    systemctl(&["start", slice]).await?;
    let properties = properties(v2, values);
    let mut args = vec!["set-property", "--runtime", slice];
    args.extend(properties.iter().map(String::as_str));
    systemctl(&args).await
}

/// Ends a slice and everything in it.
pub(super) async fn stop(slice: &str) -> Result<(), String> {
    systemctl(&["stop", slice]).await?;
    // The properties of a slice that is gone stay as files below /run until they are reverted.
    systemctl(&["revert", slice]).await
}

/// This machine was booted with systemd.
pub(super) fn is_there() -> bool {
    Path::new("/run/systemd/system").is_dir()
}

async fn systemctl(args: &[&str]) -> Result<(), String> {
    let run = Command::new("systemctl")
        .args(args)
        .stdin(Stdio::null())
        .kill_on_drop(true)
        .output();
    let said = match tokio::time::timeout(LIMIT, run).await {
        Err(_) => return Err(format!("systemctl {} does not end", args.join(" "))),
        Ok(Err(error)) => return Err(format!("systemctl cannot be run: {error}")),
        Ok(Ok(output)) => output,
    };
    if said.status.success() {
        return Ok(());
    }
    let text = String::from_utf8_lossy(&said.stderr);
    Err(format!("systemctl {}: {}", args.join(" "), text.trim()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_become_properties_of_either_version() {
        let values = Values {
            cpu_shares: Some(1024),
            cpu_quota: Some(25_000),
            memory_bytes: Some(-1),
            pids: Some(9),
            ..Values::default()
        };
        let text = properties(true, &values).join(" ");
        assert!(
            text.ends_with("CPUWeight=39 CPUQuota=25% MemoryMax=infinity TasksAccounting=yes TasksMax=9"),
            "{text}"
        );
        let text = properties(false, &values).join(" ");
        assert!(
            text.contains("CPUShares=1024") && text.contains("MemoryLimit=infinity"),
            "{text}"
        );
    }

    #[test]
    fn no_quota_removes_the_one_that_is_set() {
        let values = Values {
            cpu_quota: Some(-1),
            ..Values::default()
        };
        assert!(properties(true, &values).contains(&"CPUQuota=".to_owned()));
    }
}
