//! Resizing a running pod: judging what its spec asks for, and doing what was granted.
//!
//! The pod's own cgroup is widened before any container gets more, and narrowed after all have got less: a child must
//! never have more than its parent. A container whose policy asks for it is restarted instead, by the plan
//! ([`needs_restart`]). Source: a kubelet's `doPodResizeAction` and its allocation manager.

use k8s_openapi::api::core::v1::{Container, Pod, ResourceRequirements};
use serde_json::json;

use super::admission::NodeFacts;
use super::allocation::{Actuated, Allocation, Pending, Progress, Sizes};
use super::events::Level;
use super::ledger::Answer;
use super::plan::{inits, regulars};
use super::record::{PodRecord, State};
use super::resources;
use super::worker::{RETRY, SyncError, Worker};
use crate::cgroup::Values;
use crate::runtime::ContainerId;

/// A running container that gets other values in place.
struct Change<'a> {
    container: &'a Container,
    id: String,
    from: Sizes,
    to: Sizes,
}

/// What a running container was last given, and its id.
fn running<'a>(record: &'a PodRecord, container: &Container) -> Option<(&'a Actuated, &'a str)> {
    let known = record.containers.get(&container.name)?;
    let last = known.last.as_ref()?;
    let runs = matches!(last.state, State::Running(_)) && record.is_current(last);
    Some((known.actuated.as_ref()?, last.id.as_str())).filter(|_| runs)
}

/// A running container must be restarted to get what it was allocated. `pod` carries the allocation.
pub(super) fn needs_restart(pod: &Pod, container: &Container, record: &PodRecord) -> bool {
    let Some((has, _)) = running(record, container) else {
        return false;
    };
    let wants = Sizes::of(pod, container);
    let asks = |name: &str| {
        let policy = container
            .resize_policy
            .iter()
            .flatten()
            .find(|p| p.resource_name == name);
        policy.is_some_and(|p| p.restart_policy == "RestartContainer")
    };
    (!has.sizes.same_cpu(&wants) && asks("cpu")) || (!has.sizes.same_memory(&wants) && asks("memory"))
}

fn changes<'a>(pod: &'a Pod, record: &PodRecord) -> Vec<Change<'a>> {
    let mut found: Vec<Change<'a>> = inits(pod)
        .iter()
        .chain(regulars(pod))
        .filter_map(|container| {
            let (has, id) = running(record, container)?;
            let to = Sizes::of(pod, container);
            (has.sizes != to && !needs_restart(pod, container, record)).then(|| Change {
                container,
                id: id.to_owned(),
                from: has.sizes,
                to,
            })
        })
        .collect();
    // Those that give back come first.
    found.sort_by_key(|c| c.to.memory_limit > c.from.memory_limit || c.to.cpu_limit > c.from.cpu_limit);
    found
}

/// The wider of two values each; `None` in `wanted` leaves what there is.
fn widest(now: &Values, wanted: &Values) -> Values {
    let limit = |now: Option<i64>, wanted: Option<i64>| match (now, wanted) {
        (Some(now), Some(wanted)) if now < 0 || wanted < 0 => Some(-1),
        (Some(now), Some(wanted)) => Some(now.max(wanted)),
        (_, wanted) => wanted,
    };
    Values {
        cpu_shares: now.cpu_shares.max(wanted.cpu_shares),
        cpu_quota: limit(now.cpu_quota, wanted.cpu_quota),
        memory_bytes: limit(now.memory_bytes, wanted.memory_bytes),
        ..wanted.clone()
    }
}

