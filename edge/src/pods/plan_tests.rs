use super::*;
use crate::pods::fixtures::{at, container, exited, pod, record_of, running, sandbox};
use jiff::Timestamp;
use serde_json::{Value, json};

/// How long ago things are at that second.
fn since(now: i64) -> impl Fn(Timestamp) -> Duration {
    move |then| Duration::try_from(at(now).duration_since(then)).unwrap_or_default()
}

fn spec(policy: &str) -> Value {
    json!({"restartPolicy": policy, "containers": [{"name": "c", "image": "busybox"}]})
}

fn with_inits(policy: &str) -> Value {
    json!({
        "restartPolicy": policy,
        "initContainers": [
            {"name": "i0", "image": "busybox"},
            {"name": "side", "image": "busybox", "restartPolicy": "Always"},
            {"name": "i1", "image": "busybox"},
        ],
        "containers": [{"name": "c", "image": "busybox"}, {"name": "d", "image": "busybox"}],
    })
}

fn planned(spec: Value, containers: Vec<crate::runtime::Container>) -> Plan {
    let pod = pod(spec);
    let (record, view) = record_of(&pod, containers);
    plan(&pod, &record, &view, true, &[], &since(100))
}

fn started(plan: &Plan) -> Vec<(&str, u32)> {
    plan.steps
        .iter()
        .map(|s| match s {
            Step::Start {
                name, restart_count, ..
            } => (name.as_str(), *restart_count),
            other => panic!("{other:?}"),
        })
        .collect()
}

#[test]
fn a_new_pod_gets_a_sandbox_first_and_nothing_else() {
    let pod = pod(spec("Always"));
    let plan = plan(
        &pod,
        &PodRecord::default(),
        &View::default(),
        true,
        &[],
        &since(0),
    );
    assert_eq!(
        plan.steps,
        [Step::Sandbox {
            attempt: 0,
            changed: false
        }]
    );
}

#[test]
fn with_a_sandbox_all_regular_containers_start_together() {
    let spec = json!({"containers": [{"name": "c", "image": "i"}, {"name": "d", "image": "i"}]});
    assert_eq!(started(&planned(spec, vec![])), [("c", 0), ("d", 0)]);
}

#[test]
fn a_running_container_of_the_same_hash_is_left_alone() {
    assert_eq!(
        planned(spec("Always"), vec![container("c", "1", 4, running(0))]),
        Plan::default()
    );
}

#[test]
fn a_changed_image_kills_the_container_regardless_of_policy() {
    let old = pod(spec("Never"));
    let (record, view) = record_of(&old, vec![container("c", "1", 0, running(0))]);
    let mut new = old.clone();
    new.spec.as_mut().unwrap().containers[0].image = Some("busybox:2".into());
    let plan = plan(&new, &record, &view, true, &[], &since(1));
    assert!(
        matches!(&plan.steps[..], [Step::Kill { message, .. }, Step::Start { restart_count: 1, .. }]
        if message == "Container c definition changed, will be restarted")
    );
}

#[test]
fn the_restart_policy_decides_what_follows_an_exit() {
    for (policy, code, restarts) in [
        ("Always", 0, true),
        ("Always", 1, true),
        ("OnFailure", 0, false),
        ("OnFailure", 1, true),
        ("Never", 0, false),
        ("Never", 1, false),
    ] {
        let plan = planned(spec(policy), vec![container("c", "1", 2, exited(50, code))]);
        let expected: &[(&str, u32)] = if restarts { &[("c", 3)] } else { &[] };
        assert_eq!(started(&plan), expected, "{policy} {code}");
    }
}

#[test]
fn a_restart_rule_wins_over_the_policies() {
    let spec = json!({"restartPolicy": "Never", "containers": [{"name": "c", "image": "i", "restartPolicy": "Never",
        "restartPolicyRules": [{"action": "Restart", "exitCodes": {"operator": "In", "values": [42]}}]}]});
    assert_eq!(
        started(&planned(
            spec.clone(),
            vec![container("c", "1", 0, exited(50, 42))]
        )),
        [("c", 1)]
    );
    assert_eq!(
        planned(spec, vec![container("c", "1", 0, exited(50, 1))]),
        Plan::default()
    );
}

