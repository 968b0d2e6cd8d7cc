//! kubectl, the users' tool: what the scenarios act and look with.

use std::io::Write;
use std::path::PathBuf;
use std::process::{Command, Output, Stdio};

use serde_json::Value;

use crate::process::{text, tools};

/// kubectl with credentials and a namespace.
#[derive(Clone)]
pub struct Kubectl {
    kubeconfig: PathBuf,
    namespace: String,
}

impl Kubectl {
    /// Uses `kubeconfig`, in the namespace `default`.
    pub fn new(kubeconfig: PathBuf) -> Self {
        Self {
            kubeconfig,
            namespace: String::new(),
        }
    }

    /// The same in another namespace.
    pub fn in_namespace(&self, namespace: &str) -> Self {
        Self {
            kubeconfig: self.kubeconfig.clone(),
            namespace: namespace.into(),
        }
    }

    /// The command, for those who start it themselves.
    pub fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(tools().join("kubectl"));
        command.arg("--kubeconfig").arg(&self.kubeconfig);
        if !self.namespace.is_empty() {
            command.args(["--namespace", &self.namespace]);
        }
        command.args(args);
        command
    }

    /// Runs it to its end, whatever that is.
    pub fn output(&self, args: &[&str]) -> Output {
        self.command(args)
            .stdin(Stdio::null())
            .output()
            .expect("kubectl runs")
    }

    /// Runs it; its standard output.
    ///
    /// # Errors
    /// What it printed, when it fails.
    pub fn attempt(&self, args: &[&str]) -> Result<String, String> {
        let out = self.output(args);
        if out.status.success() {
            Ok(String::from_utf8_lossy(&out.stdout).into_owned())
        } else {
            Err(text(&out))
        }
    }

    /// Runs it; its standard output.
    ///
    /// # Panics
    /// When it fails.
    pub fn run(&self, args: &[&str]) -> String {
        self.attempt(args)
            .unwrap_or_else(|e| panic!("kubectl {}: {e}", args.join(" ")))
    }

    /// Runs it with `input` on its standard input.
    pub fn output_with(&self, args: &[&str], input: &str) -> Output {
        let mut child = self
            .command(args)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("kubectl runs");
        let mut stdin = child.stdin.take().expect("stdin is piped");
        let _ = stdin.write_all(input.as_bytes());
        drop(stdin);
        child.wait_with_output().expect("kubectl ends")
    }

    /// `kubectl apply` of YAML.
    ///
    /// # Panics
    /// When it fails.
    pub fn apply(&self, yaml: &str) {
        let out = self.output_with(&["apply", "-f", "-"], yaml);
        assert!(out.status.success(), "kubectl apply: {}\n{yaml}", text(&out));
    }

    /// One object as JSON.
    ///
    /// # Errors
    /// What kubectl printed, when it fails.
    pub fn get(&self, kind: &str, name: &str) -> Result<Value, String> {
        let json = self.attempt(&["get", kind, name, "-o", "json"])?;
        serde_json::from_str(&json).map_err(|e| e.to_string())
    }

    /// The items of a list; `args` are further arguments, such as selectors.
    ///
    /// # Errors
    /// What kubectl printed, when it fails.
    pub fn list(&self, kind: &str, args: &[&str]) -> Result<Vec<Value>, String> {
        let json = self.attempt(&[&["get", kind, "-o", "json"], args].concat())?;
        let list: Value = serde_json::from_str(&json).map_err(|e| e.to_string())?;
        Ok(list["items"].as_array().cloned().unwrap_or_default())
    }
}

/// The entry of `status.conditions` of that type, `Null` when there is none.
pub fn condition<'a>(object: &'a Value, kind: &str) -> &'a Value {
    static NONE: Value = Value::Null;
    object["status"]["conditions"]
        .as_array()
        .and_then(|c| c.iter().find(|c| c["type"] == kind))
        .unwrap_or(&NONE)
}
