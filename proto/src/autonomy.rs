//! Policies of a site, and of a pod, for the time without its cloud: `spec.autonomy` of a Site, annotations of a Pod.
//!
//! Without a policy a site goes on for ever and nothing is replaced elsewhere.

use std::collections::BTreeMap;
use std::time::Duration;

use serde_json::Value;

/// Annotation: how long the pod may run without the cloud, `forever` or a duration such as `72h`.
pub const MAX_ALONE: &str = "edge.skerry.dev/max-alone";
/// Annotation: what then, `keep`, `stop` or `stop-for-good`.
pub const THEN: &str = "edge.skerry.dev/then";
/// Annotation: when the pod may be replaced elsewhere, `never` or after a duration.
pub const REPLACE: &str = "edge.skerry.dev/replace";

/// What happens to a pod that has been alone for too long.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Then {
    /// It goes on.
    #[default]
    Keep,
    /// It is stopped, and starts again when the cloud is back.
    Stop,
    /// It is stopped and has failed.
    StopForGood,
}

/// What a pod may do without the cloud. The edge sees to it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Alone {
    /// For how long; `None`: for ever.
    pub most: Option<Duration>,
    /// What then.
    pub then: Then,
}

impl Alone {
    /// What has become of a pod that has been alone for this long.
    pub fn after(&self, alone: Duration) -> Then {
        match self.most {
            Some(most) if alone >= most => self.then,
            _ => Then::Keep,
        }
    }
}

/// Whether the Node of a site that is away shows it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum AwayNode {
    /// Its conditions are Unknown.
    #[default]
    NotReady,
    /// They stay as they were last reported, and its lease is renewed for it.
    Ready,
}

/// The taint of ours that the Node of a site that is away has.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum AwayTaint {
    /// No new pods.
    #[default]
    NoSchedule,
    /// New pods only if there is no other place.
    PreferNoSchedule,
    /// None.
    None,
}

/// When a pod of a site that is away may be replaced elsewhere.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Replace {
    /// It stays the site's.
    #[default]
    Never,
    /// The control plane may delete it, and its controller make another, once the Node has been unreachable for this long.
    After(Duration),
}

/// The policies of a site.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Autonomy {
    /// For pods that say nothing else.
    pub alone: Alone,
    /// What the Node shows.
    pub node: AwayNode,
    /// How it is tainted.
    pub taint: AwayTaint,
    /// For pods that say nothing else.
    pub replace: Replace,
}

/// The annotations of an object.
pub type Annotations = BTreeMap<String, String>;

impl Autonomy {
    /// Reads a Site. What its schema does not let through counts as absent.
    pub fn of_site(site: &Value) -> Self {
        let spec = &site["spec"]["autonomy"];
        let text = |field: &str| spec[field].as_str();
        Self {
            alone: Alone {
                most: text("maxAlone").and_then(limit).flatten(),
                then: text("then").and_then(then).unwrap_or_default(),
            },
            node: match text("node") {
                Some("Ready") => AwayNode::Ready,
                _ => AwayNode::NotReady,
            },
            taint: match text("taint") {
                Some("None") => AwayTaint::None,
                Some("PreferNoSchedule") => AwayTaint::PreferNoSchedule,
                _ => AwayTaint::NoSchedule,
            },
            replace: text("replace").and_then(replace).unwrap_or_default(),
        }
    }

    /// What a pod may do alone, and the annotations that make no sense: for those the Site's word holds.
    ///
    /// A pod that names a limit but not what then is stopped at it, unless the Site says `stop-for-good`.
    pub fn alone_of(&self, annotations: &Annotations) -> (Alone, Vec<String>) {
        let mut wrong = Vec::new();
        let mut alone = self.alone;
        if let Some(text) = annotations.get(MAX_ALONE) {
            match limit(text) {
                Some(most) => {
                    alone.most = most;
                    if most.is_some() && alone.then == Then::Keep {
                        alone.then = Then::Stop;
                    }
                }
                None => wrong.push(format!(
                    "{MAX_ALONE}: {text:?} is neither forever nor a duration such as 72h"
                )),
            }
        }
        if let Some(text) = annotations.get(THEN) {
            match then(text) {
                Some(said) => alone.then = said,
                None => wrong.push(format!(
                    "{THEN}: {text:?} is none of keep, stop and stop-for-good"
                )),
            }
        }
        if let Some(text) = annotations.get(REPLACE)
            && replace(text).is_none()
        {
            wrong.push(format!(
                "{REPLACE}: {text:?} is neither never nor a duration such as 30m"
            ));
        }
        (alone, wrong)
    }

