//! The provider's program: command line, logging, signals, exit codes.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::Parser;
use futures::StreamExt;
use jiff::Timestamp;
use skerry_proto::SiteName;
use skerry_provider::cli::{CaAction, Cli, Command, TokenAction, completion};
use skerry_provider::config::{Config, ConfigError, Settings};
use skerry_provider::pki::rotation::{self, RotationError};
use skerry_provider::pki::tokens::{self, TokenError};
use skerry_provider::pki::{ApproveError, Authority, AuthorityError, RevokeError, approve, revoke};
use skerry_provider::server::{self, ServerError};
use skerry_telemetry::shutdown;

fn main() -> ExitCode {
    let cli = Cli::parse();
    let runtime = match tokio::runtime::Runtime::new() {
        Ok(runtime) => runtime,
        Err(error) => {
            eprintln!("skerry-provider: the process cannot start its threads: {error}");
            return ExitCode::from(1);
        }
    };
    match runtime.block_on(dispatch(cli)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(Failure::Server(ServerError::Restored)) => start_anew(),
        Err(failure) => {
            eprintln!("skerry-provider: {failure}");
            ExitCode::from(failure.exit_code())
        }
    }
}

/// Replaces this process by a new one of the same program and arguments: with no memory, and without asking whoever
/// supervises it. Returns only when that fails.
fn start_anew() -> ExitCode {
    use std::os::unix::process::CommandExt;
    tracing::warn!("the cluster was restored from an older backup; the provider starts anew, without memory");
    let failed = match std::env::current_exe() {
        Ok(program) => std::process::Command::new(program)
            .args(std::env::args_os().skip(1))
            .exec(),
        Err(error) => error,
    };
    eprintln!(
        "skerry-provider: the cluster was restored from an older backup, and the program cannot be started anew: {failed}"
    );
    ExitCode::from(1)
}