/// What an event of a resize says: the resources that the spec asks for, as JSON.
fn summary(pod: &Pod, what: &str, generation: Option<i64>, error: &str) -> String {
    let list = |containers: &[Container]| -> Vec<_> {
        containers
            .iter()
            .map(|c| json!({"name": c.name, "resources": c.resources.clone().unwrap_or_default()}))
            .collect()
    };
    let mut text = String::from("{");
    let (inits, regulars) = (list(inits(pod)), list(regulars(pod)));
    if !inits.is_empty() {
        text += &format!("\"initContainers\":{},", json!(inits));
    }
    text += &format!(
        "\"containers\":{},\"generation\":{}",
        json!(regulars),
        generation.unwrap_or(0)
    );
    if !error.is_empty() {
        text += &format!(",\"error\":{}", json!(error));
    }
    format!("Pod resize {what}: {text}}}")
}

impl Worker {
    /// Compares what the spec asks for with what was given; answers what is given now.
    pub(super) async fn judge_resize(
        &mut self,
        pod: &Pod,
        given: Allocation,
    ) -> Result<Allocation, SyncError> {
        let wished = Allocation::of(pod);
        if wished == given {
            if self.record.resize.pending.take().is_some() {
                self.shared.ledger.no_wish(&self.uid);
                self.save()?;
            }
            return Ok(given);
        }
        let now = self.shared.clock.now();
        let answer = if resources::is_static(pod) {
            Answer::Infeasible("In-place resize of static-pods is not supported".to_owned())
        } else {
            let facts = NodeFacts::now(&self.shared);
            let wished_pod = wished.apply(pod);
            self.shared.ledger.resize(&self.uid, &wished_pod, &facts, now)
        };
        let generation = pod.metadata.generation;
        let (infeasible, message) = match answer {
            Answer::Granted => {
                self.record.allocated = Some(wished.clone());
                self.record.resize.pending = None;
                self.record.resize.progress = Some(Progress {
                    error: None,
                    generation,
                });
                self.save()?;
                let text = summary(pod, "started", generation, "");
                self.say(pod, Level::Normal, "ResizeStarted", text).await;
                self.shared
                    .groups
                    .set_burstable(self.shared.ledger.burstable_cpu())
                    .await;
                return Ok(wished);
            }
            Answer::Deferred(message) => (false, message),
            Answer::Infeasible(message) => (true, message),
        };
        let old = self.record.resize.pending.as_ref();
        let news = old.is_none_or(|old| (old.infeasible, old.generation) != (infeasible, generation));
        let pending = Pending {
            infeasible,
            message: message.clone(),
            generation,
            since: old.filter(|_| !news).map_or(now, |old| old.since),
        };
        if old != Some(&pending) {
            self.record.resize.pending = Some(pending);
            self.save()?;
        }
        if news {
            let (word, reason) = if infeasible {
                ("Infeasible", "ResizeInfeasible")
            } else {
                ("Deferred", "ResizeDeferred")
            };
            let text = summary(pod, word, generation, &message);
            self.say(pod, Level::Warning, reason, text).await;
        }
        Ok(given)
    }

    /// Does what was granted, as far as it is not done. `pod` carries the allocation. Containers that must restart for
    /// it are left to the plan.
    pub(super) async fn resize(&mut self, pod: &Pod) -> Result<(), SyncError> {
        if self.view.ready_sandbox().is_none() {
            return Ok(());
        }
        let changes = changes(pod, &self.record);
        let restarts = inits(pod)
            .iter()
            .chain(regulars(pod))
            .any(|c| needs_restart(pod, c, &self.record));
        let whole = resources::effective(pod);
        let pod_differs = self.record.pod_actuated.as_ref().is_some_and(|has| *has != whole);
        if changes.is_empty() && !restarts && !pod_differs {
            return self.resize_is_done(pod).await;
        }
        match self.actuate(pod, &changes, restarts, &whole).await {
            Ok(()) if restarts => Ok(()),
            Ok(()) => self.resize_is_done(pod).await,
            Err(message) => self.resize_failed(pod, message).await,
        }
    }

