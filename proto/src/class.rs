//! How much a site, or a pod on it, matters when the link cannot carry everything.

use std::fmt;
use std::str::FromStr;

use serde_json::Value;

use crate::link;

/// How much a site, or a pod, matters. Declared as `spec.class` of a Site; for pods see [`Class::of_priority`] and [`POD_CLASS`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Class {
    /// Noticed within seconds when it is lost; its status goes before all else.
    Critical,
    /// The ordinary one.
    #[default]
    Standard,
    /// Shed first.
    BestEffort,
}

/// The annotation, or label, by which a pod names its class.
pub const POD_CLASS: &str = "edge.skerry.dev/class";

/// A pod of this priority is critical unless the provider says otherwise: the highest that a user's PriorityClass can
/// have. The system's own (`system-cluster-critical`, `system-node-critical`) lie above.
pub const CRITICAL_PRIORITY: i32 = 1_000_000_000;

/// A string that names no class.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("{0:?} is no class: use critical, standard or best-effort")]
pub struct InvalidClass(String);

impl Class {
    /// All of them, the most important first.
    pub const ALL: [Self; 3] = [Self::Critical, Self::Standard, Self::BestEffort];

    /// As it stands in the API.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Critical => "critical",
            Self::Standard => "standard",
            Self::BestEffort => "best-effort",
        }
    }

    /// Its share where classes share something: of every 21 reports that wait, so many go first.
    pub fn weight(self) -> usize {
        match self {
            Self::Critical => 16,
            Self::Standard => 4,
            Self::BestEffort => 1,
        }
    }

    /// Code point of a site's control connection: EF (RFC 3246), CS2 (RFC 4594: operations), or the default.
    pub fn control_dscp(self) -> u8 {
        match self {
            Self::Critical => 46,
            Self::Standard => 16,
            Self::BestEffort => 0,
        }
    }

    /// Code point of a site's bulk connection: AF21 (RFC 4594: low-latency data), the default, or LE (RFC 8622).
    pub fn bulk_dscp(self) -> u8 {
        match self {
            Self::Critical => 18,
            Self::Standard => 0,
            Self::BestEffort => 1,
        }
    }

    /// The class of a Site object. One that is not known counts as standard: its schema lets none through.
    pub fn of_site(site: &Value) -> Self {
        let named = site["spec"]["class"].as_str();
        named.and_then(|name| name.parse().ok()).unwrap_or_default()
    }

    /// The class of a pod that names none: priority `critical_priority` and above is critical, below zero is best-effort.
    pub fn of_priority(priority: i32, critical_priority: i32) -> Self {
        match priority {
            _ if priority >= critical_priority => Self::Critical,
            _ if priority < 0 => Self::BestEffort,
            _ => Self::Standard,
        }
    }
}

impl FromStr for Class {
    type Err = InvalidClass;

    fn from_str(text: &str) -> Result<Self, InvalidClass> {
        let found = Self::ALL.into_iter().find(|class| class.as_str() == text);
        found.ok_or_else(|| InvalidClass(text.chars().take(80).collect()))
    }
}

impl fmt::Display for Class {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl From<Class> for link::Class {
    fn from(class: Class) -> Self {
        match class {
            Class::Critical => Self::Critical,
            Class::Standard => Self::Standard,
            Class::BestEffort => Self::BestEffort,
        }
    }
}

impl From<link::Class> for Class {
    /// An older peer names none: standard.
    fn from(class: link::Class) -> Self {
        match class {
            link::Class::Critical => Self::Critical,
            link::Class::Standard | link::Class::Unspecified => Self::Standard,
            link::Class::BestEffort => Self::BestEffort,
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_priority_makes_a_class() {
        let class = |priority| Class::of_priority(priority, CRITICAL_PRIORITY);
        assert_eq!(class(2_000_001_000), Class::Critical);
        assert_eq!(class(1_000_000_000), Class::Critical);
        assert_eq!(class(999_999_999), Class::Standard);
        assert_eq!(class(0), Class::Standard);
        assert_eq!(class(-1), Class::BestEffort);
        assert!(
            "Critical"
                .parse::<Class>()
                .unwrap_err()
                .to_string()
                .contains("\"Critical\"")
        );
    }

    #[test]
    fn a_site_without_a_class_is_standard() {
        assert_eq!(Class::of_site(&json!({})), Class::Standard);
        assert_eq!(
            Class::of_site(&json!({"spec": {"class": "critical"}})),
            Class::Critical
        );
    }

    #[test]
    fn what_matters_more_weighs_more_and_travels_by_its_name() {
        assert!(Class::Critical.weight() > Class::Standard.weight());
        assert!(Class::Standard.weight() > Class::BestEffort.weight());
        for class in Class::ALL {
            assert_eq!(Class::from(link::Class::from(class)), class);
            assert_eq!(class.to_string().parse::<Class>(), Ok(class));
        }
    }
}
