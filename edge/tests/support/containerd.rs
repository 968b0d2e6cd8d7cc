//! A private containerd with all of its state in a temporary directory, and two images made of the machine's busybox.
//!
//! Everything ends with it when it is dropped: the engine, the shims and containers (found by the socket that their
//! command lines name), their cgroups, mounts, the bridge and what CNI has noted about them.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use sha2::{Digest, Sha256};

/// The image that tests run; `sh` is its default command.
pub(crate) const BUSYBOX: &str = "skerry.test/busybox:1";
const PAUSE: &str = "skerry.test/pause:1";

/// See the module.
pub(crate) struct Containerd {
    dir: tempfile::TempDir,
    /// Also the name of the cgroup that holds everything.
    bridge: String,
    child: Child,
}

impl Containerd {
    /// Starts one. `number` tells the bridges and subnets (10.88.`number`.0/24) of concurrent tests apart.
    pub(crate) fn start(number: u8) -> Containerd {
        assert!(
            nix::unistd::geteuid().is_root() && find("containerd").is_some() && find("runc").is_some(),
            "this test runs real containers: it needs root, containerd and runc, which hack/test installs"
        );
        let busybox = find("busybox").expect("busybox-static is missing, which hack/test installs");
        let plugins = ["/usr/lib/cni", "/opt/cni/bin"]
            .into_iter()
            .find(|dir| Path::new(dir).join("bridge").exists())
            .expect("the CNI plugins are missing, which hack/test installs");
        let dir = tempfile::Builder::new().prefix("skerry-cri").tempdir().unwrap();
        let bridge = format!("skcri{number}");
        fs::create_dir(dir.path().join("cni")).unwrap();
        fs::write(dir.path().join("config.toml"), config(dir.path(), plugins)).unwrap();
        fs::write(
            dir.path().join("cni/10-test.conflist"),
            network(dir.path(), &bridge, number),
        )
        .unwrap();
        let child = spawn(dir.path());
        let containerd = Containerd { dir, bridge, child };
        containerd.wait_until_it_answers();
        containerd.import(
            PAUSE,
            &busybox,
            &[
                "sh",
                "-c",
                "trap exit TERM INT; while :; do sleep 60 & wait $!; done",
            ],
        );
        containerd.import(BUSYBOX, &busybox, &["sh"]);
        containerd
    }

    /// Where it listens.
    pub(crate) fn socket(&self) -> PathBuf {
        self.dir.path().join("containerd.sock")
    }

    /// A parent for the cgroups of pods.
    pub(crate) fn cgroup_parent(&self) -> String {
        format!("/kubepods/{}", self.bridge)
    }

    /// A directory for the test's own files.
    pub(crate) fn scratch(&self) -> PathBuf {
        let path = self.dir.path().join("scratch");
        fs::create_dir_all(&path).unwrap();
        path
    }

    /// Ends the engine at once and starts it again; containers go on running.
    pub(crate) fn restart(&mut self) {
        self.kill_engine();
        self.child = spawn(self.dir.path());
        self.wait_until_it_answers();
    }

    fn ctr(&self) -> Command {
        let mut ctr = Command::new("ctr");
        ctr.arg("--address").arg(self.socket()).args(["-n", "k8s.io"]);
        ctr
    }