    async fn actuate(
        &mut self,
        pod: &Pod,
        changes: &[Change<'_>],
        restarts: bool,
        whole: &ResourceRequirements,
    ) -> Result<(), String> {
        let shared = self.shared.clone();
        let groups = &shared.groups;
        let runtime = shared.runtime.as_ref();
        let place = resources::cgroup(pod);
        let wanted = groups.pod_values(pod);
        // Where pods have no cgroups of their own there is only the runtime to tell.
        let tree = groups.tree(runtime).await.map_err(|e| e.to_string())?;
        let tree = tree.filter(|tree| runtime.isolated() || tree.exists(&place));
        let now = tree.map(|tree| tree.get(&place)).unwrap_or_default();
        if !restarts {
            self.check_memory(pod, changes, &now, &wanted)?;
        }
        if let Some(tree) = tree {
            let wide = widest(&now, &wanted);
            if let Some(sandbox) = self.view.ready_sandbox() {
                let told = groups.runtime_values(&wanted);
                let id = sandbox.id.clone();
                runtime
                    .update_sandbox(&id, &told)
                    .await
                    .map_err(|e| e.to_string())?;
            }
            tree.set(&place, &wide).await.map_err(|e| e.to_string())?;
        }
        for change in changes {
            let values =
                resources::container_values(pod, change.container, groups.memory_capacity, &groups.kernel);
            let id = ContainerId(change.id.clone());
            runtime
                .update_container(&id, &values)
                .await
                .map_err(|e| e.to_string())?;
            if let Some(known) = self.record.containers.get_mut(&change.container.name) {
                known.actuated = Some(Actuated::of(pod, change.container));
            }
        }
        // A container that is about to restart has its old values still.
        if !restarts {
            if let Some(tree) = tree {
                tree.set(&place, &wanted).await.map_err(|e| e.to_string())?;
            }
            self.record.pod_actuated = Some(whole.clone());
        }
        Ok(())
    }

    /// A limit below what is in use would kill at once: such a resize waits.
    fn check_memory(
        &self,
        pod: &Pod,
        changes: &[Change<'_>],
        now: &Values,
        wanted: &Values,
    ) -> Result<(), String> {
        let place = resources::cgroup(pod);
        let Some(tree) = self.shared.groups.known() else {
            return Ok(());
        };
        let mut errors = Vec::new();
        let below = |usage: Option<u64>, limit: i64| {
            usage.is_some_and(|u| i64::try_from(u).unwrap_or(i64::MAX) >= limit)
        };
        if let Some(limit) = wanted.memory_bytes
            && now.memory_bytes.is_none_or(|old| old < 0 || limit < old)
        {
            match tree.memory_usage(&place) {
                None => errors.push("missing pod memory usage".to_owned()),
                Some(usage) if below(Some(usage), limit) => errors.push(format!(
                    "attempting to set pod memory limit ({limit}) below current usage ({usage})"
                )),
                Some(_) => {}
            }
        }
        for Change {
            container,
            id,
            from,
            to,
        } in changes
        {
            let lower =
                to.memory_limit != 0 && (from.memory_limit == 0 || to.memory_limit < from.memory_limit);
            if !lower {
                continue;
            }
            let limit = i64::try_from(to.memory_limit / 1000).unwrap_or(i64::MAX);
            let name = &container.name;
            match tree.container_memory_usage(&place, id) {
                None => errors.push(format!("missing container \"{name}\" memory usage")),
                Some(usage) if below(Some(usage), limit) => errors.push(format!(
                    "attempting to set container \"{name}\" memory limit ({limit}) below current usage ({usage})"
                )),
                Some(_) => {}
            }
        }
        match errors.as_slice() {
            [] => Ok(()),
            [one] => Err(format!("cannot decrease memory limits: {one}")),
            many => Err(format!("cannot decrease memory limits: [{}]", many.join(", "))),
        }
    }

    async fn resize_is_done(&mut self, pod: &Pod) -> Result<(), SyncError> {
        let Some(progress) = self.record.resize.progress.take() else {
            return Ok(());
        };
        self.save()?;
        let text = summary(pod, "completed", progress.generation, "");
        self.say(pod, Level::Normal, "ResizeCompleted", text).await;
        Ok(())
    }

    async fn resize_failed(&mut self, pod: &Pod, message: String) -> Result<(), SyncError> {
        self.again = self.again.min(RETRY);
        let old = self.record.resize.progress.clone();
        let generation = old.as_ref().map_or(pod.metadata.generation, |p| p.generation);
        let new = Progress {
            error: Some(message.clone()),
            generation,
        };
        if old.as_ref() != Some(&new) {
            self.record.resize.progress = Some(new);
            let text = summary(pod, "error", generation, &message);
            self.say(pod, Level::Warning, "ResizeError", text).await;
        }
        // Some containers may have got their part.
        self.save()
    }

    async fn say(&self, pod: &Pod, level: Level, reason: &str, message: String) {
        self.shared.events.emit(pod, None, level, reason, message).await;
    }
}

#[cfg(test)]
mod tests {
    use super::super::fixtures::{container, pod, running as runs, sandbox};
    use super::super::record::View;
    use super::*;
    use serde_json::{Value, json};

    fn sized(cpu: &str, memory: &str, policy: Value) -> Pod {
        pod(
            json!({"containers": [{"name": "c", "resizePolicy": policy, "resources": {
            "requests": {"cpu": cpu, "memory": memory}, "limits": {"cpu": cpu, "memory": memory}}}]}),
        )
    }

    fn running_with(pod: &Pod) -> PodRecord {
        let mut record = PodRecord::default();
        let view = View::new(vec![sandbox("s", 0)], vec![container("c", "id0", 0, runs(10))]);
        record.observe(&view, super::super::fixtures::at(0), |_| String::new());
        record.containers.get_mut("c").unwrap().actuated = Some(Actuated::of(pod, &regulars(pod)[0]));
        record
    }

    #[test]
    fn a_container_is_changed_in_place_unless_its_policy_says_otherwise() {
        let small = sized("100m", "64Mi", json!([]));
        let record = running_with(&small);
        assert!(changes(&small, &record).is_empty());
        let large = sized("200m", "64Mi", json!([]));
        assert_eq!(changes(&large, &record).len(), 1);
        let policy = json!([{"resourceName": "cpu", "restartPolicy": "RestartContainer"}]);
        let restarted = sized("200m", "64Mi", policy.clone());
        assert!(needs_restart(&restarted, &regulars(&restarted)[0], &record));
        assert!(changes(&restarted, &record).is_empty());
        let memory_only = sized("100m", "96Mi", policy);
        assert!(!needs_restart(&memory_only, &regulars(&memory_only)[0], &record));
    }

    #[test]
    fn the_pod_is_as_wide_as_either_size_while_it_is_resized() {
        let now = Values {
            cpu_shares: Some(100),
            cpu_quota: Some(-1),
            memory_bytes: Some(10),
            ..Values::default()
        };
        let wanted = Values {
            cpu_shares: Some(50),
            cpu_quota: Some(1000),
            memory_bytes: Some(20),
            ..Values::default()
        };
        let wide = widest(&now, &wanted);
        assert_eq!(
            (wide.cpu_shares, wide.cpu_quota, wide.memory_bytes),
            (Some(100), Some(-1), Some(20))
        );
        let none = Values::default();
        assert_eq!(widest(&now, &none).memory_bytes, None);
    }

    #[test]
    fn an_event_tells_the_sizes_in_a_kubelet_s_form() {
        let pod = pod(json!({"containers": [{"name": "c0", "resources": {
            "limits": {"cpu": "100m", "memory": "100"}, "requests": {"cpu": "100m", "memory": "100"}}}]}));
        assert_eq!(
            summary(&pod, "completed", Some(1), ""),
            "Pod resize completed: {\"containers\":[{\"name\":\"c0\",\"resources\":{\"limits\":{\"cpu\":\"100m\",\
             \"memory\":\"100\"},\"requests\":{\"cpu\":\"100m\",\"memory\":\"100\"}}}],\"generation\":1}"
        );
    }
}
