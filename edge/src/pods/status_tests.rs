use super::*;
use crate::pods::fixtures::{at, container, exited, pod, record_of, running};
use crate::pods::record::View;
use serde_json::{Value, json};

fn context(waiting: &BTreeMap<String, Waiting>) -> Context<'_> {
    Context {
        scheme: "containerd",
        host_ip: Some("192.168.0.9".parse().unwrap()),
        pod_ips: &[],
        sandbox_ready: true,
        waiting,
        now: at(500),
    }
}

fn spec(policy: &str) -> Value {
    json!({"restartPolicy": policy, "containers": [{"name": "c", "image": "busybox"}]})
}

fn find<'a>(status: &'a PodStatus, kind: &str) -> &'a PodCondition {
    status
        .conditions
        .iter()
        .flatten()
        .find(|c| c.type_ == kind)
        .unwrap()
}

#[test]
fn a_running_pod_is_ready_and_every_condition_carries_the_generation() {
    let pod = pod(spec("Always"));
    let (record, _) = record_of(&pod, vec![container("c", "id", 0, running(3))]);
    let status = build(&pod, &record, &context(&BTreeMap::new()));
    assert_eq!(status.phase.as_deref(), Some("Running"));
    assert_eq!(status.observed_generation, Some(1));
    for condition in status.conditions.iter().flatten() {
        assert_eq!(
            (condition.status.as_str(), condition.observed_generation),
            ("True", Some(1)),
            "{condition:?}"
        );
    }
    let c = &status.container_statuses.unwrap()[0];
    assert_eq!(c.container_id.as_deref(), Some("containerd://id"));
    assert!(c.ready && c.started == Some(true));
}

#[test]
fn a_transition_time_moves_only_with_its_status() {
    let pod = pod(spec("Always"));
    let (mut record, _) = record_of(&pod, vec![container("c", "id", 0, running(3))]);
    let empty = BTreeMap::new();
    record.status = Some(build(&pod, &record, &context(&empty)));
    let mut later = context(&empty);
    later.now = at(900);
    let same = build(&pod, &record, &later);
    assert_eq!(find(&same, "Ready").last_transition_time, Some(Time(at(500))));
    record.containers.get_mut("c").unwrap().ready = false;
    let changed = build(&pod, &record, &later);
    assert_eq!(find(&changed, "Ready").last_transition_time, Some(Time(at(900))));
    assert_eq!(
        find(&changed, "Initialized").last_transition_time,
        Some(Time(at(500)))
    );
    assert_eq!(
        find(&changed, "Ready").message.as_deref(),
        Some("containers with unready status: [c]")
    );
}

#[test]
fn a_crashed_container_in_back_off_waits_and_shows_its_end_as_the_last_state() {
    let pod = pod(spec("Always"));
    let (record, _) = record_of(&pod, vec![container("c", "id", 2, exited(9, 7))]);
    let waiting = BTreeMap::from([(
        "c".to_owned(),
        Waiting {
            reason: "CrashLoopBackOff".into(),
            message: "back-off".into(),
        },
    )]);
    let status = build(&pod, &record, &context(&waiting));
    assert_eq!(status.phase.as_deref(), Some("Running"));
    let c = &status.container_statuses.unwrap()[0];
    assert_eq!(
        c.state
            .as_ref()
            .unwrap()
            .waiting
            .as_ref()
            .unwrap()
            .reason
            .as_deref(),
        Some("CrashLoopBackOff")
    );
    assert_eq!(
        c.last_state
            .as_ref()
            .unwrap()
            .terminated
            .as_ref()
            .unwrap()
            .exit_code,
        7
    );
    assert_eq!(c.restart_count, 2);
}

