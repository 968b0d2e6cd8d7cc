//! A containerd of a site's own: `hack/containerd`.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU8, Ordering};

use crate::process::{complain, hack, try_hack};

/// A running containerd. Dropping it removes it with all of its containers.
pub struct Containerd {
    dir: PathBuf,
    bridge: String,
    subnet: String,
}

impl Containerd {
    /// Starts one in `dir`, with a bridge and a subnet that no other has.
    pub fn start(dir: &Path) -> Self {
        static NEXT: AtomicU8 = AtomicU8::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let this = Self {
            dir: dir.to_owned(),
            bridge: format!("sktest{number}"),
            subnet: format!("10.88.{number}.0/24"),
        };
        this.up();
        this
    }

    /// Starts it again, on what is on its disk.
    pub fn up(&self) {
        hack("containerd", &["up", self.path(), &self.bridge, &self.subnet]);
    }

    /// Everything that ran or was mounted is gone, as after a power cut; the disk stays.
    pub fn power_cut(&self) {
        hack("containerd", &["power-cut", self.path()]);
    }

    /// Its CRI endpoint.
    pub fn endpoint(&self) -> String {
        format!("unix://{}/containerd.sock", self.dir.display())
    }

    fn path(&self) -> &str {
        self.dir.to_str().expect("the path is text")
    }
}

impl Drop for Containerd {
    fn drop(&mut self) {
        complain(try_hack("containerd", &["down", self.path()]));
    }
}