#[derive(Debug, thiserror::Error)]
enum Failure {
    #[error(transparent)]
    Config(#[from] ConfigError),
    #[error(transparent)]
    Server(#[from] ServerError),
    #[error(transparent)]
    Authority(#[from] AuthorityError),
    #[error(transparent)]
    Token(#[from] TokenError),
    #[error(transparent)]
    Revoke(#[from] RevokeError),
    #[error(transparent)]
    Approve(#[from] ApproveError),
    #[error(transparent)]
    Rotation(#[from] RotationError),
    #[error("there is no join token {0}")]
    NoToken(String),
    #[error("the names of sites in {file} cannot be read: {source}")]
    Names { file: PathBuf, source: std::io::Error },
    #[error("{file} holds something that is no name of a site: {reason}")]
    Name { file: PathBuf, reason: String },
    #[error("{failed} of {asked} tokens could not be made; those that were printed are good")]
    SomeTokens { failed: usize, asked: usize },
}

impl Failure {
    fn exit_code(&self) -> u8 {
        match self {
            Self::Config(_)
            | Self::Server(ServerError::Config(_))
            | Self::Names { .. }
            | Self::Name { .. } => 2,
            Self::Approve(
                ApproveError::NoSite(_) | ApproveError::Nobody(_) | ApproveError::OtherKey { .. },
            )
            | Self::Revoke(RevokeError::NoSite(_))
            | Self::Rotation(RotationError::UnderWay | RotationError::Nothing | RotationError::Needed(_))
            | Self::NoToken(_)
            | Self::Token(TokenError::NoSite(_) | TokenError::Unknown(_) | TokenError::OtherSite(_)) => 3,
            _ => 1,
        }
    }
}

async fn dispatch(cli: Cli) -> Result<(), Failure> {
    let resolve = |settings: Settings| settings.resolve(cli.config.as_deref());
    match cli.command {
        Command::Run(settings) => {
            let config = resolve(*settings)?;
            skerry_telemetry::logging::init(&config.log, config.log_format).map_err(ConfigError::Value)?;
            Ok(server::run(config, shutdown::on_signal()).await?)
        }
        Command::Token { settings, action } => token(&resolve((*settings).into())?, action).await,
        Command::Ca { settings, action } => ca(&resolve((*settings).into())?, action).await,
        Command::Approve { settings, site, key } => {
            let config = resolve((*settings).into())?;
            let client = server::client(config.kubeconfig.as_deref(), None).await?;
            let key = approve(&client, &site, &key).await?;
            println!("The machine with the key {key} becomes Site {site} in a moment.");
            Ok(())
        }
        Command::Revoke {
            settings,
            site,
            serial,
        } => {
            let config = resolve((*settings).into())?;
            let client = server::client(config.kubeconfig.as_deref(), None).await?;
            revoke(&client, &site, serial.as_deref(), Timestamp::now()).await?;
            println!("Revoked. To let the site in again: skerry-provider token create {site}");
            Ok(())
        }
        Command::Completion { shell } => {
            completion(shell);
            Ok(())
        }
    }
}

async fn ca(config: &Config, action: CaAction) -> Result<(), Failure> {
    let client = server::client(config.kubeconfig.as_deref(), None).await?;
    let desk = rotation::Desk {
        client,
        namespace: config.namespace.clone(),
        domain: config.trust_domain.clone(),
    };
    match action {
        CaAction::Rotate => {
            let id = desk.rotate(Timestamp::now()).await?;
            println!(
                "The new CA is {id}. Sites get new certificates now, or when they come back: skerry-provider ca status"
            );
        }
        CaAction::Status => print!("{}", desk.status().await?),
        CaAction::Retire { force } => {
            for site in desk.retire(force).await? {
                println!(
                    "{site} is cut off: skerry-provider token create {site}, and join again with --force"
                );
            }
            println!("The old CA is withdrawn.");
        }
    }
    Ok(())
}

async fn token(config: &Config, action: TokenAction) -> Result<(), Failure> {
    let client = server::client(config.kubeconfig.as_deref(), None).await?;
    match action {
        TokenAction::Create { sites, file, ttl } => {
            let authority =
                Authority::load_or_create(&client, &config.namespace, &config.trust_domain).await?;
            let maker = tokens::Maker {
                client,
                namespace: config.namespace.clone(),
                authority,
                life: ttl,
            };
            match (&sites[..], file) {
                ([site], None) => println!("{}", maker.make(site, Timestamp::now()).await?),
                (_, file) => many_tokens(&maker, sites, file.as_deref()).await?,
            }
        }
        TokenAction::List => {
            println!("{:<14} {:<24} EXPIRES", "ID", "SITE");
            for token in tokens::list(&client, &config.namespace).await? {
                let expires = token
                    .expires
                    .map_or_else(|| "unknown".to_owned(), |t| t.to_string());
                println!("{:<14} {:<24} {expires}", token.id, token.site);
            }
        }
        TokenAction::Delete { id } => {
            if !tokens::delete(&client, &config.namespace, &id).await? {
                return Err(Failure::NoToken(id));
            }
        }
    }
    Ok(())
}

/// Prints a line with name and token for each site. What is wrong with one is said, and the others are done.
async fn many_tokens(
    maker: &tokens::Maker,
    mut sites: Vec<SiteName>,
    file: Option<&Path>,
) -> Result<(), Failure> {
    if let Some(file) = file {
        let source = |source| Failure::Names {
            file: file.to_owned(),
            source,
        };
        let text = match file.to_str() {
            Some("-") => std::io::read_to_string(std::io::stdin()).map_err(source)?,
            _ => std::fs::read_to_string(file).map_err(source)?,
        };
        for line in text.lines().map(str::trim).filter(|line| !line.is_empty()) {
            sites.push(line.parse().map_err(|e| Failure::Name {
                file: file.to_owned(),
                reason: format!("{line:?}: {e}"),
            })?);
        }
    }
    let asked = sites.len();
    let mut failed = 0;
    let mut made = std::pin::pin!(maker.make_all(sites));
    while let Some((site, token)) = made.next().await {
        match token {
            Ok(token) => println!("{site} {token}"),
            Err(error) => {
                failed += 1;
                eprintln!("skerry-provider: {site}: {error}");
            }
        }
    }
    if failed > 0 {
        return Err(Failure::SomeTokens { failed, asked });
    }
    Ok(())
}