    fn wait_until_it_answers(&self) {
        let deadline = Instant::now() + Duration::from_secs(30);
        while !self
            .ctr()
            .arg("version")
            .output()
            .is_ok_and(|output| output.status.success())
        {
            let log = self.dir.path().join("containerd.log");
            assert!(
                Instant::now() < deadline,
                "containerd did not start:\n{}",
                fs::read_to_string(log).unwrap_or_default()
            );
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    fn import(&self, reference: &str, busybox: &Path, command: &[&str]) {
        let archive = self.dir.path().join("image.tar");
        docker_archive(&archive, reference, busybox, command).unwrap();
        let output = self
            .ctr()
            .args(["images", "import"])
            .arg(&archive)
            .output()
            .unwrap();
        assert!(
            output.status.success(),
            "{}",
            String::from_utf8_lossy(&output.stderr)
        );
    }

    fn kill_engine(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    /// Ends what the engine has started: shims that name our socket, and their children before them.
    fn kill_containers(&self) {
        let socket = self.socket().to_string_lossy().into_owned();
        let deadline = Instant::now() + Duration::from_secs(10);
        loop {
            let all = processes();
            let shims: Vec<i32> = all
                .iter()
                .filter(|process| {
                    process.command.contains("containerd-shim") && process.command.contains(&socket)
                })
                .map(|process| process.pid)
                .collect();
            if shims.is_empty() || Instant::now() > deadline {
                return;
            }
            for process in all.iter().filter(|process| shims.contains(&process.parent)) {
                let _ = kill(Pid::from_raw(process.pid), Signal::SIGKILL);
            }
            for shim in shims {
                let _ = kill(Pid::from_raw(shim), Signal::SIGKILL);
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// What lies outside of our directory: sockets of shims, notes of CNI, cgroups.
    fn remove_traces(&self) {
        let tasks = self.dir.path().join("state/io.containerd.runtime.v2.task/k8s.io");
        for task in fs::read_dir(tasks).into_iter().flatten().flatten() {
            if let Ok(address) = fs::read_to_string(task.path().join("address")) {
                let _ = fs::remove_file(address.trim_start_matches("unix://"));
            }
            let id = task.file_name().to_string_lossy().into_owned();
            for note in fs::read_dir("/var/lib/cni/results")
                .into_iter()
                .flatten()
                .flatten()
            {
                if note.file_name().to_string_lossy().contains(&id) {
                    let _ = fs::remove_file(note.path());
                }
            }
        }
        // One hierarchy with version 2, a directory per controller with version 1.
        let root = Path::new("/sys/fs/cgroup");
        remove_cgroup(&root.join("kubepods").join(&self.bridge));
        for hierarchy in fs::read_dir(root).into_iter().flatten().flatten() {
            remove_cgroup(&hierarchy.path().join("kubepods").join(&self.bridge));
        }
    }

    fn unmount_all(&self) {
        let mounts = fs::read_to_string("/proc/self/mounts").unwrap_or_default();
        let ours = mounts
            .lines()
            .filter_map(|line| line.split(' ').nth(1))
            .filter(|path| Path::new(path).starts_with(self.dir.path()));
        for path in ours.collect::<Vec<_>>().into_iter().rev() {
            let _ = nix::mount::umount2(path, nix::mount::MntFlags::MNT_DETACH);
        }
    }
}

impl Drop for Containerd {
    fn drop(&mut self) {
        self.kill_engine();
        self.kill_containers();
        self.unmount_all();
        self.remove_traces();
        let _ = Command::new("ip").args(["link", "delete", &self.bridge]).output();
    }
}

/// A cgroup goes by `rmdir` alone, the inner ones first.
fn remove_cgroup(path: &Path) {
    for entry in fs::read_dir(path).into_iter().flatten().flatten() {
        if entry.path().is_dir() {
            remove_cgroup(&entry.path());
        }
    }
    let _ = fs::remove_dir(path);
}

fn find(program: &str) -> Option<PathBuf> {
    [
        "/usr/local/bin",
        "/usr/local/sbin",
        "/usr/bin",
        "/usr/sbin",
        "/bin",
        "/sbin",
    ]
    .iter()
    .map(|dir| Path::new(dir).join(program))
    .find(|path| path.exists())
}

fn spawn(dir: &Path) -> Child {
    let log = fs::File::options()
        .create(true)
        .append(true)
        .open(dir.join("containerd.log"))
        .unwrap();
    Command::new("containerd")
        .arg("--config")
        .arg(dir.join("config.toml"))
        .stdin(Stdio::null())
        .stdout(log.try_clone().unwrap())
        .stderr(log)
        .spawn()
        .unwrap()
}

fn config(dir: &Path, plugins: &str) -> String {
    let dir = dir.display();
    format!(
        r#"version = 2
root = "{dir}/root"
state = "{dir}/state"
disabled_plugins = ["io.containerd.snapshotter.v1.btrfs", "io.containerd.snapshotter.v1.zfs", "io.containerd.snapshotter.v1.devmapper"]
[grpc]
  address = "{dir}/containerd.sock"
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "{PAUSE}"
  restrict_oom_score_adj = true
  netns_mounts_under_state_dir = true
  stream_server_address = "127.0.0.1"
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "{plugins}"
    conf_dir = "{dir}/cni"
[plugins."io.containerd.internal.v1.opt"]
  path = "{dir}/opt"
"#
    )
}

fn network(dir: &Path, bridge: &str, number: u8) -> String {
    serde_json::json!({
        "cniVersion": "0.4.0",
        "name": bridge,
        "plugins": [{
            "type": "bridge",
            "bridge": bridge,
            "isGateway": true,
            "ipam": {
                "type": "host-local",
                "dataDir": dir.join("ipam"),
                "ranges": [[{ "subnet": format!("10.88.{number}.0/24") }]],
            },
        }],
    })
    .to_string()
}

/// What `docker save` would write for an image of one layer, with busybox and a link for each of its commands.
fn docker_archive(archive: &Path, reference: &str, busybox: &Path, command: &[&str]) -> io::Result<()> {
    let work = tempfile::tempdir()?;
    let bin = work.path().join("root/bin");
    fs::create_dir_all(&bin)?;
    fs::create_dir_all(work.path().join("root/tmp"))?;
    fs::create_dir_all(work.path().join("root/etc"))?;
    fs::copy(busybox, bin.join("busybox"))?;
    let applets = Command::new(busybox).arg("--list").output()?.stdout;
    for applet in String::from_utf8_lossy(&applets)
        .lines()
        .filter(|name| *name != "busybox")
    {
        std::os::unix::fs::symlink("busybox", bin.join(applet))?;
    }
    let layer = work.path().join("layer.tar");
    tar(&work.path().join("root"), &layer, &["."])?;
    let architecture = match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    };
    let digest: String = Sha256::digest(fs::read(&layer)?)
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect();
    let config = serde_json::json!({
        "architecture": architecture,
        "os": "linux",
        "config": { "Env": ["PATH=/bin"], "Cmd": command },
        "rootfs": { "type": "layers", "diff_ids": [format!("sha256:{digest}")] },
    });
    fs::write(work.path().join("config.json"), config.to_string())?;
    let manifest =
        serde_json::json!([{ "Config": "config.json", "RepoTags": [reference], "Layers": ["layer.tar"] }]);
    fs::write(work.path().join("manifest.json"), manifest.to_string())?;
    tar(
        work.path(),
        archive,
        &["manifest.json", "config.json", "layer.tar"],
    )
}

fn tar(dir: &Path, to: &Path, names: &[&str]) -> io::Result<()> {
    let status = Command::new("tar")
        .arg("-C")
        .arg(dir)
        .args(["--owner=0", "--group=0", "--numeric-owner", "-cf"])
        .arg(to)
        .args(names)
        .status()?;
    if status.success() {
        Ok(())
    } else {
        Err(io::Error::other(format!("tar {}: {status}", to.display())))
    }
}

struct Process {
    pid: i32,
    parent: i32,
    command: String,
}

fn processes() -> Vec<Process> {
    let entries = fs::read_dir("/proc").unwrap().flatten();
    entries.filter_map(|entry| process(&entry.path())).collect()
}

fn process(dir: &Path) -> Option<Process> {
    let pid = dir.file_name()?.to_str()?.parse().ok()?;
    let stat = fs::read_to_string(dir.join("stat")).ok()?;
    // pid (name) state parent: the name may hold anything, parentheses included.
    let parent = stat.rsplit_once(')')?.1.split_whitespace().nth(1)?.parse().ok()?;
    let command = fs::read(dir.join("cmdline")).ok()?;
    Some(Process {
        pid,
        parent,
        command: String::from_utf8_lossy(&command).replace('\0', " "),
    })
}
