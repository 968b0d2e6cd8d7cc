//! `/metrics/cadvisor`: the `container_` and `machine_` metrics under the names that dashboards know.

use jiff::Timestamp;
use skerry_proto::stats::{
    ContainerDetail, ContainerStats, CpuStats, FsStats, IoStats, MemoryStats, Psi, Snapshot, SwapStats,
};

use skerry_telemetry::exposition::{Exposition, number, seconds};

/// What one series is about: the node (`/`), a pod, or a container.
struct Subject<'a> {
    id: String,
    namespace: &'a str,
    pod: &'a str,
    container: &'a str,
    image: &'a str,
    name: &'a str,
    cpu: Option<&'a CpuStats>,
    memory: Option<&'a MemoryStats>,
    swap: Option<&'a SwapStats>,
    io: Option<&'a IoStats>,
    fs: Option<&'a FsStats>,
    start: Option<Timestamp>,
    detail: Option<&'a ContainerDetail>,
}

impl Subject<'_> {
    fn labels(&self) -> [(&'static str, &str); 6] {
        [
            ("container", self.container),
            ("id", &self.id),
            ("image", self.image),
            ("name", self.name),
            ("namespace", self.namespace),
            ("pod", self.pod),
        ]
    }

    fn at(&self) -> Option<Timestamp> {
        self.cpu
            .and_then(|cpu| cpu.time)
            .or_else(|| self.memory.and_then(|memory| memory.time))
    }
}

/// Everything.
pub(super) fn render(snapshot: &Snapshot) -> String {
    let mut out = Exposition::default();
    let subjects = subjects(snapshot);
    version(&mut out, snapshot);
    processors(&mut out, &subjects);
    memory(&mut out, &subjects);
    disks(&mut out, &subjects);
    limits(&mut out, &subjects);
    pressure(&mut out, &subjects);
    network(&mut out, snapshot);
    machine(&mut out, snapshot);
    out.finish()
}

fn subjects(snapshot: &Snapshot) -> Vec<Subject<'_>> {
    let node = &snapshot.summary.node;
    let mut found = vec![Subject {
        id: "/".to_owned(),
        namespace: "",
        pod: "",
        container: "",
        image: "",
        name: "",
        cpu: node.cpu.as_ref(),
        memory: node.memory.as_ref(),
        swap: node.swap.as_ref(),
        io: node.io.as_ref(),
        fs: node.fs.as_ref(),
        start: node.start_time,
        detail: None,
    }];
    for pod in &snapshot.summary.pods {
        let (namespace, name) = (&pod.pod_ref.namespace, &pod.pod_ref.name);
        let detail_of = |one: &ContainerStats| {
            let mut details = snapshot.containers.iter();
            details.find(|d| d.container == one.name && d.pod == *name && d.namespace == *namespace)
        };
        let parent = pod.containers.iter().find_map(|one| {
            let (parent, _) = detail_of(one)?.cgroup.rsplit_once('/')?;
            Some(parent.to_owned())
        });
        found.push(Subject {
            id: parent
                .filter(|parent| !parent.is_empty())
                .unwrap_or_else(|| format!("/pod{}", pod.pod_ref.uid)),
            namespace,
            pod: name,
            container: "",
            image: "",
            name: "",
            cpu: pod.cpu.as_ref(),
            memory: pod.memory.as_ref(),
            swap: pod.swap.as_ref(),
            io: pod.io.as_ref(),
            fs: None,
            start: pod.start_time,
            detail: None,
        });
        for one in &pod.containers {
            let detail = detail_of(one);
            found.push(Subject {
                id: detail.map_or_else(|| format!("/{}", one.name), |d| d.cgroup.clone()),
                namespace,
                pod: name,
                container: &one.name,
                image: detail.map_or("", |d| &d.image),
                name: detail.map_or("", |d| &d.id),
                cpu: one.cpu.as_ref(),
                memory: one.memory.as_ref(),
                swap: one.swap.as_ref(),
                io: one.io.as_ref(),
                fs: one.rootfs.as_ref(),
                start: one.start_time,
                detail,
            });
        }
    }
    found
}

type Value = fn(&Subject<'_>) -> Option<f64>;

fn each(out: &mut Exposition, subjects: &[Subject<'_>], families: &[(&'static str, &str, &str, Value)]) {
    for (name, kind, help, value) in families {
        out.family(name, kind, help);
        for subject in subjects {
            out.sample(&subject.labels(), value(subject), subject.at());
        }
    }
}

fn version(out: &mut Exposition, snapshot: &Snapshot) {
    let labels = [
        ("cadvisorRevision", ""),
        ("cadvisorVersion", ""),
        ("dockerVersion", ""),
        ("kernelVersion", snapshot.machine.kernel_version.as_str()),
        ("osVersion", snapshot.machine.os_version.as_str()),
    ];
    let help = "Kernel and OS version of the node; the measurements are Skerry's own, not cAdvisor's";
    out.family("cadvisor_version_info", "gauge", help)
        .sample(&labels, Some(1.0), None);
}

