//! The `meshctl` command: what is in force, who has it, why a connection is allowed or refused, and whether manifests
//! are good before they are put in place.

mod ask;
mod show;

use std::{path::PathBuf, process::ExitCode};

use clap::{Parser, Subcommand, ValueEnum};
use mesh_controller::{
    admin::answer::{Documents, PolicyRow, ServiceRow, Status, Why, WorkloadRow},
    source::files,
};
use serde::Serialize;

/// Looks into a Nodemesh mesh.
#[derive(Debug, Parser)]
#[command(version)]
struct Cli {
    /// The controller's HTTP address.
    #[arg(long, global = true, default_value = "http://127.0.0.1:15020", env = "NODEMESH_CONTROLLER")]
    controller: String,
    /// How answers are printed.
    #[arg(long, global = true, value_enum, default_value_t = Output::Table)]
    output: Output,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Output {
    /// For people.
    Table,
    /// For programs.
    Json,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// The controller, its documents, and every node's agent.
    Status,
    /// What is in force.
    Get {
        /// Of which kind.
        #[arg(value_enum)]
        what: What,
    },
    /// What happens to a connection, and why.
    Why {
        /// The workload that connects: NAMESPACE/NAME.
        source: String,
        /// What it connects to: ADDRESS:PORT or NAMESPACE/NAME:PORT, of a service or a workload.
        destination: String,
    },
    /// Whether the manifests in a directory are good; needs no controller. Exit code 1 if one is refused.
    Check {
        /// The directory.
        dir: PathBuf,
    },
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum What {
    /// Workloads, their identity and how far their capture is.
    Workloads,
    /// Services and their ready endpoints.
    Services,
    /// Policies and the workloads that they select.
    Policies,
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    match run(&cli) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("meshctl: {error:#}");
            ExitCode::from(2)
        }
    }
}

fn run(cli: &Cli) -> anyhow::Result<ExitCode> {
    let ask = || ask::Controller::new(&cli.controller);
    match &cli.command {
        Command::Status => print(cli.output, &ask()?.get::<Status>("/api/v1/status", &[])?, show::status)?,
        Command::Get { what: What::Workloads } => {
            print(cli.output, &ask()?.get::<Vec<WorkloadRow>>("/api/v1/workloads", &[])?, |it| {
                show::workloads(it)
            })?;
        }
        Command::Get { what: What::Services } => {
            print(cli.output, &ask()?.get::<Vec<ServiceRow>>("/api/v1/services", &[])?, |it| {
                show::services(it)
            })?;
        }
        Command::Get { what: What::Policies } => {
            print(cli.output, &ask()?.get::<Vec<PolicyRow>>("/api/v1/policies", &[])?, |it| {
                show::policies(it)
            })?;
        }
        Command::Why { source, destination } => {
            let question = [("source", source.as_str()), ("destination", destination.as_str())];
            print(cli.output, &ask()?.get::<Why>("/api/v1/why", &question)?, show::why)?;
        }
        Command::Check { dir } => return check(cli.output, dir),
    }
    Ok(ExitCode::SUCCESS)
}

fn check(output: Output, dir: &std::path::Path) -> anyhow::Result<ExitCode> {
    let ledger = files::check(dir)?;
    let documents = Documents {
        accepted: ledger.documents_accepted(),
        refused: ledger.documents_refused(),
        problems: ledger.refused().to_vec(),
    };
    print(output, &documents, show::documents)?;
    Ok(if documents.refused == 0 { ExitCode::SUCCESS } else { ExitCode::from(1) })
}

fn print<T: Serialize>(output: Output, answer: &T, table: impl FnOnce(&T) -> String) -> anyhow::Result<()> {
    use std::io::Write;
    let text = match output {
        Output::Table => table(answer),
        Output::Json => serde_json::to_string_pretty(answer)? + "\n",
    };
    // A reader that closes the pipe early (head) is no failure.
    match std::io::stdout().write_all(text.as_bytes()) {
        Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => Err(error.into()),
        _ => Ok(()),
    }
}