#[test]
fn a_second_crash_waits_for_the_back_off_and_then_starts() {
    let pod = pod(spec("Always"));
    let (mut record, view) = record_of(&pod, vec![container("c", "1", 1, exited(95, 1))]);
    record.containers.get_mut("c").unwrap().backoff =
        Some(Backoff::step(None, "busybox", at(90), at(90), &|_| {
            Duration::ZERO
        }));
    let early = plan(&pod, &record, &view, true, &[], &since(100));
    assert_eq!(early.steps, []);
    assert_eq!(early.waits[0].remaining, Duration::from_secs(5));
    assert_eq!(
        started(&plan(&pod, &record, &view, true, &[], &since(105))),
        [("c", 2)]
    );
}

#[test]
fn a_container_that_was_made_but_never_started_is_replaced_under_its_number() {
    let plan = planned(
        spec("Never"),
        vec![container("c", "1", 3, crate::runtime::ContainerState::Created)],
    );
    assert!(
        matches!(&plan.steps[..], [Step::Start { restart_count: 3, discard: Some(id), .. }] if id == "1")
    );
}

#[test]
fn init_containers_run_one_by_one() {
    assert_eq!(started(&planned(with_inits("Always"), vec![])), [("i0", 0)]);
    let i0 = container("i0", "a", 0, exited(1, 0));
    assert_eq!(
        started(&planned(with_inits("Always"), vec![i0.clone()])),
        [("side", 0)]
    );
    let side = container("side", "b", 0, running(2));
    assert_eq!(
        started(&planned(with_inits("Always"), vec![i0.clone(), side.clone()])),
        [("i1", 0)]
    );
    let i1 = container("i1", "e", 0, running(3));
    assert_eq!(
        planned(with_inits("Always"), vec![i0.clone(), side.clone(), i1]),
        Plan::default()
    );
    let i1 = container("i1", "e", 0, exited(3, 0));
    assert_eq!(
        started(&planned(with_inits("Always"), vec![i0, side, i1])),
        [("c", 0), ("d", 0)]
    );
}

#[test]
fn a_sidecar_that_has_not_started_holds_the_next_init_container_back() {
    let pod = pod(with_inits("Always"));
    let (mut record, view) = record_of(
        &pod,
        vec![
            container("i0", "a", 0, exited(1, 0)),
            container("side", "b", 0, running(2)),
        ],
    );
    record.containers.get_mut("side").unwrap().started = false;
    assert_eq!(plan(&pod, &record, &view, true, &[], &since(5)), Plan::default());
}

#[test]
fn a_failed_init_container_restarts_unless_the_policy_is_never() {
    let failed = container("i0", "a", 0, exited(1, 1));
    assert_eq!(
        started(&planned(with_inits("Always"), vec![failed.clone()])),
        [("i0", 1)]
    );
    assert_eq!(
        started(&planned(with_inits("OnFailure"), vec![failed.clone()])),
        [("i0", 1)]
    );
    assert_eq!(planned(with_inits("Never"), vec![failed]), Plan::default());
}

#[test]
fn a_sidecar_that_exits_later_restarts_even_when_the_pod_never_restarts() {
    let plan = planned(
        with_inits("Never"),
        vec![
            container("i0", "a", 0, exited(1, 0)),
            container("side", "b", 0, exited(9, 0)),
            container("i1", "e", 0, exited(3, 0)),
            container("c", "f", 0, running(4)),
            container("d", "g", 0, running(4)),
        ],
    );
    assert_eq!(started(&plan), [("side", 1)]);
}

#[test]
fn once_initialised_missing_init_containers_are_taken_as_done() {
    let plan = planned(
        with_inits("Always"),
        vec![
            container("side", "b", 0, running(2)),
            container("c", "f", 0, running(4)),
            container("d", "g", 0, running(4)),
        ],
    );
    assert_eq!(plan, Plan::default());
}

fn after_reboot(policy: &str, containers: Vec<crate::runtime::Container>) -> (Pod, PodRecord) {
    let pod = pod(spec(policy));
    let (mut record, _) = record_of(&pod, containers);
    record.observe(&View::default(), at(200), |_| String::new());
    (pod, record)
}