#[test]
fn a_vanished_container_waits_with_the_restart_already_counted() {
    let pod = pod(spec("Always"));
    let (mut record, _) = record_of(&pod, vec![container("c", "id", 2, running(9))]);
    record.observe(&View::default(), at(20), |_| String::new());
    let empty = BTreeMap::new();
    let status = build(
        &pod,
        &record,
        &Context {
            sandbox_ready: false,
            ..context(&empty)
        },
    );
    let c = &status.container_statuses.unwrap()[0];
    assert_eq!(c.restart_count, 3);
    let end = c.last_state.as_ref().unwrap().terminated.as_ref().unwrap();
    assert_eq!(
        (end.exit_code, end.reason.as_deref()),
        (137, Some("ContainerStatusUnknown"))
    );
}

#[test]
fn phases_follow_policy_and_exit_codes() {
    for (policy, code, expected) in [
        ("Always", 0, Phase::Running),
        ("Always", 1, Phase::Running),
        ("OnFailure", 0, Phase::Succeeded),
        ("OnFailure", 1, Phase::Running),
        ("Never", 0, Phase::Succeeded),
        ("Never", 1, Phase::Failed),
    ] {
        let pod = pod(spec(policy));
        let (record, _) = record_of(&pod, vec![container("c", "id", 0, exited(9, code))]);
        assert_eq!(phase(&pod, &record), expected, "{policy} {code}");
    }
}

#[test]
fn a_failed_init_container_of_a_pod_that_never_restarts_fails_the_pod() {
    let mut value = spec("Never");
    value["initContainers"] = json!([{"name": "i", "image": "busybox"}]);
    let pod = pod(value);
    let (record, _) = record_of(&pod, vec![container("i", "id", 0, exited(9, 1))]);
    assert_eq!(phase(&pod, &record), Phase::Failed);
    let (record, _) = record_of(&pod, vec![container("i", "id", 0, running(9))]);
    assert_eq!(phase(&pod, &record), Phase::Pending);
    let status = build(&pod, &record, &context(&BTreeMap::new()));
    assert_eq!(
        find(&status, "Initialized").message.as_deref(),
        Some("containers with incomplete status: [i]")
    );
}

#[test]
fn a_terminal_phase_is_withheld_until_everything_is_released() {
    let pod = pod(spec("Never"));
    let (mut record, _) = record_of(&pod, vec![container("c", "id", 0, exited(9, 0))]);
    record.end = Some(super::super::record::End {
        succeeded: true,
        ..Default::default()
    });
    assert_eq!(
        build(&pod, &record, &context(&BTreeMap::new())).phase.as_deref(),
        Some("Running")
    );
    record.released = true;
    let status = build(&pod, &record, &context(&BTreeMap::new()));
    assert_eq!(status.phase.as_deref(), Some("Succeeded"));
    assert_eq!(find(&status, "Ready").reason.as_deref(), Some("PodCompleted"));
    assert_eq!(
        find(&status, "Initialized").reason.as_deref(),
        Some("PodCompleted")
    );
}

#[test]
fn a_new_pod_waits_for_its_containers_by_the_right_name() {
    let simple = build(
        &pod(spec("Always")),
        &PodRecord::default(),
        &context(&BTreeMap::new()),
    );
    let state = simple.container_statuses.unwrap()[0].state.clone().unwrap();
    assert_eq!(
        state.waiting.unwrap().reason.as_deref(),
        Some("ContainerCreating")
    );
    let mut value = spec("Always");
    value["initContainers"] = json!([{"name": "i", "image": "busybox"}]);
    let with_init = build(&pod(value), &PodRecord::default(), &context(&BTreeMap::new()));
    let state = with_init.container_statuses.unwrap()[0].state.clone().unwrap();
    assert_eq!(state.waiting.unwrap().reason.as_deref(), Some("PodInitializing"));
}

