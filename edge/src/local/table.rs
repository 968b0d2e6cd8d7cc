//! Answers for people: tables like kubectl's, JSON, YAML.

use clap::ValueEnum;
use jiff::Timestamp;
use serde_json::{Value, json};

use super::row::{Row, age};

/// How pods are shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Output {
    /// With address and node.
    Wide,
    /// Objects.
    Json,
    /// Objects.
    Yaml,
}

/// A duration as kubectl prints an age: two units at most, coarser the longer it is.
pub fn human(seconds: u64) -> String {
    let (minutes, hours, days) = (seconds / 60, seconds / 3600, seconds / 86_400);
    let two = |big: u64, big_unit: &str, small: u64, small_unit: &str| match small {
        0 => format!("{big}{big_unit}"),
        small => format!("{big}{big_unit}{small}{small_unit}"),
    };
    match seconds {
        0..120 => format!("{seconds}s"),
        120..600 => two(minutes, "m", seconds % 60, "s"),
        600..10_800 => format!("{minutes}m"),
        10_800..28_800 => two(hours, "h", minutes % 60, "m"),
        28_800..172_800 => format!("{hours}h"),
        172_800..691_200 => two(days, "d", hours % 24, "h"),
        691_200..63_072_000 => format!("{days}d"),
        63_072_000..252_288_000 => two(days / 365, "y", days % 365, "d"),
        _ => format!("{}y", days / 365),
    }
}

/// Rows as a table with a head; empty without rows.
pub(super) fn table(rows: &[Row], all_namespaces: bool, wide: bool, now: Timestamp) -> String {
    let mut head = vec!["NAME", "READY", "STATUS", "RESTARTS", "AGE"];
    if all_namespaces {
        head.insert(0, "NAMESPACE");
    }
    if wide {
        head.extend(["IP", "NODE"]);
    }
    let mut lines = vec![head.into_iter().map(str::to_owned).collect::<Vec<_>>()];
    for row in rows {
        let restarts = match row.restarted.filter(|_| row.restarts > 0) {
            Some(then) => format!("{} ({} ago)", row.restarts, human(age(then, now))),
            None => row.restarts.to_string(),
        };
        let mut line = vec![
            row.name.clone(),
            format!("{}/{}", row.ready, row.containers),
            row.status.clone(),
            restarts,
            row.created
                .map_or("<unknown>".to_owned(), |then| human(age(then, now))),
        ];
        if all_namespaces {
            line.insert(0, row.namespace.clone());
        }
        if wide {
            let or_none = |text: &str| {
                if text.is_empty() {
                    "<none>".to_owned()
                } else {
                    text.to_owned()
                }
            };
            line.extend([or_none(&row.ip), or_none(&row.node)]);
        }
        lines.push(line);
    }
    aligned(&lines)
}

/// Columns padded to their widest cell and parted by three blanks.
fn aligned(lines: &[Vec<String>]) -> String {
    let columns = lines.first().map_or(0, Vec::len);
    let width = |column: usize| {
        lines
            .iter()
            .map(|line| line[column].chars().count())
            .max()
            .unwrap_or(0)
    };
    let widths: Vec<usize> = (0..columns).map(width).collect();
    let mut text = String::new();
    for line in lines {
        let cells = line
            .iter()
            .zip(&widths)
            .map(|(cell, width)| format!("{cell:width$}"));
        text.push_str(cells.collect::<Vec<_>>().join("   ").trim_end());
        text.push('\n');
    }
    text
}

/// Objects as kubectl prints them: one alone, several in a List.
pub(super) fn objects(mut pods: Vec<Value>, single: bool, output: Output) -> Result<String, String> {
    for pod in &mut pods {
        if let Some(metadata) = pod.get_mut("metadata").and_then(Value::as_object_mut) {
            metadata.remove("managedFields");
        }
    }
    let value = match single {
        true => pods.pop().unwrap_or_default(),
        false => {
            json!({"apiVersion": "v1", "kind": "List", "metadata": {"resourceVersion": ""}, "items": pods})
        }
    };
    match output {
        Output::Yaml => serde_norway::to_string(&value).map_err(|error| error.to_string()),
        Output::Json | Output::Wide => serde_json::to_string_pretty(&value)
            .map(|text| text + "\n")
            .map_err(|error| error.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ages_are_kubectls() {
        let ages = [
            (0, "0s"),
            (119, "119s"),
            (120, "2m"),
            (599, "9m59s"),
            (3600, "60m"),
            (10_800, "3h"),
            (12_000, "3h20m"),
            (90_000, "25h"),
            (180_000, "2d2h"),
            (864_000, "10d"),
            (70_000_000, "2y80d"),
        ];
        for (seconds, shown) in ages {
            assert_eq!(human(seconds), shown);
        }
    }

    #[test]
    fn a_table_is_aligned() {
        let now = Timestamp::from_second(1_000).unwrap();
        let rows = [
            Row {
                namespace: "n".into(),
                name: "a-long-name".into(),
                ready: 1,
                containers: 2,
                status: "Running".into(),
                restarts: 3,
                restarted: Some(940),
                created: Some(400),
                ip: "10.0.0.1".into(),
                node: "site".into(),
            },
            Row {
                namespace: "n".into(),
                name: "b".into(),
                status: "OutOfpods".into(),
                created: Some(990),
                ..Row::default()
            },
        ];
        assert_eq!(
            table(&rows, true, true, now),
            "NAMESPACE   NAME          READY   STATUS      RESTARTS      AGE   IP         NODE\n\
             n           a-long-name   1/2     Running     3 (60s ago)   10m   10.0.0.1   site\n\
             n           b             0/0     OutOfpods   0             10s   <none>     <none>\n"
        );
    }
}