fn processors(out: &mut Exposition, subjects: &[Subject<'_>]) {
    let name = "container_cpu_usage_seconds_total";
    out.family(name, "counter", "Cumulative cpu time consumed in seconds");
    for subject in subjects {
        let [container, id, image, name, namespace, pod] = subject.labels();
        let labels = [container, ("cpu", "total"), id, image, name, namespace, pod];
        let used = subject.cpu.and_then(|cpu| cpu.usage_core_nano_seconds);
        out.sample(&labels, seconds(used), subject.at());
    }
    each(
        out,
        subjects,
        &[
            (
                "container_cpu_user_seconds_total",
                "counter",
                "Cumulative user cpu time consumed in seconds",
                |s| seconds(s.detail?.cpu_user_nanos),
            ),
            (
                "container_cpu_system_seconds_total",
                "counter",
                "Cumulative system cpu time consumed in seconds",
                |s| seconds(s.detail?.cpu_system_nanos),
            ),
            (
                "container_cpu_cfs_periods_total",
                "counter",
                "Number of elapsed enforcement period intervals",
                |s| number(s.detail?.cfs_periods),
            ),
            (
                "container_cpu_cfs_throttled_periods_total",
                "counter",
                "Number of throttled period intervals",
                |s| number(s.detail?.cfs_throttled_periods),
            ),
            (
                "container_cpu_cfs_throttled_seconds_total",
                "counter",
                "Total time duration the container has been throttled",
                |s| seconds(s.detail?.cfs_throttled_nanos),
            ),
            (
                "container_processes",
                "gauge",
                "Number of processes running inside the container",
                |s| number(s.detail?.processes),
            ),
            (
                "container_start_time_seconds",
                "gauge",
                "Start time of the container since unix epoch in seconds",
                |s| s.start.map(|t| t.as_duration().as_secs_f64()),
            ),
            (
                "container_last_seen",
                "gauge",
                "Last time a container was seen by the exporter",
                |s| s.at().map(|t| t.as_duration().as_secs_f64().floor()),
            ),
        ],
    );
}

fn memory(out: &mut Exposition, subjects: &[Subject<'_>]) {
    each(
        out,
        subjects,
        &[
            (
                "container_memory_usage_bytes",
                "gauge",
                "Current memory usage in bytes, including all memory regardless of when it was accessed",
                |s| number(s.memory?.usage_bytes),
            ),
            (
                "container_memory_working_set_bytes",
                "gauge",
                "Current working set in bytes",
                |s| number(s.memory?.working_set_bytes),
            ),
            ("container_memory_rss", "gauge", "Size of RSS in bytes", |s| {
                number(s.memory?.rss_bytes)
            }),
            (
                "container_memory_swap",
                "gauge",
                "Container swap usage in bytes",
                |s| number(s.swap?.usage_bytes),
            ),
            (
                "container_memory_cache",
                "gauge",
                "Number of bytes of page cache memory",
                |s| number(s.detail?.memory_cache_bytes),
            ),
            (
                "container_memory_mapped_file",
                "gauge",
                "Size of memory mapped files in bytes",
                |s| number(s.detail?.memory_mapped_file_bytes),
            ),
            (
                "container_memory_max_usage_bytes",
                "gauge",
                "Maximum memory usage recorded in bytes",
                |s| number(s.detail?.memory_max_usage_bytes),
            ),
            (
                "container_memory_failcnt",
                "counter",
                "Number of memory usage hits limits",
                |s| number(s.detail?.memory_failures),
            ),
            (
                "container_oom_events_total",
                "counter",
                "Count of out of memory events observed for the container",
                |s| number(s.detail?.oom_events),
            ),
        ],
    );
    let help = "Cumulative count of memory allocation failures";
    out.family("container_memory_failures_total", "counter", help);
    for subject in subjects {
        let Some(memory) = subject.memory else { continue };
        let [container, id, image, name, namespace, pod] = subject.labels();
        for (kind, count) in [
            ("pgfault", memory.page_faults),
            ("pgmajfault", memory.major_page_faults),
        ] {
            let of = [
                container,
                ("failure_type", kind),
                id,
                image,
                name,
                namespace,
                pod,
                ("scope", "container"),
            ];
            out.sample(&of, number(count), subject.at());
        }
    }
}

fn disks(out: &mut Exposition, subjects: &[Subject<'_>]) {
    each(
        out,
        subjects,
        &[
            (
                "container_fs_usage_bytes",
                "gauge",
                "Number of bytes that are consumed by the container on this filesystem",
                |s| number(s.fs?.used_bytes),
            ),
            (
                "container_fs_limit_bytes",
                "gauge",
                "Number of bytes that can be consumed by the container on this filesystem",
                |s| number(s.fs?.capacity_bytes),
            ),
            ("container_fs_inodes_total", "gauge", "Number of Inodes", |s| {
                number(s.fs?.inodes)
            }),
            (
                "container_fs_inodes_free",
                "gauge",
                "Number of available Inodes",
                |s| number(s.fs?.inodes_free),
            ),
            (
                "container_fs_reads_bytes_total",
                "counter",
                "Cumulative count of bytes read",
                |s| number(s.detail?.fs_reads_bytes),
            ),
            (
                "container_fs_writes_bytes_total",
                "counter",
                "Cumulative count of bytes written",
                |s| number(s.detail?.fs_writes_bytes),
            ),
        ],
    );
}

fn limits(out: &mut Exposition, subjects: &[Subject<'_>]) {
    each(
        out,
        subjects,
        &[
            (
                "container_spec_cpu_period",
                "gauge",
                "CPU period of the container",
                |s| number(s.detail?.cpu_period_micros),
            ),
            (
                "container_spec_cpu_quota",
                "gauge",
                "CPU quota of the container",
                |s| number(s.detail?.cpu_quota_micros),
            ),
            (
                "container_spec_cpu_shares",
                "gauge",
                "CPU share of the container",
                |s| number(s.detail?.cpu_shares),
            ),
            // Zero is cAdvisor's word for no limit.
            (
                "container_spec_memory_limit_bytes",
                "gauge",
                "Memory limit for the container",
                |s| number(Some(s.detail?.memory_limit_bytes.unwrap_or(0))),
            ),
        ],
    );
}

fn pressure(out: &mut Exposition, subjects: &[Subject<'_>]) {
    fn some(psi: Option<&Psi>) -> Option<f64> {
        seconds(psi.map(|psi| psi.some.total))
    }
    fn full(psi: Option<&Psi>) -> Option<f64> {
        seconds(psi.map(|psi| psi.full.total))
    }
    each(
        out,
        subjects,
        &[
            (
                "container_pressure_cpu_waiting_seconds_total",
                "counter",
                "Total time duration tasks in the container have waited due to CPU congestion",
                |s| some(s.cpu?.psi.as_ref()),
            ),
            (
                "container_pressure_cpu_stalled_seconds_total",
                "counter",
                "Total time duration no tasks in the container could make progress due to CPU congestion",
                |s| full(s.cpu?.psi.as_ref()),
            ),
            (
                "container_pressure_memory_waiting_seconds_total",
                "counter",
                "Total time duration tasks in the container have waited due to memory congestion",
                |s| some(s.memory?.psi.as_ref()),
            ),
            (
                "container_pressure_memory_stalled_seconds_total",
                "counter",
                "Total time duration no tasks in the container could make progress due to memory congestion",
                |s| full(s.memory?.psi.as_ref()),
            ),
            (
                "container_pressure_io_waiting_seconds_total",
                "counter",
                "Total time duration tasks in the container have waited due to IO congestion",
                |s| some(s.io?.psi.as_ref()),
            ),
            (
                "container_pressure_io_stalled_seconds_total",
                "counter",
                "Total time duration no tasks in the container could make progress due to IO congestion",
                |s| full(s.io?.psi.as_ref()),
            ),
        ],
    );
}

fn network(out: &mut Exposition, snapshot: &Snapshot) {
    // One row an interface: pod, namespace, name, time, and its eight counters in the order of the families below.
    let mut rows = Vec::new();
    let own = snapshot.summary.node.network.iter().map(|n| ("", "", n));
    let of_pods = snapshot.summary.pods.iter().filter_map(|pod| {
        let of = &pod.pod_ref;
        Some((of.namespace.as_str(), of.name.as_str(), pod.network.as_ref()?))
    });
    for (namespace, pod, network) in own.chain(of_pods) {
        for interface in &network.interfaces {
            let mut details = snapshot.interfaces.iter();
            let detail =
                details.find(|d| d.namespace == namespace && d.pod == pod && d.name == interface.name);
            let counters = [
                interface.rx_bytes,
                interface.rx_errors,
                detail.map(|d| d.rx_packets),
                detail.map(|d| d.rx_dropped),
                interface.tx_bytes,
                interface.tx_errors,
                detail.map(|d| d.tx_packets),
                detail.map(|d| d.tx_dropped),
            ];
            rows.push((namespace, pod, interface.name.as_str(), network.time, counters));
        }
    }
    let families = [
        (
            "container_network_receive_bytes_total",
            "Cumulative count of bytes received",
        ),
        (
            "container_network_receive_errors_total",
            "Cumulative count of errors encountered while receiving",
        ),
        (
            "container_network_receive_packets_total",
            "Cumulative count of packets received",
        ),
        (
            "container_network_receive_packets_dropped_total",
            "Cumulative count of packets dropped while receiving",
        ),
        (
            "container_network_transmit_bytes_total",
            "Cumulative count of bytes transmitted",
        ),
        (
            "container_network_transmit_errors_total",
            "Cumulative count of errors encountered while transmitting",
        ),
        (
            "container_network_transmit_packets_total",
            "Cumulative count of packets transmitted",
        ),
        (
            "container_network_transmit_packets_dropped_total",
            "Cumulative count of packets dropped while transmitting",
        ),
    ];
    for (i, (name, help)) in families.into_iter().enumerate() {
        out.family(name, "counter", help);
        for (namespace, pod, interface, at, counters) in &rows {
            let id = if pod.is_empty() { "/" } else { "" };
            let labels = [
                ("container", ""),
                ("id", id),
                ("image", ""),
                ("interface", interface),
                ("name", ""),
                ("namespace", namespace),
                ("pod", pod),
            ];
            out.sample(&labels, number(counters[i]), *at);
        }
    }
}

fn machine(out: &mut Exposition, snapshot: &Snapshot) {
    let machine = &snapshot.machine;
    let labels = [
        ("boot_id", machine.boot_id.as_str()),
        ("machine_id", &machine.machine_id),
        ("system_uuid", &machine.system_uuid),
    ];
    for (name, help, value) in [
        ("machine_cpu_cores", "Number of logical CPU cores", machine.cores),
        (
            "machine_memory_bytes",
            "Amount of memory installed on the machine",
            machine.memory_bytes,
        ),
        (
            "machine_swap_bytes",
            "Amount of swap memory available on the machine",
            machine.swap_bytes,
        ),
    ] {
        out.family(name, "gauge", help)
            .sample(&labels, number(Some(value)), None);
    }
    for (name, help) in [
        (
            "container_scrape_error",
            "1 if there was an error while getting container metrics, 0 otherwise",
        ),
        (
            "machine_scrape_error",
            "1 if there was an error while getting machine metrics, 0 otherwise",
        ),
    ] {
        out.family(name, "gauge", help).sample(&[], Some(0.0), None);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use skerry_proto::stats::{InterfaceStats, NetworkStats, PodReference, PodStats, Summary};

    #[test]
    fn a_container_its_pod_and_the_node_are_told_apart_by_their_ids() {
        let cpu = |n| {
            Some(CpuStats {
                usage_core_nano_seconds: Some(n),
                ..CpuStats::default()
            })
        };
        let mut snapshot = Snapshot {
            summary: Summary {
                pods: vec![PodStats {
                    pod_ref: PodReference {
                        name: "p".into(),
                        namespace: "n".into(),
                        uid: "u".into(),
                    },
                    containers: vec![ContainerStats {
                        name: "c".into(),
                        cpu: cpu(1_000_000_000),
                        ..ContainerStats::default()
                    }],
                    cpu: cpu(2_000_000_000),
                    network: Some(NetworkStats {
                        interfaces: vec![InterfaceStats {
                            name: "eth0".into(),
                            rx_bytes: Some(7),
                            ..InterfaceStats::default()
                        }],
                        ..NetworkStats::default()
                    }),
                    ..PodStats::default()
                }],
                ..Summary::default()
            },
            containers: vec![ContainerDetail {
                namespace: "n".into(),
                pod: "p".into(),
                container: "c".into(),
                id: "abc".into(),
                image: "busybox".into(),
                cgroup: "/kubepods/podu/abc".into(),
                ..ContainerDetail::default()
            }],
            ..Snapshot::default()
        };
        snapshot.summary.node.cpu = cpu(5_000_000_000);
        snapshot.machine.cores = 2;
        let text = render(&snapshot);
        for line in [
            "container_cpu_usage_seconds_total{container=\"c\",cpu=\"total\",id=\"/kubepods/podu/abc\",image=\"busybox\",name=\"abc\",namespace=\"n\",pod=\"p\"} 1",
            "container_cpu_usage_seconds_total{container=\"\",cpu=\"total\",id=\"/kubepods/podu\",image=\"\",name=\"\",namespace=\"n\",pod=\"p\"} 2",
            "container_cpu_usage_seconds_total{container=\"\",cpu=\"total\",id=\"/\",image=\"\",name=\"\",namespace=\"\",pod=\"\"} 5",
            "container_network_receive_bytes_total{container=\"\",id=\"\",image=\"\",interface=\"eth0\",name=\"\",namespace=\"n\",pod=\"p\"} 7",
            "machine_cpu_cores{boot_id=\"\",machine_id=\"\",system_uuid=\"\"} 2",
        ] {
            assert!(text.lines().any(|l| l == line), "{line}\n{text}");
        }
    }
}
