//! The command line of `skerry-provider`.

use std::path::PathBuf;
use std::time::Duration;

use clap::{CommandFactory, Parser, Subcommand};
use skerry_proto::SiteName;

use crate::config::Settings;

/// What `--help` says of exit codes.
const EXIT_CODES: &str = "Exit codes:
  0  success
  1  failure at run time (the API refused, a listener could not be opened)
  2  wrong flags or configuration
  3  refused (no such Site, no such token)

Every flag can also be given as an environment variable (shown with it) or as a key of the
configuration file (the flag's name without the dashes). Flags win over variables over the file.";

/// A virtual kubelet for every edge site: shows each Site as a Node and relays its pods and devices.
#[derive(Parser, Debug)]
#[command(name = "skerry-provider", version, after_help = EXIT_CODES, propagate_version = true)]
pub struct Cli {
    /// Configuration file, TOML [default: /etc/skerry/provider.toml if it exists]
    #[arg(long, env = "SKERRY_CONFIG", value_name = "FILE", global = true)]
    pub config: Option<PathBuf>,
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// The subcommands.
#[derive(Subcommand, Debug)]
pub enum Command {
    /// Serve sites until SIGTERM
    Run(Box<Settings>),
    /// Make, list or delete join tokens
    Token {
        /// Where the cluster is.
        #[command(flatten)]
        settings: Box<TokenSettings>,
        /// What to do with them.
        #[command(subcommand)]
        action: TokenAction,
    },
    /// Approve the machine that waits to become a Site whose spec.enrolment.approval is Manual
    Approve {
        /// Where the cluster is.
        #[command(flatten)]
        settings: Box<TokenSettings>,
        /// The Site.
        site: SiteName,
        /// Key of the machine, as skerry-edge join shows it there; its first 8 digits are enough
        key: String,
    },
    /// Replace the CA of the sites: rotate, wait until no site needs the old one, retire it
    Ca {
        /// Where the cluster is.
        #[command(flatten)]
        settings: Box<TokenSettings>,
        /// What to do.
        #[command(subcommand)]
        action: CaAction,
    },
    /// Revoke a site's certificates: its session ends at once, and it must join again with a new token
    Revoke {
        /// Where the cluster is.
        #[command(flatten)]
        settings: Box<TokenSettings>,
        /// The Site.
        site: SiteName,
        /// Only the certificate with this number, for example of a stolen copy (status.certificate.serial, and the
        /// events of the Site) [default: all that were made until now]
        #[arg(long, value_name = "HEX")]
        serial: Option<String>,
    },
    /// Print a completion script for a shell
    Completion {
        /// bash, zsh, fish, elvish or powershell
        shell: clap_complete::Shell,
    },
}

/// The settings that tokens need.
#[derive(clap::Args, Clone, Debug, Default)]
pub struct TokenSettings {
    /// Kubeconfig file; without it the Pod's ServiceAccount is used, or ~/.kube/config
    #[arg(long, env = "SKERRY_KUBECONFIG", value_name = "FILE", global = true)]
    pub kubeconfig: Option<PathBuf>,
    /// Namespace of the CA and the join tokens [default: skerry-system]
    #[arg(long, env = "SKERRY_NAMESPACE", value_name = "NAME", global = true)]
    pub namespace: Option<String>,
    /// SPIFFE trust domain of all certificates [default: skerry.local]
    #[arg(long, env = "SKERRY_TRUST_DOMAIN", value_name = "DOMAIN", global = true)]
    pub trust_domain: Option<String>,
}

impl From<TokenSettings> for Settings {
    fn from(settings: TokenSettings) -> Self {
        Self {
            kubeconfig: settings.kubeconfig,
            namespace: settings.namespace,
            trust_domain: settings.trust_domain,
            ..Self::default()
        }
    }
}

/// What can be done with the CA.
#[derive(Subcommand, Debug)]
pub enum CaAction {
    /// Make a new CA. The old one stays trusted; sites that are connected get new certificates within minutes, the others
    /// when they come back
    Rotate,
    /// Show the CAs, and which sites still need the old one
    Status,
    /// Withdraw the old CA, if no site needs it any more
    Retire {
        /// Also if there are such sites: they must join again with new tokens
        #[arg(long)]
        force: bool,
    },
}

/// What can be done with join tokens.
#[derive(Subcommand, Debug)]
pub enum TokenAction {
    /// Print a new single-use token for a declared Site; hand it to: skerry-edge join --token. For several Sites: a line
    /// with name and token for each
    Create {
        /// The Sites that may enrol, each with a token of its own.
        #[arg(value_name = "SITE", required_unless_present = "file")]
        sites: Vec<SiteName>,
        /// File with more names of Sites, one a line; - is standard input
        #[arg(short, long, value_name = "FILE")]
        file: Option<PathBuf>,
        /// How long it may be used, for example 30m, 24h, 7d
        #[arg(long, value_name = "DURATION", default_value = "24h", value_parser = duration)]
        ttl: Duration,
    },
    /// List tokens that were not used yet
    List,
    /// Delete a token
    Delete {
        /// Its id, as listed.
        id: String,
    },
}

/// Writes the completion script for a shell to standard output.
pub fn completion(shell: clap_complete::Shell) {
    clap_complete::generate(
        shell,
        &mut Cli::command(),
        "skerry-provider",
        &mut std::io::stdout(),
    );
}

fn duration(text: &str) -> Result<Duration, String> {
    let wrong = || format!("{text:?} is not a duration: use a number and s, m, h or d, for example 24h");
    let unit = text.chars().last().ok_or_else(wrong)?;
    let seconds = match unit {
        's' => 1,
        'm' => 60,
        'h' => 3600,
        'd' => 86_400,
        _ => return Err(wrong()),
    };
    let count: u64 = text[..text.len() - unit.len_utf8()]
        .parse()
        .map_err(|_| wrong())?;
    let total = count
        .checked_mul(seconds)
        .filter(|total| (1..=366 * 86_400).contains(total));
    total
        .map(Duration::from_secs)
        .ok_or_else(|| format!("{text:?} is out of range: from 1s to 366d"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn durations_are_read_with_their_unit() {
        assert_eq!(duration("90s"), Ok(Duration::from_secs(90)));
        assert_eq!(duration("7d"), Ok(Duration::from_secs(604_800)));
        for wrong in [
            "",
            "h",
            "5",
            "5w",
            "-1h",
            "0s",
            "99999999999999999999h",
            "9999d",
            "1ä",
        ] {
            assert!(duration(wrong).is_err(), "{wrong:?}");
        }
    }
}
