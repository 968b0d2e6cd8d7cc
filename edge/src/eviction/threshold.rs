//! Thresholds: which signal, how low, for how long.

use std::collections::BTreeMap;
use std::fmt;
use std::time::Duration;

use k8s_openapi::apimachinery::pkg::api::resource::Quantity;
use skerry_proto::device::parse_duration;

use crate::pods::quantity;

/// What can run short. The order is that in which it is acted upon: memory first, it kills fastest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Signal {
    /// Memory that is not in any working set.
    MemoryAvailable,
    /// Bytes on the file system of volumes and logs.
    NodeFsAvailable,
    /// Inodes there.
    NodeFsInodesFree,
    /// Bytes on the file system of images.
    ImageFsAvailable,
    /// Inodes there.
    ImageFsInodesFree,
    /// Bytes on the file system of writable layers.
    ContainerFsAvailable,
    /// Inodes there.
    ContainerFsInodesFree,
    /// Process ids.
    PidAvailable,
}

impl Signal {
    const ALL: [Self; 8] = [
        Self::MemoryAvailable,
        Self::NodeFsAvailable,
        Self::NodeFsInodesFree,
        Self::ImageFsAvailable,
        Self::ImageFsInodesFree,
        Self::ContainerFsAvailable,
        Self::ContainerFsInodesFree,
        Self::PidAvailable,
    ];

    /// As settings name it.
    pub fn name(self) -> &'static str {
        match self {
            Self::MemoryAvailable => "memory.available",
            Self::NodeFsAvailable => "nodefs.available",
            Self::NodeFsInodesFree => "nodefs.inodesFree",
            Self::ImageFsAvailable => "imagefs.available",
            Self::ImageFsInodesFree => "imagefs.inodesFree",
            Self::ContainerFsAvailable => "containerfs.available",
            Self::ContainerFsInodesFree => "containerfs.inodesFree",
            Self::PidAvailable => "pid.available",
        }
    }

    /// What pods use of it, as messages name it.
    pub fn resource(self) -> &'static str {
        match self {
            Self::MemoryAvailable => "memory",
            Self::NodeFsAvailable | Self::ImageFsAvailable | Self::ContainerFsAvailable => {
                "ephemeral-storage"
            }
            Self::NodeFsInodesFree | Self::ImageFsInodesFree | Self::ContainerFsInodesFree => "inodes",
            Self::PidAvailable => "pids",
        }
    }

    /// Removing images and dead containers helps.
    pub fn is_disk(self) -> bool {
        !matches!(self, Self::MemoryAvailable | Self::PidAvailable)
    }

    /// Its values are bytes.
    pub fn is_bytes(self) -> bool {
        matches!(self.resource(), "memory" | "ephemeral-storage")
    }
}

/// A value, absolute or of the capacity.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Amount {
    /// Bytes, inodes or process ids.
    Absolute(u64),
    /// A share of the capacity, 0 to 1.
    Share(f64),
}

impl Amount {
    /// The value for a capacity.
    #[allow(
        clippy::cast_precision_loss,
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss
    )]
    pub fn of(self, capacity: u64) -> u64 {
        match self {
            Self::Absolute(value) => value,
            Self::Share(share) => (capacity as f64 * share) as u64,
        }
    }

    fn parse(text: &str) -> Option<Self> {
        if let Some(percent) = text.strip_suffix('%') {
            let percent: f64 = percent.parse().ok()?;
            return (0.0..=100.0)
                .contains(&percent)
                .then_some(Self::Share(percent / 100.0));
        }
        let value = quantity::value(&Quantity(text.to_owned()))?;
        u64::try_from(value).ok().map(Self::Absolute)
    }
}

/// When a signal is too low.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Threshold {
    /// Of what.
    pub signal: Signal,
    /// Below this.
    pub below: Amount,
    /// For so long before pods are evicted; zero is a hard threshold.
    pub grace: Duration,
    /// Once it was too low, it must rise so far above.
    pub reclaim: Amount,
}

impl Threshold {
    /// Evicts at once and without the pod's own grace.
    pub fn is_hard(&self) -> bool {
        self.grace.is_zero()
    }
}

/// A setting that is not understood; names the key and the part.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("{key}: {part:?} is wrong: {problem}")]
pub struct ThresholdError {
    key: &'static str,
    part: String,
    problem: String,
}

/// The four settings that make thresholds, as a kubelet's flags have them.
#[derive(Clone, Debug, Default)]
pub struct Texts {
    /// `memory.available<100Mi,nodefs.available<10%`.
    pub hard: Option<String>,
    /// Likewise.
    pub soft: Option<String>,
    /// `memory.available=1m30s`.
    pub soft_grace: Option<String>,
    /// `memory.available=50Mi`.
    pub reclaim: Option<String>,
}

/// What holds unless told otherwise.
const HARD: &str = "memory.available<100Mi,nodefs.available<10%,nodefs.inodesFree<5%,imagefs.available<15%,\
                    imagefs.inodesFree<5%";