#[test]
fn after_a_reboot_a_restartable_pod_gets_its_next_sandbox_and_a_higher_count() {
    let (pod, mut record) = after_reboot("Always", vec![container("c", "1", 2, running(0))]);
    let first = plan(&pod, &record, &View::default(), true, &[], &since(200));
    assert_eq!(
        first.steps,
        [Step::Sandbox {
            attempt: 1,
            changed: true
        }]
    );
    let view = View::new(vec![sandbox("s2", 1)], vec![]);
    record.observe(&view, at(201), |_| String::new());
    assert_eq!(
        started(&plan(&pod, &record, &view, true, &[], &since(201))),
        [("c", 3)]
    );
}

#[test]
fn after_a_reboot_a_pod_that_never_restarts_gets_no_new_sandbox() {
    let (pod, record) = after_reboot("Never", vec![container("c", "1", 0, running(0))]);
    assert_eq!(
        plan(&pod, &record, &View::default(), true, &[], &since(200)),
        Plan::default()
    );
}

#[test]
fn after_a_reboot_a_container_that_succeeded_under_on_failure_is_not_run_again() {
    let (pod, record) = after_reboot("OnFailure", vec![container("c", "1", 0, exited(5, 0))]);
    assert_eq!(
        plan(&pod, &record, &View::default(), true, &[], &since(200)),
        Plan::default()
    );
}

#[test]
fn a_new_sandbox_starts_again_from_the_first_init_container() {
    let pod = pod(with_inits("Always"));
    let (mut record, _) = record_of(
        &pod,
        vec![
            container("i0", "a", 0, exited(1, 0)),
            container("side", "b", 0, running(2)),
            container("i1", "e", 0, exited(3, 0)),
            container("c", "f", 0, running(4)),
            container("d", "g", 0, running(4)),
        ],
    );
    let view = View::new(vec![sandbox("s2", 1)], vec![]);
    record.observe(&view, at(50), |_| String::new());
    assert_eq!(
        started(&plan(&pod, &record, &view, true, &[], &since(51))),
        [("i0", 1)]
    );
}

#[test]
fn a_crashed_container_of_an_older_sandbox_does_not_wait_for_its_back_off() {
    let pod = pod(spec("Always"));
    let (mut record, _) = record_of(&pod, vec![container("c", "1", 1, exited(95, 1))]);
    record.containers.get_mut("c").unwrap().backoff =
        Some(Backoff::step(None, "busybox", at(95), at(95), &|_| {
            Duration::ZERO
        }));
    let view = View::new(
        vec![sandbox("s2", 1)],
        vec![container("c", "1", 1, exited(95, 1))],
    );
    record.observe(&view, at(96), |_| String::new());
    assert_eq!(
        started(&plan(&pod, &record, &view, true, &[], &since(96))),
        [("c", 2)]
    );
}

#[test]
fn a_sandbox_without_an_address_or_with_the_wrong_network_is_replaced() {
    let pod = pod(spec("Always"));
    let mut s = sandbox("s", 0);
    s.ips.clear();
    assert!(!sandbox_fits(&pod, &View::new(vec![s.clone()], vec![]), true));
    assert!(sandbox_fits(&pod, &View::new(vec![s], vec![]), false));
    let two = View::new(vec![sandbox("s", 0), sandbox("t", 1)], vec![]);
    assert!(!sandbox_fits(&pod, &two, true));
}

#[test]
fn a_failed_liveness_probe_kills_that_instance_only() {
    let pod = pod(spec("Always"));
    let (record, view) = record_of(&pod, vec![container("c", "1", 0, running(0))]);
    let verdict = |id: &str| Condemned {
        id: id.into(),
        probe: "liveness",
        grace: None,
    };
    assert_eq!(
        plan(&pod, &record, &view, true, &[verdict("0")], &since(1)),
        Plan::default()
    );
    let killed = plan(&pod, &record, &view, true, &[verdict("1")], &since(1));
    assert!(
        matches!(&killed.steps[..], [Step::Kill { message, .. }, Step::Start { restart_count: 1, .. }]
        if message == "Container c failed liveness probe, will be restarted")
    );
}