    /// When a pod may be replaced. An annotation that makes no sense has no effect; the edge says so.
    pub fn replace_of(&self, annotation: Option<&str>) -> Replace {
        annotation.and_then(replace).unwrap_or(self.replace)
    }
}

fn then(text: &str) -> Option<Then> {
    match text {
        "keep" => Some(Then::Keep),
        "stop" => Some(Then::Stop),
        "stop-for-good" => Some(Then::StopForGood),
        _ => None,
    }
}

/// `None`: no limit that one can read.
fn limit(text: &str) -> Option<Option<Duration>> {
    match text {
        "forever" => Some(None),
        _ => duration(text).map(Some),
    }
}

fn replace(text: &str) -> Option<Replace> {
    match text {
        "never" => Some(Replace::Never),
        _ => duration(text).map(Replace::After),
    }
}

/// `90s`, `30m`, `72h`, `7d`: a whole number and a unit, at most ten years.
fn duration(text: &str) -> Option<Duration> {
    let unit = match text.chars().last()? {
        's' => 1,
        'm' => 60,
        'h' => 3_600,
        'd' => 86_400,
        _ => return None,
    };
    let digits = text.get(..text.len() - 1)?;
    if digits.is_empty() || !digits.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    let seconds = digits.parse::<u64>().ok()?.checked_mul(unit)?;
    (seconds <= 3_653 * 86_400).then_some(Duration::from_secs(seconds))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn annotations(all: &[(&str, &str)]) -> Annotations {
        all.iter()
            .map(|(k, v)| ((*k).to_owned(), (*v).to_owned()))
            .collect()
    }

    #[test]
    fn a_site_that_says_nothing_keeps_everything_for_ever() {
        let policy = Autonomy::of_site(&json!({"spec": {}}));
        assert_eq!(policy, Autonomy::default());
        assert_eq!(policy.alone.after(Duration::MAX), Then::Keep);
        assert_eq!(policy.replace_of(None), Replace::Never);
    }

    #[test]
    fn a_site_says_all_of_it() {
        let policy = Autonomy::of_site(&json!({"spec": {"autonomy": {
            "maxAlone": "3d", "then": "stop-for-good", "node": "Ready", "taint": "None", "replace": "30m",
        }}}));
        let most = Duration::from_secs(3 * 86_400);
        assert_eq!(policy.alone.after(most - Duration::from_secs(1)), Then::Keep);
        assert_eq!(policy.alone.after(most), Then::StopForGood);
        assert_eq!((policy.node, policy.taint), (AwayNode::Ready, AwayTaint::None));
        assert_eq!(policy.replace, Replace::After(Duration::from_secs(1_800)));
    }

    #[test]
    fn a_pod_goes_over_its_site_and_what_it_says_wrongly_is_named() {
        let site = Autonomy::of_site(&json!({"spec": {"autonomy": {"maxAlone": "1h", "then": "stop"}}}));
        let hour = Duration::from_secs(3_600);
        let of = |all: &[(&str, &str)]| site.alone_of(&annotations(all));
        assert_eq!(of(&[]).0.after(hour), Then::Stop);
        assert_eq!(of(&[(MAX_ALONE, "forever")]).0.after(hour * 9_999), Then::Keep);
        assert_eq!(of(&[(MAX_ALONE, "2h")]).0.after(hour), Then::Keep);
        assert_eq!(of(&[(THEN, "stop-for-good")]).0.after(hour), Then::StopForGood);
        let (alone, wrong) = of(&[(MAX_ALONE, "1 week"), (THEN, "die"), (REPLACE, "-1s")]);
        assert_eq!(alone, site.alone);
        assert_eq!(wrong.len(), 3, "{wrong:?}");
        // A limit alone means to stop at it.
        let (alone, _) = Autonomy::default().alone_of(&annotations(&[(MAX_ALONE, "10s")]));
        assert_eq!(alone.after(Duration::from_secs(10)), Then::Stop);
    }

    #[test]
    fn durations_are_whole_numbers_with_a_unit() {
        assert_eq!(duration("0s"), Some(Duration::ZERO));
        assert_eq!(duration("7d"), Some(Duration::from_secs(604_800)));
        for wrong in [
            "",
            "h",
            "5",
            "5w",
            "+5s",
            "-5s",
            "1.5h",
            "99999999999999999999h",
            "9999d",
            "1ä",
            "ä",
        ] {
            assert_eq!(duration(wrong), None, "{wrong}");
        }
    }
}
