//! What is thrown, and the end of it.

use std::collections::BTreeSet;
use std::process::Command;
use std::time::Duration;

use rand::Rng;
use serde_json::{Value, json};

use super::{AT_ONCE, Life, Wanted, World, processes};
use crate::cluster::Cluster;
use crate::kubectl::condition;
use crate::process::text;
use crate::relay::Line;
use crate::wait::{attempt_until, same};

/// How long a mended system gets until everything is as it was asked for. A crash back-off may take five minutes, but a
/// pod in it is as asked for already; what takes long is a site whose line is dialled again.
const SETTLED: Duration = Duration::from_secs(120);

impl World<'_> {
    /// Throws one thing; its name.
    pub(super) fn throw(&mut self, cluster: &mut Option<&mut Cluster>) -> &'static str {
        let dice = self.random.random_range(0..100);
        match dice {
            _ if self.wanted.len() < 3 => self.create(),
            0..30 if self.wanted.len() < AT_ONCE => self.create(),
            0..50 => self.delete(),
            50..60 => self.change(),
            60..75 => self.kill_container(),
            75..83 => self.kill_edge(),
            83..86 => self.restart_edge(),
            86..90 => match cluster {
                Some(cluster) => self.kill_provider(cluster),
                None => self.kill_edge(),
            },
            90..94 => self.cut(Line::Silent),
            94..98 => self.cut(Line::Closed),
            _ => self.power_cut(),
        }
    }

    fn say(&mut self, what: String) {
        let at = self.began.elapsed().as_secs_f32();
        self.log.push(format!("{at:8.2}s {what}"));
    }

    fn pause(&mut self, most: Duration) -> Duration {
        let millis = u64::try_from(most.as_millis()).unwrap_or(u64::MAX);
        Duration::from_millis(self.random.random_range(0..millis))
    }

    fn create(&mut self) -> &'static str {
        let life = Life::ALL[self.random.random_range(0..Life::ALL.len())];
        let name = format!("churn-{}", self.made);
        self.made += 1;
        let work = self.random.random_range(1..4);
        let pod = self.site.pod(&name, self.spec(life, work));
        let out = self
            .kubectl
            .output_with(&["create", "-f", "-", "-o", "jsonpath={.metadata.uid}"], &pod);
        assert!(out.status.success(), "create {name}: {}", text(&out));
        let uid = String::from_utf8_lossy(&out.stdout).into_owned();
        self.say(format!("create {name} {life:?} {uid}"));
        let wanted = Wanted {
            uid,
            life,
            bounded: false,
        };
        self.wanted.insert(name, wanted);
        "create"
    }

    fn spec(&self, life: Life, work: u32) -> Value {
        let forever = "while :; do sleep 1; done";
        let polite = format!("trap 'exit 0' TERM; {forever}");
        let mut spec = match life {
            Life::Steady => json!({"containers": [self.container("c0", &polite)]}),
            Life::Stubborn => {
                json!({"containers": [self.container("c0", &format!("trap '' TERM; {forever}"))]})
            }
            Life::Crashing => json!({"containers": [self.container("c0", &format!("sleep {work}; exit 3"))]}),
            Life::Finishing => json!({"restartPolicy": "Never",
                "containers": [self.container("c0", &format!("sleep {work}"))]}),
            Life::Failing => json!({"restartPolicy": "Never",
                "containers": [self.container("c0", &format!("sleep {work}; exit 1"))]}),
            Life::Family => {
                let mut sidecar = self.container("side", &polite);
                sidecar["restartPolicy"] = json!("Always");
                json!({
                    "initContainers": [self.container("first", "sleep 0.3"), sidecar],
                    "containers": [self.container("c0", &polite), self.container("c1", &polite)],
                })
            }
        };
        spec["volumes"] = json!([{"name": "marks", "hostPath": {"path": self.marks}}]);
        spec
    }

    fn container(&self, name: &str, body: &str) -> Value {
        let script = format!(
            ": {}; echo start >> \"/marks/${}\"; {body}",
            processes::FIRST,
            processes::KEY
        );
        json!({
            "name": name,
            "command": ["sh", "-c", script],
            "env": [
                {"name": "POD_UID", "valueFrom": {"fieldRef": {"fieldPath": "metadata.uid"}}},
                {"name": processes::KEY, "value": format!("$(POD_UID):{name}")},
            ],
            "volumeMounts": [{"name": "marks", "mountPath": "/marks"}],
        })
    }

    fn choose(&mut self) -> Option<String> {
        let names: Vec<String> = self.wanted.keys().cloned().collect();
        (!names.is_empty()).then(|| names[self.random.random_range(0..names.len())].clone())
    }

    fn delete(&mut self) -> &'static str {
        let Some(name) = self.choose() else {
            return "nothing";
        };
        let grace = self.random.random_range(0..6).to_string();
        let mut args = vec!["delete", "pod", &name, "--wait=false", "--grace-period", &grace];
        if grace == "0" {
            args.push("--force");
        }
        // A pod that ended may have been deleted by somebody else: nobody here does that.
        let out = self.kubectl.output(&args);
        assert!(out.status.success(), "delete {name}: {}", text(&out));
        self.say(format!("delete {name} grace {grace}"));
        self.wanted.remove(&name);
        "delete"
    }

    fn change(&mut self) -> &'static str {
        let Some(name) = self.choose() else {
            return "nothing";
        };
        let number = self.random.random_range(0..1000);
        let bound = self.random.random_bool(0.3);
        let patch = if bound {
            json!({"spec": {"activeDeadlineSeconds": 3}})
        } else {
            json!({"metadata": {"labels": {"churn": number.to_string()}, "annotations": {"churn": number.to_string()}}})
        };
        let out = self
            .kubectl
            .output(&["patch", "pod", &name, "--type", "merge", "-p", &patch.to_string()]);
        self.say(format!("change {name} {patch} {}", out.status));
        if bound
            && out.status.success()
            && let Some(wanted) = self.wanted.get_mut(&name)
        {
            wanted.bounded = true;
        }
        "change"
    }

    fn kill_container(&mut self) -> &'static str {
        let running: Vec<(String, u32)> = processes::running()
            .into_iter()
            .filter_map(|(key, pids)| {
                let uid = key.split(':').next()?;
                let ours = self.wanted.values().any(|w| w.uid == uid);
                // The first of a container is the oldest of those.
                ours.then(|| pids.first().map(|pid| (key.clone(), *pid)))?
            })
            .collect();
        if running.is_empty() {
            return "nothing";
        }
        let (key, pid) = running[self.random.random_range(0..running.len())].clone();
        let _ = Command::new("kill").args(["-9", &pid.to_string()]).status();
        self.say(format!("kill container {key} pid {pid}"));
        "kill container"
    }

    fn kill_edge(&mut self) -> &'static str {
        self.say("kill -9 of the edge daemon".to_owned());
        self.site.kill_edge();
        std::thread::sleep(self.pause(Duration::from_secs(3)));
        self.site.start_edge();
        self.say("the edge daemon starts".to_owned());
        "kill edge"
    }

    fn restart_edge(&mut self) -> &'static str {
        self.say("the edge daemon stops".to_owned());
        self.site.stop_edge();
        self.site.start_edge();
        self.say("the edge daemon starts".to_owned());
        "restart edge"
    }

    fn kill_provider(&mut self, cluster: &mut Cluster) -> &'static str {
        self.say("kill -9 of the provider".to_owned());
        cluster.kill_provider();
        std::thread::sleep(self.pause(Duration::from_secs(3)));
        cluster.start_provider();
        self.say("the provider is back".to_owned());
        "kill provider"
    }

    fn cut(&mut self, line: Line) -> &'static str {
        self.say(format!("the line is {line:?}"));
        self.site.line().set(line);
        // Things go on happening meanwhile.
        for _ in 0..self.random.random_range(1..6) {
            match self.random.random_range(0..4) {
                0 if self.wanted.len() < AT_ONCE => self.create(),
                1 if self.wanted.len() > 1 => self.delete(),
                2 => self.kill_edge(),
                _ => self.kill_container(),
            };
            std::thread::sleep(self.pause(Duration::from_secs(3)));
        }
        self.site.line().set(Line::Up);
        self.say("the line is up".to_owned());
        if line == Line::Silent {
            "silent line"
        } else {
            "closed line"
        }
    }

    fn power_cut(&mut self) -> &'static str {
        self.say("power cut".to_owned());
        self.site.power_cut();
        self.site.start_edge();
        self.say("power is back".to_owned());
        "power cut"
    }

    /// Everything runs and is connected again.
    pub(super) fn mend(&mut self, cluster: &mut Option<&mut Cluster>) {
        self.site.line().set(Line::Up);
        self.site.wait_ready();
        if let Some(cluster) = cluster {
            cluster.check_provider();
        }
        self.say("mended".to_owned());
    }

    /// Waits until what is there is what was asked for; what is not.
    pub(super) fn settle(&mut self) -> Vec<String> {
        let settled = attempt_until(SETTLED, || {
            let wrong = self.wrong();
            if wrong.is_empty() {
                Ok(())
            } else {
                Err(wrong.join("\n"))
            }
        });
        self.say("settled".to_owned());
        match settled {
            Ok(()) => Vec::new(),
            Err(wrong) => {
                // A node that takes no pods explains the most at once.
                let node = self.kubectl.get("node", self.site.name()).unwrap_or_default();
                let node = format!(
                    "the Node is then {} {}",
                    node["spec"], node["status"]["conditions"]
                );
                wrong.lines().map(str::to_owned).chain([node]).collect()
            }
        }
    }

    fn wrong(&self) -> Vec<String> {
        let pods = match self.kubectl.list("pods", &[]) {
            Ok(pods) => pods,
            Err(error) => return vec![error],
        };
        let mut wrong = Vec::new();
        for pod in &pods {
            let name = pod["metadata"]["name"].as_str().unwrap_or_default();
            match self.wanted.get(name) {
                None => wrong.push(format!("pod {name} was deleted and is still there")),
                Some(wanted) => {
                    if let Err(e) = self.as_wanted(pod, wanted) {
                        wrong.push(format!("pod {name} ({:?}): {e}: {}", wanted.life, pod["status"]));
                    }
                }
            }
        }
        let there: BTreeSet<&str> = pods
            .iter()
            .filter_map(|p| p["metadata"]["uid"].as_str())
            .collect();
        for (name, wanted) in &self.wanted {
            if !there.contains(wanted.uid.as_str()) {
                wrong.push(format!("pod {name} is gone, and nobody deleted it"));
            }
        }
        for key in processes::running().into_keys() {
            let uid = key.split(':').next().unwrap_or_default();
            // Only this churn's: other scenarios may run beside it.
            if self.marks.join(&key).exists() && !there.contains(uid) {
                wrong.push(format!("container {key} runs, and its pod is gone"));
            }
        }
        for entry in std::fs::read_dir(self.site.data_dir().join("pods"))
            .into_iter()
            .flatten()
            .flatten()
        {
            let uid = entry.file_name().to_string_lossy().into_owned();
            if !there.contains(uid.as_str()) {
                wrong.push(format!(
                    "pod {uid} is gone, and {} is left",
                    entry.path().display()
                ));
            }
        }
        wrong
    }

    fn as_wanted(&self, pod: &Value, wanted: &Wanted) -> Result<(), String> {
        let status = &pod["status"];
        let phase = status["phase"].as_str().unwrap_or_default();
        if wanted.life.ends() || wanted.bounded {
            if !matches!(phase, "Succeeded" | "Failed") {
                return Err(format!("its phase is {phase}, and it should have ended"));
            }
        } else if wanted.life == Life::Crashing {
            same(phase, "Running")?;
        } else {
            let ready = condition(pod, "Ready")["status"].as_str();
            // One that was killed may wait for its back-off.
            let waits = ["initContainerStatuses", "containerStatuses"].iter().any(|list| {
                let statuses = status[*list].as_array().into_iter().flatten();
                statuses
                    .into_iter()
                    .any(|c| c["state"]["waiting"]["reason"] == "CrashLoopBackOff")
            });
            if !waits {
                same(ready, Some("True"))?;
            }
        }
        for list in ["initContainerStatuses", "containerStatuses"] {
            for container in status[list].as_array().into_iter().flatten() {
                let name = container["name"].as_str().unwrap_or_default();
                let restarts = container["restartCount"].as_u64().unwrap_or(0);
                let marks = std::fs::read_to_string(self.marks.join(format!("{}:{name}", wanted.uid)));
                let starts = marks.unwrap_or_default().lines().count() as u64;
                if starts > restarts + 1 {
                    return Err(format!(
                        "{name} started {starts} times with {restarts} restarts counted"
                    ));
                }
                // Else a runtime that starts nothing at all would look like a quiet one.
                if starts == 0 && (restarts > 0 || container["state"]["running"].is_object()) {
                    return Err(format!("{name} has never started"));
                }
            }
        }
        Ok(())
    }
}