#[test]
fn a_restart_by_a_probe_waits_only_while_the_end_of_the_instance_before_is_in_its_back_off() {
    let pod = pod(spec("Always"));
    let before = vec![container("c", "0", 0, exited(10, 1))];
    let (mut record, _) = record_of(&pod, before);
    let now = vec![container("c", "1", 1, running(11))];
    let (other, view) = record_of(&pod, now.clone());
    record.observe(&View::new(vec![sandbox("s", 0)], now), at(11), |_| String::new());
    record.containers.get_mut("c").unwrap().last = other.containers["c"].last.clone();
    let backoff = Backoff::step(None, "busybox", at(10), at(11), &|_| Duration::ZERO);
    record.containers.get_mut("c").unwrap().backoff = Some(backoff);
    let condemned = [Condemned {
        id: "1".into(),
        probe: "startup",
        grace: Some(Duration::from_secs(3)),
    }];
    let steps = |now| plan(&pod, &record, &view, true, &condemned, &since(now)).steps;
    assert!(
        matches!(&steps(19)[..], [Step::Kill { grace: Some(g), .. }] if g.as_secs() == 3),
        "{:?}",
        steps(19)
    );
    assert!(matches!(&steps(20)[..], [Step::Kill { .. }, Step::Start { after: Some(e), .. }] if e.id == "0"));
}

#[test]
fn a_pod_under_deletion_restarts_nothing() {
    let mut pod = pod(spec("Always"));
    pod.metadata.deletion_timestamp = Some(k8s_openapi::apimachinery::pkg::apis::meta::v1::Time(at(0)));
    assert!(!restarts(&pod, &regulars(&pod)[0], 1));
}

fn with_rule(action: &str, operator: &str) -> Value {
    json!({
        "restartPolicy": "Never",
        "initContainers": [{"name": "i", "image": "busybox"}],
        "containers": [
            {"name": "c", "image": "busybox", "restartPolicy": "Never", "restartPolicyRules": [
                {"action": action, "exitCodes": {"operator": operator, "values": [42]}}]},
            {"name": "d", "image": "busybox"},
        ],
    })
}

#[test]
fn a_restart_rule_wins_over_the_policy_for_the_codes_that_it_names() {
    for (operator, code, again) in [
        ("In", 42, true),
        ("In", 1, false),
        ("NotIn", 42, false),
        ("NotIn", 0, true),
    ] {
        let pod = pod(with_rule("Restart", operator));
        assert_eq!(
            restarts(&pod, &regulars(&pod)[0], code),
            again,
            "{operator} {code}"
        );
    }
}

#[test]
fn a_rule_for_all_containers_takes_the_pod_to_its_beginning_and_others_do_not() {
    let ended = |code| {
        vec![
            container("i", "0", 0, exited(1, 0)),
            container("c", "1", 0, exited(9, code)),
            container("d", "2", 0, running(2)),
        ]
    };
    let all = with_rule("RestartAllContainers", "In");
    assert_eq!(planned(all.clone(), ended(42)).steps, [Step::RestartAll]);
    assert_eq!(planned(all.clone(), ended(41)).steps, []);
    let one = planned(with_rule("Restart", "In"), ended(42));
    assert_eq!(started(&one), [("c", 1)]);
    // Once all are removed, it begins with the first init container, and nothing waits for a back-off.
    let pod = pod(all);
    let (mut record, view) = record_of(&pod, ended(42));
    for known in record.containers.values_mut() {
        let last = known.last.as_mut().unwrap();
        (last.lost, last.state) = (true, State::Unknown);
    }
    let next = plan(&pod, &record, &view, true, &[], &since(10));
    assert_eq!(started(&next), [("i", 1)]);
}

#[test]
fn an_ephemeral_container_starts_once_even_while_the_pod_initialises() {
    let mut debugged = with_inits("Always");
    debugged["ephemeralContainers"] = json!([{"name": "e", "image": "busybox"}]);
    let up = container("i0", "0", 0, running(1));
    let first = planned(debugged.clone(), vec![up.clone()]);
    assert_eq!(started(&first), [("e", 0)]);
    for state in [running(2), exited(3, 1)] {
        let later = planned(debugged.clone(), vec![up.clone(), container("e", "1", 0, state)]);
        assert_eq!(started(&later), []);
    }
}
