//! A private registry on loopback: `docker-registry` with one user.

use std::net::SocketAddr;
use std::path::Path;
use std::process::Command;

use serde_json::json;

use crate::process::{Daemon, free_port, text};
use crate::site::Site;
use crate::wait::{SOON, eventually};

/// The user and the password, and the line of the password file that says so.
const USER: &str = "skipper";
const PASSWORD: &str = "herring";
const LINE: &str = "skipper:$2y$05$ay5m4CoHTpQfpAFFyD4cq.fco/xkbCFUJN.bLcQV.N/9ZFrYKUgUC\n";

/// A running registry. Dropping it ends it.
pub struct Registry {
    address: SocketAddr,
    _daemon: Daemon,
}

impl Registry {
    /// Starts one with its files in `dir`.
    ///
    /// # Panics
    /// When it does not answer.
    pub fn start(dir: &Path) -> Self {
        std::fs::create_dir_all(dir).expect("the registry's directory can be made");
        let address = SocketAddr::from(([127, 0, 0, 1], free_port()));
        let (passwords, config) = (dir.join("htpasswd"), dir.join("config.yml"));
        std::fs::write(&passwords, LINE).expect("the password file can be written");
        let settings = json!({
            "version": 0.1,
            "log": {"level": "warn"},
            "storage": {"filesystem": {"rootdirectory": dir.join("data")}},
            "http": {"addr": address.to_string()},
            "auth": {"htpasswd": {"realm": "harbour", "path": passwords}},
        });
        std::fs::write(&config, settings.to_string()).expect("the configuration can be written");
        let mut command = Command::new("docker-registry");
        command.arg("serve").arg(&config);
        let mut daemon = Daemon::start("docker-registry", command, &dir.join("log"));
        eventually(SOON, "the registry answers", || {
            daemon.check()?;
            // Nobody may look without a password.
            crate::wait::same(crate::cluster::http_get(address, "/v2/")?.0, 401)
        });
        Self {
            address,
            _daemon: daemon,
        }
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Its name in references: `127.0.0.1:PORT`.
    pub fn host(&self) -> String {
        self.address.to_string()
    }

    /// Pushes an image that the site has under another name, and lets the site forget that name; answers the digest.
    ///
    /// # Panics
    /// When that fails.
    pub fn push(&self, site: &Site, image: &str, name: &str) -> String {
        let reference = format!("{}/{name}", self.host());
        let user = format!("{USER}:{PASSWORD}");
        ctr(site, &["tag", "--force", image, &reference]);
        ctr(site, &["push", "--plain-http", "--user", &user, &reference]);
        let listed = ctr(site, &["ls", &format!("name=={reference}")]);
        ctr(site, &["rm", "--sync", &reference]);
        listed
            .split_whitespace()
            .find(|word| word.starts_with("sha256:"))
            .expect("the list names a digest")
            .to_owned()
    }

    /// A Secret with the registry's credentials.
    pub fn secret(&self, name: &str) -> String {
        self.secret_at(&self.host(), name)
    }

    /// The same for a registry that goes by another host's name.
    pub fn secret_at(&self, host: &str, name: &str) -> String {
        let config = json!({"auths": {host: {"username": USER, "password": PASSWORD}}});
        json!({"apiVersion": "v1", "kind": "Secret", "metadata": {"name": name},
            "type": "kubernetes.io/dockerconfigjson", "stringData": {".dockerconfigjson": config.to_string()}})
        .to_string()
    }

    /// The same in the older form.
    pub fn legacy_secret(&self, name: &str) -> String {
        let config = json!({self.host(): {"username": USER, "password": PASSWORD}});
        json!({"apiVersion": "v1", "kind": "Secret", "metadata": {"name": name},
            "type": "kubernetes.io/dockercfg", "stringData": {".dockercfg": config.to_string()}})
        .to_string()
    }
}

/// Imports an image that no other has into the site's containerd: a shell over busybox, which differs with the name.
///
/// # Panics
/// When that fails.
pub fn import_image(site: &Site, name: &str) {
    let tar = site.dir().join("image.tar");
    let tar = tar.to_str().expect("the path is text");
    crate::process::hack("image", &[tar, name, "sh", "-c", name]);
    ctr(site, &["import", tar]);
}

/// `ctr images`, in the site's containerd and the namespace of its pods; what it prints.
///
/// # Panics
/// When that fails.
pub fn ctr(site: &Site, args: &[&str]) -> String {
    let socket = site.dir().join("containerd/containerd.sock");
    let out = Command::new("ctr")
        .arg("--address")
        .arg(socket)
        .args(["--namespace", "k8s.io", "images"])
        .args(args)
        .output()
        .expect("ctr runs");
    assert!(out.status.success(), "ctr images {args:?}: {}", text(&out));
    String::from_utf8_lossy(&out.stdout).into_owned()
}
