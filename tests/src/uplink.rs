//! A site's line as a real network: a namespace of the kernel with one way out, whose queue and losses are real.

use std::net::{Ipv4Addr, SocketAddr};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU8, Ordering};

use crate::process::text;

/// Lines of this run so far: each has a network of its own.
static LINES: AtomicU8 = AtomicU8::new(0);

/// Which way packets travel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// From the site to the cloud.
    Up,
    /// From the cloud to the site.
    Down,
}

/// A network namespace with one line out of it. Dropping it removes both.
pub struct Uplink {
    number: u8,
    namespace: String,
}

impl Uplink {
    /// Makes the namespace and a line without limits.
    ///
    /// # Panics
    /// When the kernel refuses: this needs root.
    pub fn new() -> Self {
        let number = LINES.fetch_add(1, Ordering::Relaxed);
        // Namespaces have names for the whole machine, where other runs may be under way.
        let this = Self {
            number,
            namespace: format!("skline-{}-{number}", std::process::id()),
        };
        let (outside, cloud, site) = (this.outside(), this.cloud(), this.site());
        this.ip(&format!("netns add {}", this.namespace));
        this.ip(&format!(
            "link add {outside} type veth peer name line netns {}",
            this.namespace
        ));
        this.ip(&format!("address add {cloud}/30 dev {outside}"));
        this.ip(&format!("link set {outside} up"));
        for inside in [
            "link set lo up".to_owned(),
            format!("address add {site}/30 dev line"),
            "link set line up".to_owned(),
            format!("route add default via {cloud}"),
        ] {
            this.ip(&format!("-n {} {inside}", this.namespace));
        }
        this
    }

    /// The cloud's address as the site sees it.
    pub fn cloud(&self) -> Ipv4Addr {
        Ipv4Addr::new(10, 87, self.number, 1)
    }

    /// The site's address.
    pub fn site(&self) -> Ipv4Addr {
        Ipv4Addr::new(10, 87, self.number, 2)
    }

    /// A command that runs at the site's end.
    pub fn command(&self, program: &str) -> Command {
        // Not `ip netns exec`, which would hide the control groups.
        let mut command = Command::new("nsenter");
        command
            .arg(format!("--net=/run/netns/{}", self.namespace))
            .arg(program);
        command
    }

    /// Body of a GET at the site's end.
    ///
    /// # Errors
    /// When there is no answer.
    pub fn http(&self, address: SocketAddr, path: &str) -> Result<String, String> {
        let out = self
            .command("curl")
            .args(["--silent", "--show-error", "--max-time", "5"])
            .arg(format!("http://{address}{path}"))
            .stdin(Stdio::null())
            .output()
            .map_err(|e| e.to_string())?;
        if out.status.success() {
            Ok(String::from_utf8_lossy(&out.stdout).into_owned())
        } else {
            Err(text(&out))
        }
    }

    /// Makes the line this narrow, each way, with a first-in, first-out queue of so many bytes; what does not fit is lost.
    pub fn narrow(&self, kilobits: u32, queue_bytes: u32) {
        let queue = format!("root tbf rate {kilobits}kbit burst 1600 limit {queue_bytes}");
        self.tc(Way::Up, &format!("qdisc replace dev DEV {queue}"));
        self.tc(Way::Down, &format!("qdisc replace dev DEV {queue}"));
    }

    /// Makes the line this narrow, each way, and lets its routers heed marks: EF and CS2 first, then AF21, then the rest.
    pub fn narrow_by_marks(&self, kilobits: u32, queue_bytes: u32) {
        for way in [Way::Up, Way::Down] {
            self.tc(way, "qdisc replace dev DEV root handle 1: htb default 30");
            self.tc(
                way,
                &format!(
                    "class add dev DEV parent 1: classid 1:1 htb rate {kilobits}kbit burst 1600 cburst 1600"
                ),
            );
            for (class, part, priority) in [(10, 2, 0), (20, 4, 1), (30, 4, 2)] {
                let least = kilobits / part;
                self.tc(way, &format!("class add dev DEV parent 1:1 classid 1:{class} htb rate {least}kbit ceil {kilobits}kbit burst 1600 cburst 1600 prio {priority}"));
                self.tc(
                    way,
                    &format!("qdisc add dev DEV parent 1:{class} bfifo limit {queue_bytes}"),
                );
            }
            for (byte, class) in [(46 << 2, 10), (16 << 2, 10), (18 << 2, 20)] {
                self.tc(way, &format!("filter add dev DEV parent 1: protocol ip prio 1 u32 match ip tos {byte} 0xfc flowid 1:{class}"));
            }
        }
    }

    /// Takes limits away.
    pub fn widen(&self) {
        self.tc(Way::Up, "qdisc del dev DEV root");
        self.tc(Way::Down, "qdisc del dev DEV root");
    }

