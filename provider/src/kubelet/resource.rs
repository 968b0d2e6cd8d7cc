//! `/metrics/resource`: what metrics-server reads.

use skerry_proto::stats::{ContainerStats, CpuStats, MemoryStats, PodReference, Snapshot, SwapStats};

use skerry_telemetry::exposition::{Exposition, number, seconds};

/// Everything that the kubelet's endpoint has, each sample with the time of its measurement.
pub(super) fn render(snapshot: &Snapshot) -> String {
    let mut out = Exposition::default();
    let (node, pods) = (&snapshot.summary.node, &snapshot.summary.pods);
    let containers: Vec<(&PodReference, &ContainerStats)> = pods
        .iter()
        .flat_map(|pod| pod.containers.iter().map(|one| (&pod.pod_ref, one)))
        .collect();
    let start = |one: &ContainerStats| one.start_time.map(|t| t.as_duration().as_secs_f64());

    let family = "Cumulative cpu time consumed by the container in core-seconds";
    out.family("container_cpu_usage_seconds_total", "counter", family);
    for (pod, one) in &containers {
        cpu(&mut out, &of_container(pod, one), one.cpu.as_ref());
    }
    let family = "Current working set of the container in bytes";
    out.family("container_memory_working_set_bytes", "gauge", family);
    for (pod, one) in &containers {
        memory(&mut out, &of_container(pod, one), one.memory.as_ref());
    }
    let family = "Start time of the container since unix epoch in seconds";
    out.family("container_start_time_seconds", "gauge", family);
    for (pod, one) in &containers {
        out.sample(&of_container(pod, one), start(one), None);
    }
    let family = "Current amount of the container swap limit in bytes";
    out.family("container_swap_limit_bytes", "gauge", family);
    for (pod, one) in &containers {
        let limit = one
            .swap
            .as_ref()
            .and_then(|swap| Some(swap.available_bytes? + swap.usage_bytes?));
        let at = one.swap.as_ref().and_then(|swap| swap.time);
        out.sample(&of_container(pod, one), number(limit), at);
    }
    let family = "Current amount of the container swap usage in bytes";
    out.family("container_swap_usage_bytes", "gauge", family);
    for (pod, one) in &containers {
        swap(&mut out, &of_container(pod, one), one.swap.as_ref());
    }

    let family = "Cumulative cpu time consumed by the node in core-seconds";
    out.family("node_cpu_usage_seconds_total", "counter", family);
    cpu(&mut out, &[], node.cpu.as_ref());
    let family = "Current working set of the node in bytes";
    out.family("node_memory_working_set_bytes", "gauge", family);
    memory(&mut out, &[], node.memory.as_ref());
    let family = "Current swap usage of the node in bytes";
    out.family("node_swap_usage_bytes", "gauge", family);
    swap(&mut out, &[], node.swap.as_ref());

    let family = "Cumulative cpu time consumed by the pod in core-seconds";
    out.family("pod_cpu_usage_seconds_total", "counter", family);
    for pod in pods {
        cpu(&mut out, &of_pod(&pod.pod_ref), pod.cpu.as_ref());
    }
    let family = "Current working set of the pod in bytes";
    out.family("pod_memory_working_set_bytes", "gauge", family);
    for pod in pods {
        memory(&mut out, &of_pod(&pod.pod_ref), pod.memory.as_ref());
    }
    let family = "Current amount of the pod swap usage in bytes";
    out.family("pod_swap_usage_bytes", "gauge", family);
    for pod in pods {
        swap(&mut out, &of_pod(&pod.pod_ref), pod.swap.as_ref());
    }
    errors(&mut out, false);
    out.finish()
}

/// What is served when the node could not be measured, as the kubelet does: no samples, and that there are none.
pub(super) fn render_failure() -> String {
    let mut out = Exposition::default();
    errors(&mut out, true);
    out.finish()
}

fn errors(out: &mut Exposition, failed: bool) {
    let value = Some(f64::from(u8::from(failed)));
    let help = "1 if there was an error while getting container metrics, 0 otherwise";
    out.family("resource_scrape_error", "gauge", help)
        .sample(&[], value, None);
    let help = "Deprecated: see resource_scrape_error";
    out.family("scrape_error", "gauge", help).sample(&[], value, None);
}

fn of_container<'a>(pod: &'a PodReference, one: &'a ContainerStats) -> [(&'a str, &'a str); 3] {
    [
        ("container", &one.name),
        ("namespace", &pod.namespace),
        ("pod", &pod.name),
    ]
}

fn of_pod(pod: &PodReference) -> [(&str, &str); 2] {
    [("namespace", &pod.namespace), ("pod", &pod.name)]
}

fn cpu(out: &mut Exposition, labels: &[(&str, &str)], stats: Option<&CpuStats>) {
    if let Some(cpu) = stats {
        out.sample(labels, seconds(cpu.usage_core_nano_seconds), cpu.time);
    }
}

fn memory(out: &mut Exposition, labels: &[(&str, &str)], stats: Option<&MemoryStats>) {
    if let Some(memory) = stats {
        out.sample(labels, number(memory.working_set_bytes), memory.time);
    }
}

fn swap(out: &mut Exposition, labels: &[(&str, &str)], stats: Option<&SwapStats>) {
    if let Some(swap) = stats {
        out.sample(labels, number(swap.usage_bytes), swap.time);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use skerry_proto::stats::{NodeStats, PodStats, Summary};

    #[test]
    fn samples_carry_the_time_of_their_measurement_and_start_times_do_not() {
        let time = Some(jiff::Timestamp::from_millisecond(1_700_000_000_123).unwrap());
        let cpu = Some(CpuStats {
            time,
            usage_core_nano_seconds: Some(1_500_000_000),
            ..CpuStats::default()
        });
        let pod = PodStats {
            pod_ref: PodReference {
                name: "p".into(),
                namespace: "n".into(),
                uid: "u".into(),
            },
            containers: vec![ContainerStats {
                name: "c".into(),
                start_time: time,
                cpu: cpu.clone(),
                ..ContainerStats::default()
            }],
            ..PodStats::default()
        };
        let snapshot = Snapshot {
            summary: Summary {
                node: NodeStats {
                    cpu,
                    ..NodeStats::default()
                },
                pods: vec![pod],
            },
            ..Snapshot::default()
        };
        let text = render(&snapshot);
        for line in [
            "container_cpu_usage_seconds_total{container=\"c\",namespace=\"n\",pod=\"p\"} 1.5 1700000000123",
            "container_start_time_seconds{container=\"c\",namespace=\"n\",pod=\"p\"} 1700000000.123",
            "node_cpu_usage_seconds_total 1.5 1700000000123",
            "resource_scrape_error 0",
        ] {
            assert!(text.lines().any(|l| l == line), "{line}\n{text}");
        }
        assert!(
            !text.contains("container_memory_working_set_bytes{"),
            "what was not measured has no sample"
        );
    }
}
