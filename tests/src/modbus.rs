//! A Modbus device: `hack/modbus-simulator`.

use std::net::{SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::process::{Daemon, free_port, repository, tools};
use crate::wait::{SOON, eventually};

/// A Modbus TCP server whose registers a scenario sets, and that it can unplug.
pub struct Modbus {
    address: SocketAddr,
    registers: PathBuf,
    log: PathBuf,
    daemon: Option<Daemon>,
}

impl Modbus {
    /// Starts it with register 0 = `value`; its files are in `dir`.
    pub fn start(dir: &Path, value: u16) -> Self {
        let address = SocketAddr::from(([127, 0, 0, 1], free_port()));
        let mut this = Self {
            address,
            registers: dir.join("registers"),
            log: dir.join("modbus.log"),
            daemon: None,
        };
        this.set(value);
        this.plug();
        this
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Changes what register 0 holds.
    pub fn set(&self, value: u16) {
        // Renamed over, so that the simulator never reads half a number.
        let new = self.registers.with_extension("new");
        std::fs::write(&new, value.to_string()).expect("the registers can be written");
        std::fs::rename(&new, &self.registers).expect("the registers can be replaced");
    }

    /// The server goes away.
    pub fn unplug(&mut self) {
        self.daemon = None;
    }

    /// The server comes back.
    pub fn plug(&mut self) {
        let mut command = Command::new("python3");
        command
            .env("PYTHONPATH", tools().join("python"))
            .arg(repository().join("hack/modbus-simulator"))
            .arg(self.address.port().to_string())
            .arg(&self.registers);
        let mut daemon = Daemon::start("the Modbus simulator", command, &self.log);
        eventually(SOON, "the Modbus simulator listens", || {
            daemon.check()?;
            TcpStream::connect(self.address)
                .map(drop)
                .map_err(|e| e.to_string())
        });
        self.daemon = Some(daemon);
    }
}
