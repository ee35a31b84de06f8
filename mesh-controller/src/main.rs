//! The `mesh-controller` command: run it, make a join token, rotate the root.

use std::{
    path::PathBuf,
    process::ExitCode,
    time::{Duration, SystemTime},
};

use anyhow::Context;
use clap::{Parser, Subcommand};
use mesh_controller::{
    ca::Authority,
    config::{Config, duration},
    controller::Controller,
    store,
    token::Tokens,
};
use tokio::signal::unix::{SignalKind, signal};
use tracing_subscriber::EnvFilter;

/// The controller of a Nodemesh mesh.
#[derive(Debug, Parser)]
#[command(version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Serve agents with their views and certificates.
    Run(Config),
    /// Print a join token: it makes one machine the node of this name, once.
    Token {
        /// The state directory of the controller.
        #[arg(long, value_name = "DIR")]
        state_dir: PathBuf,
        /// The node that may join with it.
        #[arg(long, value_name = "NAME")]
        node: String,
        /// How long it may be used.
        #[arg(long, value_name = "DURATION", default_value = "1h", value_parser = duration)]
        ttl: Duration,
    },
    /// Make a new root; the old one stays trusted. A running controller takes it over. Join tokens that were made
    /// before are no longer good.
    RotateRoot {
        /// The state directory of the controller.
        #[arg(long, value_name = "DIR")]
        state_dir: PathBuf,
    },
}

fn main() -> ExitCode {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info"));
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).init();
    let done = match Cli::parse().command {
        Command::Run(config) => run(config),
        Command::Token { state_dir, node, ttl } => token(&state_dir, &node, ttl),
        Command::RotateRoot { state_dir } => rotate_root(&state_dir),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("mesh-controller: {error:#}");
            ExitCode::FAILURE
        }
    }
}

#[tokio::main]
async fn run(config: Config) -> anyhow::Result<()> {
    let mut terminate = signal(SignalKind::terminate()).context("listening for SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("listening for SIGINT")?;
    let controller = Controller::start(config).await?;
    // Cancel-safe: none of them holds anything.
    let failed = tokio::select! {
        _ = terminate.recv() => false,
        _ = interrupt.recv() => false,
        () = controller.failed() => true,
    };
    tracing::info!("stopping");
    controller.stop().await;
    anyhow::ensure!(!failed, "a part of the controller ended by itself; the log says why");
    Ok(())
}

fn token(state_dir: &std::path::Path, node: &str, ttl: Duration) -> anyhow::Result<()> {
    store::private_dir(state_dir)?;
    let now = SystemTime::now();
    let root = Authority::open(state_dir, now)?.root_digest();
    println!("{}", Tokens::open(state_dir)?.create(node, now + ttl, &root)?);
    Ok(())
}

fn rotate_root(state_dir: &std::path::Path) -> anyhow::Result<()> {
    let now = SystemTime::now();
    let authority = Authority::open(state_dir, now)?;
    authority.rotate_root(now)?;
    println!(
        "new root; {} roots are trusted now. Make new join tokens for nodes that are still to join.",
        authority.roots().len()
    );
    Ok(())
}
