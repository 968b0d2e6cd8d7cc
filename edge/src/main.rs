//! The edge daemon's program: command line, logging, signals, exit codes.

use std::io::Read;
use std::process::ExitCode;

use clap::Parser;
use skerry_edge::cli::{Cli, Command, completion};
use skerry_edge::config::{ConfigError, Settings};
use skerry_edge::daemon::{self, DaemonError};
use skerry_edge::identity::{Identity, IdentityError, JoinError, JoinOptions, join};
use skerry_edge::readiness;
use skerry_edge::shutdown as shutdown_of_pods;
use skerry_telemetry::shutdown;

/// Threads of the daemon: enough to keep a slow disk from holding up heartbeats, few enough to stay small.
const THREADS: usize = 2;
/// Longest token read from standard input.
const TOKEN_LIMIT: u64 = 4096;

fn main() -> ExitCode {
    let mut args = std::env::args_os().skip(1);
    // The supervisor of one container, re-executed by the process runtime: before any thread starts.
    if args.next().is_some_and(|verb| verb == "shim") {
        return skerry_edge::runtime::process::shim::main(args);
    }
    let cli = Cli::parse();
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(THREADS)
        .enable_all()
        .build();
    let runtime = match runtime {
        Ok(runtime) => runtime,
        Err(error) => {
            eprintln!("skerry-edge: the process cannot start its threads: {error}");
            return ExitCode::from(1);
        }
    };
    let ended = runtime.block_on(dispatch(cli));
    // A blocking call that hangs, on a dead disk say, must not hold up the end.
    runtime.shutdown_timeout(std::time::Duration::from_secs(2));
    match ended {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            eprintln!("skerry-edge: {failure}");
            ExitCode::from(failure.exit_code())
        }
    }
}

#[derive(Debug, thiserror::Error)]
enum Failure {
    #[error(transparent)]
    Config(#[from] ConfigError),
    #[error(transparent)]
    Daemon(#[from] DaemonError),
    #[error(transparent)]
    Join(#[from] JoinError),
    #[error(transparent)]
    Identity(#[from] IdentityError),
    #[error(transparent)]
    Drain(#[from] shutdown_of_pods::DrainError),
    #[error("the token cannot be read from standard input: {0}")]
    Stdin(std::io::Error),
}

impl Failure {
    fn exit_code(&self) -> u8 {
        let identity = |error: &IdentityError| match error {
            IdentityError::NotJoined(_) => 2,
            _ => 4,
        };
        match self {
            Self::Config(_) => 2,
            Self::Join(JoinError::Token(_) | JoinError::Address(_) | JoinError::Joined { .. }) => 2,
            Self::Join(JoinError::Refused(_)) => 3,
            Self::Join(JoinError::Files(_)) | Self::Daemon(DaemonError::Store(_)) => 4,
            Self::Identity(error) | Self::Daemon(DaemonError::Identity(error)) => identity(error),
            Self::Daemon(DaemonError::Config(_)) => 2,
            _ => 1,
        }
    }
}

async fn dispatch(cli: Cli) -> Result<(), Failure> {
    match cli.command {
        Command::Run(settings) => {
            let config = settings.resolve(cli.config.as_deref())?;
            skerry_telemetry::logging::init(&config.log, config.log_format).map_err(ConfigError::Value)?;
            Ok(daemon::run(config, shutdown::on_signal()).await?)
        }
        Command::Join {
            provider,
            token,
            data_dir,
            force,
        } => {
            let settings = Settings {
                provider,
                data_dir,
                ..Settings::default()
            };
            let config = settings.resolve(cli.config.as_deref())?;
            let provider = config.provider.ok_or_else(|| {
                ConfigError::Value("the provider is needed: give --provider HOST:PORT".to_owned())
            })?;
            let token = if token == "-" { token_from_stdin()? } else { token };
            let site = join(&JoinOptions {
                provider,
                token,
                data_dir: config.data_dir,
                force,
            })
            .await?;
            println!("This machine is now site {site}. Start it with: skerry-edge run");
            Ok(())
        }
        Command::Status {
            data_dir,
            metrics_listen,
        } => {
            let settings = Settings {
                data_dir,
                metrics_listen,
                ..Settings::default()
            };
            let config = settings.resolve(cli.config.as_deref())?;
            let identity = Identity::load(&config.data_dir)?;
            println!("site         {}", identity.site);
            println!("identity     {}", identity.spiffe_id());
            println!("provider     {}", identity.provider);
            println!(
                "certificate  valid from {} to {}",
                identity.not_before, identity.not_after
            );
            println!("daemon       {}", readiness::ask(config.metrics_listen).await);
            Ok(())
        }
        Command::Drain { data_dir } => {
            let settings = Settings {
                data_dir,
                ..Settings::default()
            };
            let config = settings.resolve(cli.config.as_deref())?;
            Ok(shutdown_of_pods::ask(&config.data_dir).await?)
        }
        Command::Completion { shell } => {
            completion(shell);
            Ok(())
        }
    }
}

fn token_from_stdin() -> Result<String, Failure> {
    let mut token = String::new();
    std::io::stdin()
        .take(TOKEN_LIMIT)
        .read_to_string(&mut token)
        .map_err(Failure::Stdin)?;
    Ok(token)
}