impl Texts {
    /// Reads them all. An empty hard setting means none.
    pub fn parse(self) -> Result<Vec<Threshold>, ThresholdError> {
        let grace = pairs(
            "eviction-soft-grace-period",
            self.soft_grace.as_deref().unwrap_or_default(),
            '=',
        )?;
        let reclaim = pairs(
            "eviction-minimum-reclaim",
            self.reclaim.as_deref().unwrap_or_default(),
            '=',
        )?;
        let hard = pairs("eviction-hard", self.hard.as_deref().unwrap_or(HARD), '<')?;
        let soft = pairs("eviction-soft", self.soft.as_deref().unwrap_or_default(), '<')?;
        let amount = |key: &'static str, signal: Signal, text: &str| {
            Amount::parse(text).ok_or_else(|| ThresholdError {
                key,
                part: format!("{}: {text}", signal.name()),
                problem: "a quantity such as 100Mi or a percentage is needed".to_owned(),
            })
        };
        let mut thresholds = Vec::new();
        for (signal, text) in &hard {
            thresholds.push((*signal, amount("eviction-hard", *signal, text)?, Duration::ZERO));
        }
        for (signal, text) in &soft {
            let wrong = |problem: String| ThresholdError {
                key: "eviction-soft-grace-period",
                part: signal.name().to_owned(),
                problem,
            };
            let grace = grace
                .get(signal)
                .ok_or_else(|| wrong("a soft threshold needs a grace period".to_owned()))?;
            let grace = parse_duration(grace).map_err(|error| wrong(error.to_string()))?;
            if grace.is_zero() {
                return Err(wrong("it must be above zero".to_owned()));
            }
            thresholds.push((*signal, amount("eviction-soft", *signal, text)?, grace));
        }
        thresholds
            .into_iter()
            .map(|(signal, below, grace)| {
                let reclaim = match reclaim.get(&signal) {
                    Some(text) => amount("eviction-minimum-reclaim", signal, text)?,
                    None => Amount::Absolute(0),
                };
                Ok(Threshold {
                    signal,
                    below,
                    grace,
                    reclaim,
                })
            })
            .collect()
    }
}

fn pairs(key: &'static str, text: &str, separator: char) -> Result<BTreeMap<Signal, String>, ThresholdError> {
    let mut found = BTreeMap::new();
    for part in text.split(',').map(str::trim).filter(|part| !part.is_empty()) {
        let wrong = |problem: String| ThresholdError {
            key,
            part: part.to_owned(),
            problem,
        };
        let (name, value) = part
            .split_once(separator)
            .ok_or_else(|| wrong(format!("it must look like signal{separator}value")))?;
        let signal = Signal::ALL
            .into_iter()
            .find(|signal| signal.name() == name.trim())
            .ok_or_else(|| {
                let names = Signal::ALL.map(Signal::name).join(", ");
                wrong(format!("there is no such signal; known are {names}"))
            })?;
        if found.insert(signal, value.trim().to_owned()).is_some() {
            return Err(wrong("it is given twice".to_owned()));
        }
    }
    Ok(found)
}

impl fmt::Display for Amount {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Absolute(value) => Bytes(*value).fmt(f),
            // Settings have at most a few digits; what binary fractions add to them is cut off.
            Self::Share(share) => write!(f, "{}%", (share * 100_000.0).round() / 1000.0),
        }
    }
}

/// Bytes as Kubernetes prints them: the largest binary unit that divides them.
pub(super) struct Bytes(pub(super) u64);

impl fmt::Display for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut value = self.0;
        let mut units = ["", "Ki", "Mi", "Gi", "Ti", "Pi"].iter();
        let mut unit = units.next().copied().unwrap_or_default();
        while value != 0 && value.is_multiple_of(1024) {
            let Some(next) = units.next() else { break };
            value /= 1024;
            unit = next;
        }
        write!(f, "{value}{unit}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_defaults_are_a_kubelets() {
        let all = Texts::default().parse().unwrap();
        assert_eq!(all.len(), 5);
        assert!(all.iter().all(Threshold::is_hard));
        let memory = all.iter().find(|t| t.signal == Signal::MemoryAvailable).unwrap();
        assert_eq!(memory.below, Amount::Absolute(100 << 20));
        let images = all.iter().find(|t| t.signal == Signal::ImageFsAvailable).unwrap();
        assert_eq!(images.below.of(1000), 150);
    }

    #[test]
    fn soft_thresholds_have_their_grace_and_all_their_reclaim() {
        let texts = Texts {
            hard: Some(String::new()),
            soft: Some("memory.available<1Gi, pid.available<1000".into()),
            soft_grace: Some("memory.available=1m30s,pid.available=10s".into()),
            reclaim: Some("memory.available=10%".into()),
        };
        let all = texts.parse().unwrap();
        assert_eq!(all.len(), 2);
        assert_eq!(all[0].grace, Duration::from_secs(90));
        assert_eq!(all[0].reclaim, Amount::Share(0.1));
        assert_eq!(all[1].reclaim, Amount::Absolute(0));
    }

    #[test]
    fn an_amount_is_printed_as_it_is_set() {
        for text in ["100Mi", "10%", "0.5%", "1000", "29%"] {
            assert_eq!(Amount::parse(text).unwrap().to_string(), text);
        }
    }

    #[test]
    fn what_is_wrong_is_named_with_its_key() {
        let hard = |text: &str| Texts {
            hard: Some(text.into()),
            ..Texts::default()
        };
        for (texts, words) in [
            (hard("memory<1Mi"), "known are memory.available"),
            (hard("memory.available=1Mi"), "signal<value"),
            (hard("memory.available<lots"), "eviction-hard"),
            (hard("memory.available<101%"), "percentage"),
            (hard("memory.available<1Mi,memory.available<2Mi"), "twice"),
            (
                Texts {
                    soft: Some("memory.available<1Gi".into()),
                    ..Texts::default()
                },
                "needs a grace period",
            ),
        ] {
            let error = texts.parse().unwrap_err().to_string();
            assert!(error.contains(words), "{error:?} should contain {words:?}");
        }
    }

    #[test]
    fn bytes_are_printed_in_the_largest_unit_that_fits() {
        let text = |n: u64| Bytes(n).to_string();
        assert_eq!(text(100 << 20), "100Mi");
        assert_eq!(text(3000 * 1024), "3000Ki");
        assert_eq!((text(0), text(1023)), ("0".into(), "1023".into()));
    }
}
