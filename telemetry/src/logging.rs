//! One line per event on standard error, plain or JSON.

use std::io::IsTerminal;
use std::str::FromStr;

use tracing_subscriber::filter::{LevelFilter, Targets};
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;

/// How log lines look.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum LogFormat {
    /// For people.
    #[default]
    Text,
    /// One JSON object a line.
    Json,
}

impl FromStr for LogFormat {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "text" => Ok(Self::Text),
            "json" => Ok(Self::Json),
            other => Err(format!("{other:?} is not a log format: use text or json")),
        }
    }
}

/// What is logged: directives with commas between, each a level for all (`info`), a target with its level
/// (`skerry_edge::link=debug`) or a target alone, of which everything is logged. The longest target counts.
///
/// Spans and fields cannot be chosen by: what reads such directives (`EnvFilter`) brings an engine for regular expressions
/// along, too much for a site's small machine.
fn targets(filter: &str) -> Result<Targets, String> {
    let unreadable = |reason: &str| format!("log filter {filter:?}: {reason}");
    let mut targets = Targets::new();
    for directive in filter.split(',').map(str::trim).filter(|text| !text.is_empty()) {
        if directive.contains(['[', '{']) {
            return Err(unreadable(&format!(
                "{directive:?} chooses by span or field, which is not supported: use TARGET=LEVEL or LEVEL"
            )));
        }
        let (target, level) = match directive.split_once('=') {
            Some((target, level)) => (Some(target), level),
            None if directive.parse::<LevelFilter>().is_ok() => (None, directive),
            None => (Some(directive), "trace"),
        };
        let level: LevelFilter = level.parse().map_err(|_| {
            unreadable(&format!(
                "{level:?} is not a level: use off, error, warn, info, debug or trace"
            ))
        })?;
        targets = match target {
            Some(target) => targets.with_target(target, level),
            None => targets.with_default(level),
        };
    }
    Ok(targets)
}

/// Starts logging for the whole process. `filter` is one or more directives such as `info,skerry_edge=debug`: a level, a
/// target with its level, or a target alone.
///
/// Errors name the directive that cannot be read. A second call has no effect.
pub fn init(filter: &str, format: LogFormat) -> Result<(), String> {
    let targets = targets(filter)?;
    let lines = tracing_subscriber::fmt::layer()
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal());
    // The only error is that a subscriber is set already, as in tests that start two programs in one process.
    let registry = tracing_subscriber::registry().with(targets);
    let _ = match format {
        LogFormat::Text => registry.with(lines).try_init(),
        LogFormat::Json => registry.with(lines.json()).try_init(),
    };
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use tracing::Level;

    fn says(filter: &str, target: &str, level: Level) -> bool {
        targets(filter).unwrap().would_enable(target, &level)
    }

    #[test]
    fn the_longest_target_of_a_filter_counts_and_a_bare_level_is_for_all_others() {
        let filter = "info, skerry_edge=debug,skerry_edge::link=warn,hyper=off,redb";
        for (target, most) in [
            ("kube::client", Level::INFO),
            ("skerry_edge::pods", Level::DEBUG),
            ("skerry_edge::link::session", Level::WARN),
            ("redb::tree", Level::TRACE),
        ] {
            for level in [Level::ERROR, Level::WARN, Level::INFO, Level::DEBUG, Level::TRACE] {
                assert_eq!(says(filter, target, level), level <= most, "{target} {level}");
            }
        }
        assert!(!says(filter, "hyper::proto", Level::ERROR));
    }

    #[test]
    fn a_filter_that_cannot_be_read_is_refused_by_its_name() {
        for (filter, named) in [
            ("info,skerry_edge=loud", "\"loud\" is not a level"),
            ("skerry_edge=debug=info", "\"debug=info\" is not a level"),
            ("[session{site=harbour}]=debug", "chooses by span or field"),
        ] {
            let error = targets(filter).unwrap_err();
            assert!(error.contains(named) && error.contains("log filter"), "{error}");
        }
    }
}