    /// Loses every packet that travels this way, without a word.
    pub fn lose(&self, way: Way) {
        self.filter(way, "-A", "");
    }

    /// Carries them again.
    pub fn carry(&self, way: Way) {
        self.filter(way, "-D", "");
    }

    /// What a NAT does that forgets its mappings: the packets of each connection that is open now are lost both ways from now on; new
    /// connections work.
    pub fn forget_connections(&self) {
        let out = self
            .command("ss")
            .args(["-Htn", "state", "established"])
            .output()
            .expect("ss runs");
        let local = format!("{}:", self.site());
        let listing = text(&out);
        let ports = listing
            .split_whitespace()
            .filter_map(|word| word.strip_prefix(&local));
        for port in ports {
            self.filter(Way::Up, "-A", &format!("-p tcp --sport {port}"));
            self.filter(Way::Down, "-A", &format!("-p tcp --dport {port}"));
        }
    }

    /// Lets the site reach one TCP port of the cloud and nothing else there.
    pub fn allow_only(&self, port: u16) {
        let matching = format!("-p tcp ! --dport {port} --syn");
        self.filter(Way::Up, "-A", &matching);
    }

    /// Another address for the cloud, which it does not have yet: nobody answers there.
    pub fn second_cloud(&self) -> Ipv4Addr {
        Ipv4Addr::new(10, 88, self.number, 1)
    }

    /// The cloud takes its second address.
    pub fn take_second_cloud(&self) {
        self.ip(&format!(
            "address add {}/32 dev {}",
            self.second_cloud(),
            self.outside()
        ));
    }

    /// The cloud's first address answers no more at a port, open connections included.
    pub fn drop_first_cloud(&self, port: u16) {
        self.filter(
            Way::Up,
            "-A",
            &format!("-p tcp -d {} --dport {port}", self.cloud()),
        );
    }

    /// Bytes that the line has carried so far: up and down, headers included.
    pub fn carried(&self) -> (u64, u64) {
        // Not /sys, which shows the network of whoever mounted it.
        let all = std::fs::read_to_string("/proc/net/dev").unwrap_or_default();
        let own = format!("{}:", self.outside());
        let line = all.lines().find_map(|line| line.trim_start().strip_prefix(&own));
        let mut columns = line.unwrap_or_default().split_whitespace();
        let mut column = |skipped: usize| columns.nth(skipped).and_then(|n| n.parse().ok()).unwrap_or(0);
        // Received bytes, seven more columns, sent bytes.
        (column(0), column(7))
    }

    fn filter(&self, way: Way, action: &str, matching: &str) {
        // At the receiving end, so that the sender's kernel notices nothing.
        let mut command = match way {
            Way::Up => {
                let mut command = Command::new("iptables");
                command.args(["-w", action, "INPUT", "-i", &self.outside()]);
                command
            }
            Way::Down => {
                let mut command = self.command("iptables");
                command.args(["-w", action, "INPUT", "-i", "line"]);
                command
            }
        };
        command.args(matching.split_whitespace()).args(["-j", "DROP"]);
        let out = command.output().expect("iptables runs");
        assert!(out.status.success(), "{command:?}: {}", text(&out));
    }

    fn outside(&self) -> String {
        format!("skline{}", self.number)
    }

    fn tc(&self, way: Way, args: &str) {
        let mut command = match way {
            Way::Up => self.command("tc"),
            Way::Down => Command::new("tc"),
        };
        let device = match way {
            Way::Up => "line".to_owned(),
            Way::Down => self.outside(),
        };
        let out = command
            .args(args.replace("DEV", &device).split_whitespace())
            .output()
            .expect("tc runs");
        assert!(out.status.success(), "tc {args}: {}", text(&out));
    }

    fn ip(&self, args: &str) {
        let out = Command::new("ip")
            .args(args.split_whitespace())
            .output()
            .expect("ip runs");
        assert!(out.status.success(), "ip {args}: {}", text(&out));
    }
}

impl Default for Uplink {
    fn default() -> Self {
        Self::new()
    }
}

impl Drop for Uplink {
    fn drop(&mut self) {
        // Rules name the interface; each goes by itself.
        let rules = Command::new("iptables").args(["-w", "-S", "INPUT"]).output();
        let rules = rules.map(|out| text(&out)).unwrap_or_default();
        let own = format!("-i {} ", self.outside());
        for rule in rules.lines().filter(|rule| rule.contains(&own)) {
            let rule = rule.replacen("-A", "-D", 1);
            let _ = Command::new("iptables")
                .arg("-w")
                .args(rule.split_whitespace())
                .output();
        }
        for args in [
            ["link", "delete", &self.outside()],
            ["netns", "delete", &self.namespace],
        ] {
            let _ = Command::new("ip").args(args).output();
        }
    }
}
