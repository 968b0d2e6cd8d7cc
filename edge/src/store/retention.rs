//! How much a site that is alone remembers to tell, and what it forgets first.
//!
//! Each report has a lane. Every lane has a limit of bytes and perhaps one of age; beyond its own limit the lane's
//! oldest report goes, and beyond the limit of all lanes the oldest of the least important lane that has any. What
//! coalesces (statuses, twins) is replaced before it is counted, so that a lane of statuses holds one for each object,
//! however long the site is alone. Every drop is counted, with the store, for as long as the store exists.

use std::time::Duration;

use skerry_proto::link::report;

/// How important a report is, the most important first. Numbers are stored: never reuse one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u8)]
pub enum Lane {
    /// Status of the Node and of critical pods.
    CriticalStatus = 0,
    /// Status of other pods, and mirror pods.
    Status = 1,
    /// Kubernetes Events.
    Events = 2,
    /// What devices report.
    Telemetry = 3,
}

impl Lane {
    /// All of them, by importance.
    pub const ALL: [Self; 4] = [Self::CriticalStatus, Self::Status, Self::Events, Self::Telemetry];

    /// The lane of a kind of report.
    pub fn of(report: &report::Report) -> Self {
        match report {
            report::Report::NodeStatus(_) => Self::CriticalStatus,
            report::Report::PodStatus(_) | report::Report::MirrorPod(_) => Self::Status,
            report::Report::Event(_) => Self::Events,
            report::Report::DeviceStatus(_) => Self::Telemetry,
        }
    }

    /// Its name in metrics and settings.
    pub fn name(self) -> &'static str {
        match self {
            Self::CriticalStatus => "critical-status",
            Self::Status => "status",
            Self::Events => "events",
            Self::Telemetry => "telemetry",
        }
    }

    pub(super) fn numbered(number: u8) -> Option<Self> {
        Self::ALL.into_iter().find(|lane| *lane as u8 == number)
    }
}

/// Why a report was dropped. Numbers are stored: never reuse one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u8)]
pub enum DropReason {
    /// It was older than its lane keeps reports.
    Age = 0,
    /// Its lane was full.
    LaneBytes = 1,
    /// The outbox was full, and its lane was the least important one.
    TotalBytes = 2,
    /// The provider will never take it: the object is gone, or refuses it.
    Refused = 3,
}

impl DropReason {
    const ALL: [Self; 4] = [Self::Age, Self::LaneBytes, Self::TotalBytes, Self::Refused];

    /// Its name in metrics.
    pub fn name(self) -> &'static str {
        match self {
            Self::Age => "age",
            Self::LaneBytes => "lane-full",
            Self::TotalBytes => "outbox-full",
            Self::Refused => "refused",
        }
    }

    pub(super) fn numbered(number: u8) -> Option<Self> {
        Self::ALL.into_iter().find(|reason| *reason as u8 == number)
    }
}

/// Limits of a lane.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LaneLimits {
    /// Older reports are dropped; `None` = whatever their age.
    pub max_age: Option<Duration>,
    /// Most bytes.
    pub max_bytes: u64,
}

/// Limits of the outbox.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Retention {
    /// In the order of [`Lane::ALL`].
    pub lanes: [LaneLimits; 4],
    /// Most bytes of all lanes together.
    pub max_bytes: u64,
}

const MIB: u64 = 1024 * 1024;
const DAY: Duration = Duration::from_secs(24 * 3600);

impl Default for Retention {
    /// Statuses of thousands of pods whatever their age; events and telemetry of a day, a few thousand of them.
    fn default() -> Self {
        let limits = |max_age, mib| LaneLimits {
            max_age,
            max_bytes: mib * MIB,
        };
        Self {
            lanes: [
                limits(None, 8),
                limits(None, 32),
                limits(Some(DAY), 1),
                limits(Some(DAY), 8),
            ],
            max_bytes: 40 * MIB,
        }
    }
}

impl Retention {
    /// A lane's limits.
    pub fn lane(&self, lane: Lane) -> LaneLimits {
        self.lanes[lane as usize]
    }
}

/// What a lane holds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LaneUse {
    /// Reports that wait.
    pub reports: u64,
    /// Their bytes as stored.
    pub bytes: u64,
}
