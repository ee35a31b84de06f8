//! The `mesh-controller` command: run it, make a join token, rotate the root.

use std::{
    path::PathBuf,
    process::ExitCode,
    time::{Duration, SystemTime},
};

use anyhow::Context;
use mesh_controller::{
    ca::{Authority, Place},
    config::{Config, Invocation, StateCommand},
    controller::Controller,
    kubernetes, privileges, store,
    token::Tokens,
};
use mesh_core::model::Name;
use mesh_settings::log::{self, LogFilter};
use tokio::signal::unix::{SignalKind, signal};

fn main() -> ExitCode {
    let done = match Invocation::of_process() {
        Invocation::PrintConfig(settings) => {
            print!("{}", mesh_settings::layers::print(&settings));
            Ok(())
        }
        Invocation::Run(config) => start(*config),
        Invocation::State(command) => log::start("info").map_err(Into::into).and_then(|_| state(command)),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("mesh-controller: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Before there is any thread: capabilities are a thread's own.
fn start(config: Config) -> anyhow::Result<()> {
    let filter = log::start(&config.log_level)?;
    privileges::drop_all()?;
    run(config, filter)
}

fn state(command: StateCommand) -> anyhow::Result<()> {
    match command {
        StateCommand::Token { state_dir, node, ttl } => token(&state_dir, &node, ttl),
        StateCommand::RotateRoot { state_dir, ca_secret } => rotate_root(state_dir, ca_secret),
    }
}

#[tokio::main]
async fn run(config: Config, filter: LogFilter) -> anyhow::Result<()> {
    let mut terminate = signal(SignalKind::terminate()).context("listening for SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("listening for SIGINT")?;
    let controller = Controller::start(config, filter).await?;
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
    let root = Authority::open_in(state_dir, now)?.root_digest();
    println!("{}", Tokens::open(state_dir)?.create(node, now + ttl, &root)?);
    Ok(())
}

#[tokio::main(flavor = "current_thread")]
async fn rotate_root(state_dir: Option<PathBuf>, ca_secret: Option<Name>) -> anyhow::Result<()> {
    let now = SystemTime::now();
    let authority = match (ca_secret, state_dir) {
        (Some(name), _) => Authority::existing(Place::Secret(kubernetes::client().await?, name)).await?,
        (None, Some(dir)) => Authority::open(Place::Directory(dir), now).await?,
        (None, None) => anyhow::bail!("give --state-dir or --ca-secret"),
    };
    authority.rotate_root(now).await?;
    println!(
        "new root; {} roots are trusted now. Make new join tokens for nodes that are still to join.",
        authority.roots().len()
    );
    Ok(())
}
