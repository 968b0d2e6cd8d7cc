//! The command line of `skerry-edge`.

use std::net::SocketAddr;
use std::path::PathBuf;

use clap::{CommandFactory, Parser, Subcommand};

use crate::config::Settings;
use crate::local::Output;

const EXIT_CODES: &str = "Exit codes:
  0  success
  1  failure at run time (a listener could not be opened, the provider was not reached when joining)
  2  wrong flags or configuration, or the machine has not joined yet
  3  the provider refused to enrol this machine
  4  the store or the identity on disk cannot be used

Every flag of run can also be given as an environment variable (shown with it) or as a key of the
configuration file (the flag's name without the dashes). Flags win over variables over the file.
join and status read data-dir, provider, proxy and metrics-listen from there too.";

/// Runs a site's pods and devices, with or without the cloud.
#[derive(Parser, Debug)]
#[command(name = "skerry-edge", version, after_help = EXIT_CODES, propagate_version = true)]
pub struct Cli {
    /// Configuration file, TOML [default: /etc/skerry/edge.toml if it exists]
    #[arg(long, env = "SKERRY_CONFIG", value_name = "FILE", global = true)]
    pub config: Option<PathBuf>,
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// The subcommands.
#[derive(Subcommand, Debug)]
pub enum Command {
    /// Run the site until SIGTERM; its containers go on running afterwards
    Run(Box<Settings>),
    /// Enrol this machine as a site, with a token from: skerry-provider token create SITE
    Join {
        /// The provider, HOST:PORT; needed unless the configuration file names it
        #[arg(long, env = "SKERRY_PROVIDER", value_name = "HOST:PORT")]
        provider: Option<String>,
        /// HTTP proxy to the provider, http://[USER:PASSWORD@]HOST:PORT, or none
        /// [default: HTTPS_PROXY and NO_PROXY of the environment]
        #[arg(long, env = "SKERRY_PROXY", value_name = "URL|none", hide_env_values = true)]
        proxy: Option<String>,
        /// The token, a single line; - reads it from standard input
        #[arg(long, env = "SKERRY_TOKEN", value_name = "TOKEN", hide_env_values = true)]
        token: String,
        /// Directory in which the identity is kept [default: /var/lib/skerry]
        #[arg(long, env = "SKERRY_DATA_DIR", value_name = "DIR")]
        data_dir: Option<PathBuf>,
        /// Replace the identity that this machine has
        #[arg(long)]
        force: bool,
    },
    /// Show this machine's identity and certificate, and how the daemon, its link, store and pods are
    Status {
        /// Directory in which the identity is kept [default: /var/lib/skerry]
        #[arg(long, env = "SKERRY_DATA_DIR", value_name = "DIR")]
        data_dir: Option<PathBuf>,
        /// Address at which the daemon answers /readyz [default: 127.0.0.1:9441]
        #[arg(long, env = "SKERRY_METRICS_LISTEN", value_name = "IP:PORT")]
        metrics_listen: Option<SocketAddr>,
    },
    /// Show the pods of this site, with or without a cloud. The daemon must be running
    Pods {
        /// Show one pod only
        name: Option<String>,
        /// Namespace to show [default: default]
        #[arg(short, long, value_name = "NAMESPACE", conflicts_with = "all_namespaces")]
        namespace: Option<String>,
        /// Show the pods of all namespaces
        #[arg(short = 'A', long, conflicts_with = "name")]
        all_namespaces: bool,
        /// With more columns, or the whole objects
        #[arg(short, long, value_name = "FORMAT")]
        output: Option<Output>,
        /// Directory of the running daemon's state [default: /var/lib/skerry]
        #[arg(long, env = "SKERRY_DATA_DIR", value_name = "DIR")]
        data_dir: Option<PathBuf>,
    },
    /// Look after the store on disk while the daemon does not run
    Store {
        /// What to do with it
        #[command(subcommand)]
        what: StoreCommand,
        /// Directory of the store [default: /var/lib/skerry]
        #[arg(long, env = "SKERRY_DATA_DIR", value_name = "DIR", global = true)]
        data_dir: Option<PathBuf>,
    },
    /// Stop all pods in order, each with its grace: for when the machine shuts down. The daemon must be running
    Drain {
        /// Directory of the running daemon's state [default: /var/lib/skerry]
        #[arg(long, env = "SKERRY_DATA_DIR", value_name = "DIR")]
        data_dir: Option<PathBuf>,
    },
    /// Print a completion script for a shell
    Completion {
        /// bash, zsh, fish, elvish or powershell
        shell: clap_complete::Shell,
    },
}

/// What can be done with a store that no daemon uses.
#[derive(Clone, Copy, Subcommand, Debug)]
pub enum StoreCommand {
    /// Compare every page with its checksum and the tables with each other
    Check,
    /// Copy it into a file without holes; the running daemon does that by itself
    Compact,
    /// Show what is in it and how it uses its file
    Stats,
}

/// Writes the completion script for a shell to standard output.
pub fn completion(shell: clap_complete::Shell) {
    clap_complete::generate(shell, &mut Cli::command(), "skerry-edge", &mut std::io::stdout());
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }
}
