//! The edge daemon's program: command line, logging, signals, exit codes.

use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::Parser;
use skerry_edge::cli::{Cli, Command, StoreCommand, completion};
use skerry_edge::config::{ConfigError, Settings};
use skerry_edge::daemon::{self, DaemonError};
use skerry_edge::identity::{Identity, IdentityError, JoinError, JoinOptions, join};
use skerry_edge::local;
use skerry_edge::readiness;
use skerry_edge::resident;
use skerry_edge::shutdown as shutdown_of_pods;
use skerry_edge::store::{Lane, OpenError, Store, StoreError};
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
    resident::one_arena();
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
    #[error(transparent)]
    Ask(#[from] local::AskError),
    #[error("{0}; the running daemon looks after its store by itself")]
    StoreInUse(OpenError),
    #[error(transparent)]
    Store(OpenError),
    #[error(transparent)]
    StoreRead(#[from] StoreError),
    #[error("the store contradicts itself:\n  {}\nMove the file aside and start again: the provider sends everything anew", .0.join("\n  "))]
    Contradictions(Vec<String>),
    #[error("a part of the program failed: {0}")]
    Task(tokio::task::JoinError),
    #[error("the answer cannot be written: {0}")]
    Output(std::io::Error),
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
            Self::Store(_) | Self::StoreInUse(_) | Self::Contradictions(_) => 4,
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
            proxy,
            token,
            data_dir,
            force,
        } => {
            let settings = Settings {
                provider,
                proxy,
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
                proxies: config.proxies,
                token,
                data_dir: config.data_dir,
                force,
                waits: |site, key| {
                    println!(
                        "This machine waits for its approval. Its key is {key}. In the cluster: skerry-provider approve {site} {key}"
                    );
                },
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
            // A daemon that does not run has been told of.
            let told = tokio::task::spawn_blocking(move || local::status(&config.data_dir)).await;
            if let Ok(Ok(text)) = told {
                print!("{text}");
            }
            Ok(())
        }
        Command::Pods {
            name,
            namespace,
            all_namespaces,
            output,
            data_dir,
        } => {
            let data_dir = data_dir_of(data_dir, cli.config.as_deref())?;
            let asked = move || {
                let namespace = (!all_namespaces).then(|| namespace.unwrap_or_else(|| "default".to_owned()));
                local::pods(&data_dir, namespace.as_deref(), name.as_deref(), output)
            };
            let text = tokio::task::spawn_blocking(asked)
                .await
                .map_err(Failure::Task)??;
            show(&text)
        }
        Command::Store { what, data_dir } => {
            let data_dir = data_dir_of(data_dir, cli.config.as_deref())?;
            let done = tokio::task::spawn_blocking(move || look_after(&data_dir, what));
            show(&done.await.map_err(Failure::Task)??)
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

fn data_dir_of(data_dir: Option<PathBuf>, file: Option<&Path>) -> Result<PathBuf, ConfigError> {
    let settings = Settings {
        data_dir,
        ..Settings::default()
    };
    Ok(settings.resolve(file)?.data_dir)
}

/// Writes an answer; a reader that has seen enough is no failure.
fn show(text: &str) -> Result<(), Failure> {
    match std::io::stdout().write_all(text.as_bytes()) {
        Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => Err(Failure::Output(error)),
        _ => Ok(()),
    }
}

/// Looks after a store that no daemon uses. Blocking.
fn look_after(data_dir: &Path, what: StoreCommand) -> Result<String, Failure> {
    let missing = !data_dir.join("store.redb").exists();
    if missing {
        return Err(Failure::Store(OpenError::Io {
            path: data_dir.join("store.redb"),
            reason: "there is no store; give its directory with --data-dir".to_owned(),
        }));
    }
    let store = Store::open(data_dir).map_err(|error| match error {
        OpenError::InUse { .. } => Failure::StoreInUse(error),
        error => Failure::Store(error),
    })?;
    match what {
        StoreCommand::Check => {
            let found = store.contradictions()?;
            if !found.is_empty() {
                return Err(Failure::Contradictions(found));
            }
            Ok(format!(
                "The store is sound: every page has its checksum, and the tables agree ({} bytes).\n",
                store.size_bytes()
            ))
        }
        StoreCommand::Compact => {
            let (before, after) = store.compact()?;
            Ok(format!("{before} bytes before, {after} bytes now\n"))
        }
        StoreCommand::Stats => {
            let found = store.statistics()?;
            let mut text = format!(
                "file         {} bytes\nallocated    {} bytes\nstored       {} bytes\n",
                found.file_bytes, found.allocated_bytes, found.stored_bytes
            );
            for (table, entries) in &found.tables {
                text.push_str(&format!("{table:<12} {entries} entries\n"));
            }
            for (lane, used) in Lane::ALL.iter().zip(store.outbox_use()?) {
                let name = lane.name();
                text.push_str(&format!(
                    "waiting      {} {name}, {} bytes\n",
                    used.reports, used.bytes
                ));
            }
            for (lane, reason, count) in store.drops()? {
                text.push_str(&format!(
                    "dropped      {count} {}: {}\n",
                    lane.name(),
                    reason.name()
                ));
            }
            Ok(text)
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
