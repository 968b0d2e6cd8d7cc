use std::collections::BTreeMap;

use super::super::fixtures::{at, pod};
use super::*;
use serde_json::json;

fn sized(cpu: &str) -> Pod {
    pod(json!({"containers": [{"name": "c", "resources": {"requests": {"cpu": cpu}}}]}))
}

fn with_priority(cpu: &str, priority: i32) -> Pod {
    pod(json!({"priority": priority, "containers": [{"name": "c", "resources": {"requests": {"cpu": cpu}}}]}))
}

fn node() -> NodeFacts {
    NodeFacts {
        name: "n".to_owned(),
        allocatable: BTreeMap::from([("cpu".to_owned(), 2000), ("pods".to_owned(), 4000)]),
        ..NodeFacts::default()
    }
}

fn uid(name: &str) -> Uid {
    Uid::from(name)
}

fn reason(verdict: Verdict) -> String {
    match verdict {
        Verdict::Rejected(rejection) => rejection.reason,
        other => panic!("{other:?}"),
    }
}

#[test]
fn the_last_room_is_given_once() {
    let (book, _) = Ledger::new();
    assert_eq!(book.admit(&uid("a"), &sized("1500m"), &node()), Verdict::Admitted);
    assert_eq!(reason(book.admit(&uid("b"), &sized("600m"), &node())), "OutOfcpu");
    assert_eq!(book.admit(&uid("c"), &sized("500m"), &node()), Verdict::Admitted);
    book.forget(&uid("a"));
    assert_eq!(book.admit(&uid("b"), &sized("600m"), &node()), Verdict::Admitted);
}

#[test]
fn a_node_has_so_many_places() {
    let (book, _) = Ledger::new();
    for name in ["a", "b", "c", "d"] {
        assert_eq!(
            book.admit(&uid(name), &pod(json!({"containers": []})), &node()),
            Verdict::Admitted
        );
    }
    assert_eq!(
        reason(book.admit(&uid("e"), &pod(json!({"containers": []})), &node())),
        "OutOfpods"
    );
}

#[test]
fn a_pod_that_was_admitted_before_stays_on_a_smaller_node() {
    let (book, _) = Ledger::new();
    book.restore(&uid("a"), &sized("8"));
    assert_eq!(reason(book.admit(&uid("b"), &sized("1m"), &node())), "OutOfcpu");
}

#[test]
fn two_pods_do_not_share_a_port_of_the_node() {
    let (book, _) = Ledger::new();
    let with = |ip: &str| {
        pod(
            json!({"containers": [{"name": "c", "ports": [{"containerPort": 1, "hostPort": 80, "hostIP": ip}]}]}),
        )
    };
    assert_eq!(
        book.admit(&uid("a"), &with("10.0.0.1"), &node()),
        Verdict::Admitted
    );
    assert_eq!(
        book.admit(&uid("b"), &with("10.0.0.2"), &node()),
        Verdict::Admitted
    );
    assert_eq!(reason(book.admit(&uid("c"), &with(""), &node())), "NodePorts");
}

#[test]
fn a_critical_pod_gets_room_and_waits_until_it_is_there() {
    let (book, mut nudges) = Ledger::new();
    book.admit(&uid("small"), &sized("500m"), &node());
    book.admit(&uid("big"), &sized("1200m"), &node());
    let critical = with_priority("1", 2_000_000_000);
    assert_eq!(book.admit(&uid("critical"), &critical, &node()), Verdict::Waits);
    assert_eq!(nudges.try_recv().unwrap(), Nudge::Preempt(uid("big")));
    assert!(nudges.try_recv().is_err(), "the small one may stay");
    book.forget(&uid("big"));
    assert_eq!(nudges.try_recv().unwrap(), Nudge::Look(uid("critical")));
    assert!(!book.waits(&uid("critical")));
}

#[test]
fn a_critical_pod_that_no_preemption_can_help_is_refused() {
    let (book, _) = Ledger::new();
    let critical = with_priority("3", 2_000_000_000);
    assert_eq!(
        reason(book.admit(&uid("a"), &critical, &node())),
        "UnexpectedAdmissionError"
    );
    let elsewhere = pod(json!({"priority": 2_000_000_000, "nodeName": "m", "containers": []}));
    assert_eq!(reason(book.admit(&uid("b"), &elsewhere, &node())), "NodeName");
}

#[test]
fn a_resize_is_granted_deferred_or_infeasible() {
    let (book, _) = Ledger::new();
    book.admit(&uid("a"), &sized("500m"), &node());
    book.admit(&uid("b"), &sized("1"), &node());
    assert_eq!(
        book.resize(&uid("a"), &sized("1"), &node(), at(0)),
        Answer::Granted
    );
    assert_eq!(
        book.resize(&uid("a"), &sized("1500m"), &node(), at(0)),
        Answer::Deferred(
            "Node didn't have enough resource: cpu, requested: 1500, used: 1000, capacity: 2000".to_owned()
        )
    );
    assert_eq!(
        book.resize(&uid("a"), &sized("3"), &node(), at(0)),
        Answer::Infeasible(
            "Node didn't have enough capacity: cpu, requested: 3000, capacity: 2000".to_owned()
        )
    );
}

#[test]
fn deferred_resizes_get_room_by_priority_then_age() {
    let (book, mut nudges) = Ledger::new();
    for name in ["a", "b", "old", "young"] {
        book.admit(&uid(name), &sized("500m"), &node());
    }
    let deferred = |name: &str, second: i64| {
        assert!(matches!(
            book.resize(&uid(name), &sized("900m"), &node(), at(second)),
            Answer::Deferred(_)
        ));
    };
    deferred("young", 2);
    deferred("old", 1);
    book.forget(&uid("a"));
    assert_eq!(nudges.try_recv().unwrap(), Nudge::Look(uid("old")));
    assert!(nudges.try_recv().is_err());
    // What was granted is taken: nobody else gets it, and asking again is answered at once.
    assert_eq!(reason(book.admit(&uid("c"), &sized("200m"), &node())), "OutOfcpu");
    assert_eq!(
        book.resize(&uid("old"), &sized("900m"), &node(), at(3)),
        Answer::Granted
    );
    book.forget(&uid("b"));
    assert_eq!(nudges.try_recv().unwrap(), Nudge::Look(uid("young")));
}

#[test]
fn a_resize_that_frees_room_lets_another_in() {
    let (book, mut nudges) = Ledger::new();
    book.admit(&uid("a"), &sized("1500m"), &node());
    book.admit(&uid("b"), &sized("500m"), &node());
    assert!(matches!(
        book.resize(&uid("b"), &sized("1"), &node(), at(0)),
        Answer::Deferred(_)
    ));
    assert_eq!(
        book.resize(&uid("a"), &sized("500m"), &node(), at(1)),
        Answer::Granted
    );
    assert_eq!(nudges.try_recv().unwrap(), Nudge::Look(uid("b")));
}

#[test]
fn only_burstable_pods_count_for_the_shares_of_their_tier() {
    let (book, _) = Ledger::new();
    book.admit(&uid("a"), &sized("300m"), &node());
    let sure = json!({"containers": [{"name": "c", "resources": {
        "requests": {"cpu": "1", "memory": "1Mi"}, "limits": {"cpu": "1", "memory": "1Mi"}}}]});
    book.admit(&uid("b"), &pod(sure), &node());
    assert_eq!(book.burstable_cpu(), 300);
}
