//! Names that a site gives: they become part of the paths that the provider asks the API server for.
//!
//! A name with a slash or two dots in it would lead that request elsewhere, with the provider's rights. So every report is
//! looked at before anything is done with it.

use skerry_proto::link::{Report, report::Report as Body};

/// Longest name of an object, a DNS subdomain.
const LONGEST: usize = 253;
/// Longest UID that is kept: the API server's have 36 characters, those of tokens are paths below one.
const LONGEST_UID: usize = 512;

/// The field of a report that is not what it must be.
pub fn malformed(report: &Report) -> Option<&'static str> {
    let (namespace, name, uid) = match report.report.as_ref()? {
        Body::PodStatus(status) => (&status.namespace, &status.name, &status.uid),
        Body::DeviceStatus(status) => (&status.namespace, &status.name, &status.uid),
        Body::MirrorPod(mirror) => {
            return [("namespace", &mirror.namespace), ("name", &mirror.name)]
                .into_iter()
                .find_map(|(field, value)| (!is_name(value)).then_some(field));
        }
        Body::Event(event) => {
            // Of what has no namespace it is empty.
            if !(event.namespace.is_empty() || is_name(&event.namespace)) {
                return Some("namespace");
            }
            let kind = !event.kind.is_empty() && event.kind.bytes().all(|c| c.is_ascii_alphanumeric());
            if !kind {
                return Some("kind");
            }
            return not_a("name", is_name(&event.name)).or(not_a("uid", is_uid(&event.uid)));
        }
        Body::NodeStatus(_) => return None,
    };
    not_a("namespace", is_name(namespace))
        .or(not_a("name", is_name(name)))
        .or(not_a("uid", is_uid(uid)))
}

fn not_a(field: &'static str, good: bool) -> Option<&'static str> {
    (!good).then_some(field)
}

/// Whether this is a DNS subdomain, as names of Pods, Devices and namespaces are.
fn is_name(text: &str) -> bool {
    let label = |label: &str| {
        let inner = |c: u8| c.is_ascii_lowercase() || c.is_ascii_digit();
        let bytes = label.as_bytes();
        bytes.iter().all(|c| inner(*c) || *c == b'-')
            && bytes.first().is_some_and(|c| inner(*c))
            && bytes.last().is_some_and(|c| inner(*c))
    };
    text.len() <= LONGEST && text.split('.').all(label)
}

fn is_uid(text: &str) -> bool {
    text.len() <= LONGEST_UID && text.bytes().all(|c| c.is_ascii_graphic())
}

#[cfg(test)]
mod tests {
    use skerry_proto::link::{DeviceStatusReport, EventReport, MirrorPodReport, PodStatusReport};

    use super::*;

    fn of(body: Body) -> Option<&'static str> {
        malformed(&Report {
            report: Some(body),
            ..Default::default()
        })
    }

    #[test]
    fn a_name_that_would_lead_a_request_elsewhere_is_none() {
        for bad in [
            "",
            "..",
            "../v1",
            "a/b",
            "a%2fb",
            "A",
            "a.",
            ".a",
            "-a",
            "a-",
            "a b",
            "a\n",
            "a?x",
            &"a".repeat(254),
        ] {
            let pod = PodStatusReport {
                namespace: "ns".into(),
                name: bad.into(),
                ..Default::default()
            };
            assert_eq!(of(Body::PodStatus(pod)), Some("name"), "{bad:?}");
            let device = DeviceStatusReport {
                namespace: bad.into(),
                name: "d".into(),
                ..Default::default()
            };
            assert_eq!(of(Body::DeviceStatus(device)), Some("namespace"), "{bad:?}");
            let mirror = MirrorPodReport {
                namespace: "ns".into(),
                name: bad.into(),
                ..Default::default()
            };
            assert_eq!(of(Body::MirrorPod(mirror)), Some("name"), "{bad:?}");
        }
    }

    #[test]
    fn what_the_cluster_calls_its_objects_passes() {
        let pod = PodStatusReport {
            namespace: "kube-system".into(),
            name: "web-0.example-7".into(),
            uid: "9f1c0b1e-7a64-4c7e-8d0a-0d4f6d7d6f10".into(),
            ..Default::default()
        };
        assert_eq!(of(Body::PodStatus(pod)), None);
        let node = EventReport {
            kind: "Node".into(),
            name: "harbour".into(),
            uid: "harbour".into(),
            ..Default::default()
        };
        assert_eq!(of(Body::Event(node)), None);
        let event = EventReport {
            kind: "Pod/../Secret".into(),
            name: "p".into(),
            ..Default::default()
        };
        assert_eq!(of(Body::Event(event)), Some("kind"));
    }
}