#[test]
fn an_ephemeral_container_shows_its_state_and_changes_nothing_else() {
    let mut debugged = spec("Never");
    debugged["ephemeralContainers"] =
        json!([{"name": "e", "image": "busybox"}, {"name": "a", "image": "busybox"}]);
    let pod = pod(debugged);
    let up = container("c", "id", 0, running(3));
    let (record, _) = record_of(&pod, vec![up, container("e", "e0", 0, exited(5, 7))]);
    let status = build(&pod, &record, &context(&BTreeMap::new()));
    assert_eq!(
        (status.phase.as_deref(), find(&status, "Ready").status.as_str()),
        (Some("Running"), "True")
    );
    let all = status.ephemeral_container_statuses.unwrap();
    let waiting = all[0].state.as_ref().unwrap().waiting.as_ref().unwrap();
    assert_eq!(
        (all[0].name.as_str(), waiting.reason.as_deref()),
        ("a", Some("ContainerCreating"))
    );
    assert_eq!(
        all[1]
            .state
            .as_ref()
            .unwrap()
            .terminated
            .as_ref()
            .unwrap()
            .exit_code,
        7
    );
    assert_eq!((all[1].ready, all[1].started), (false, None));
}

#[test]
fn a_pod_that_starts_again_as_a_whole_says_so_and_stays_running() {
    let mut all = spec("Never");
    all["containers"][0]["restartPolicy"] = json!("Never");
    all["containers"][0]["restartPolicyRules"] =
        json!([{"action": "RestartAllContainers", "exitCodes": {"operator": "In", "values": [42]}}]);
    let pod = pod(all);
    let (mut record, _) = record_of(&pod, vec![container("c", "id", 4, exited(3, 42))]);
    let none = BTreeMap::new();
    let idle = build(&pod, &record, &context(&none));
    assert_eq!(find(&idle, "AllContainersRestarting").status, "False");
    record.restarting_all = true;
    let busy = build(&pod, &record, &context(&none));
    let condition = find(&busy, "AllContainersRestarting");
    assert_eq!(
        (condition.status.as_str(), condition.reason.as_deref()),
        ("True", Some("RestartAllContainersStarted"))
    );
    let known = record.containers.get_mut("c").unwrap();
    known.previous = Some(Ended {
        id: "id".into(),
        started: None,
        finished: at(6),
        code: 137,
        reason: restart_all::REASON.into(),
        message: String::new(),
        vanished: false,
    });
    let last = known.last.as_mut().unwrap();
    (last.lost, last.state) = (true, State::Unknown);
    record.restarting_all = false;
    let words = Waiting {
        reason: restart_all::REASON.into(),
        message: "gone".into(),
    };
    let waiting = BTreeMap::from([("c".to_owned(), words)]);
    let status = build(&pod, &record, &context(&waiting));
    assert_eq!(status.phase.as_deref(), Some("Running"));
    let c = &status.container_statuses.unwrap()[0];
    let (state, last) = (c.state.as_ref().unwrap(), c.last_state.as_ref().unwrap());
    assert_eq!(
        state.waiting.as_ref().unwrap().reason.as_deref(),
        Some("RestartingAllContainers")
    );
    assert_eq!(
        (c.restart_count, last.terminated.as_ref().unwrap().exit_code),
        (5, 137)
    );
}

#[test]
fn readiness_gates_decide_once_the_containers_are_ready() {
    let mut gated = spec("Always");
    gated["readinessGates"] = json!([{"conditionType": "example.com/in"}]);
    let mut pod = pod(gated);
    let (record, _) = record_of(&pod, vec![container("c", "id", 0, running(3))]);
    let none = BTreeMap::new();
    let missing = build(&pod, &record, &context(&none));
    let ready = find(&missing, "Ready");
    assert_eq!(ready.reason.as_deref(), Some("ReadinessGatesNotReady"));
    assert_eq!(
        ready.message.as_deref(),
        Some("corresponding condition of pod readiness gate \"example.com/in\" does not exist.")
    );
    assert_eq!(find(&missing, "ContainersReady").status, "True");
    for (value, wanted) in [("False", "False"), ("True", "True")] {
        pod.status =
            serde_json::from_value(json!({"conditions": [{"type": "example.com/in", "status": value}]}))
                .unwrap();
        assert_eq!(
            find(&build(&pod, &record, &context(&none)), "Ready").status,
            wanted
        );
    }
}
