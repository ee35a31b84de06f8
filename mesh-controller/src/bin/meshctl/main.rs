//! The `meshctl` command: what is in force, who has it, why a connection is allowed or refused, and whether manifests
//! are good before they are put in place.

mod ask;
mod bundle;
mod check;
mod retire;
mod show;

use std::{path::PathBuf, process::ExitCode};

use ask::{Server, Who};
use clap::{CommandFactory, Parser, Subcommand, ValueEnum};
use mesh_controller::{
    admin::answer::{
        AgentState, Certificates, Connections, LogLevel, PolicyRow, ServiceRow, Status, Why, WorkloadRow,
    },
    ca::Authority,
};
use serde::Serialize;

/// Looks into a Nodemesh mesh. Exit code 0 for an answer, 1 for manifests that are not good, 2 if there is no answer.
#[derive(Debug, Parser)]
#[command(name = "meshctl", version)]
struct Cli {
    /// The controller's HTTP address.
    #[arg(
        long,
        global = true,
        default_value = "http://127.0.0.1:15020",
        env = "NODEMESH_CONTROLLER",
        value_name = "URL"
    )]
    controller: String,
    /// The HTTP address of the agent of this machine.
    #[arg(
        long,
        global = true,
        default_value = "http://127.0.0.1:15021",
        env = "NODEMESH_AGENT",
        value_name = "URL"
    )]
    agent: String,
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
        /// Certificates: those of one node; without it, of all.
        #[arg(long, value_name = "NAME")]
        node: Option<String>,
        /// Certificates: ask the agent of this machine instead of the controller, which may be away.
        #[arg(long, conflicts_with = "node")]
        local: bool,
    },
    /// Takes something out of use for good.
    Retire {
        /// Of which kind.
        #[command(subcommand)]
        what: Retire,
    },
    /// What happens to a connection, and why.
    Why {
        /// The workload that connects: NAMESPACE/NAME.
        source: String,
        /// What it connects to: ADDRESS:PORT or NAMESPACE/NAME:PORT, of a service or a workload.
        destination: String,
    },
    /// Connections that live now on this machine, the newest first, as its agent has them.
    Connections {
        /// Those of one workload, at either end: NAMESPACE/NAME.
        #[arg(value_name = "WORKLOAD")]
        workload: Option<String>,
        /// Most connections to show, at most 10000; if there are more, the answer says so.
        #[arg(long, default_value_t = 1000)]
        limit: usize,
    },
    /// What the log of the controller, or of the agent of this machine, says; with a filter, from now on.
    LogLevel {
        /// Whose.
        #[arg(value_enum)]
        whose: Whose,
        /// `error`, `warn`, `info`, `debug` or `trace`, or a filter such as `info,mesh_agent::enrol=debug`.
        filter: Option<String>,
    },
    /// A support archive without secrets: what controller and agent of this machine answer, their settings in force,
    /// metrics, versions and the kernel. What cannot be asked is said in it.
    Bundle {
        /// The archive to write.
        #[arg(value_name = "FILE", default_value = "nodemesh-bundle.tar.gz")]
        file: PathBuf,
    },
    /// What a shell needs to complete this command: `meshctl completion bash > /etc/bash_completion.d/meshctl`.
    Completion {
        /// Which shell.
        #[arg(value_enum)]
        shell: clap_complete::Shell,
    },
    /// Whether the manifests in a directory are good, and what in them is suspicious; needs no controller. Exit code
    /// 1 if one is refused.
    Check {
        /// The directory.
        dir: PathBuf,
        /// Exit code 1 also for warnings.
        #[arg(long)]
        strict: bool,
        /// The controller's --default-mode: permissive or strict, where neither workload nor namespace says it.
        #[arg(long, value_name = "MODE", default_value = "permissive")]
        default_mode: mesh_core::model::Mode,
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
    /// The certificates that agents hold, and the roots that they lead to.
    Certificates,
    /// The roots that are trusted, and how many certificates lead to each.
    Roots,
}

#[derive(Debug, Subcommand)]
enum Retire {
    /// The oldest root: what leads to it alone is refused within a second, open connections included. Refused while an
    /// agent holds such a certificate or does not say what it holds. Run it on the controller's machine, as its user.
    Root {
        /// Its SHA-256 in hex, or the beginning of it; `meshctl get roots` has them.
        fingerprint: String,
        /// The state directory of the controller.
        #[arg(long, value_name = "DIR")]
        state_dir: PathBuf,
        /// Also while certificates lead to it, and without asking the controller.
        #[arg(long)]
        force: bool,
    },
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Whose {
    /// The controller's.
    Controller,
    /// That of the agent of this machine.
    Agent,
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
    let ask = || Server::new(Who::Controller, &cli.controller);
    let agent = || Server::new(Who::Agent, &cli.agent);
    match &cli.command {
        Command::Status => print(cli.output, &ask()?.get::<Status>("/api/v1/status", &[])?, show::status)?,
        Command::Get { what: What::Workloads, .. } => {
            print(cli.output, &ask()?.get::<Vec<WorkloadRow>>("/api/v1/workloads", &[])?, |it| {
                show::workloads(it)
            })?;
        }
        Command::Get { what: What::Services, .. } => {
            print(cli.output, &ask()?.get::<Vec<ServiceRow>>("/api/v1/services", &[])?, |it| {
                show::services(it)
            })?;
        }
        Command::Get { what: What::Policies, .. } => {
            print(cli.output, &ask()?.get::<Vec<PolicyRow>>("/api/v1/policies", &[])?, |it| {
                show::policies(it)
            })?;
        }
        Command::Why { source, destination } => {
            let question = [("source", source.as_str()), ("destination", destination.as_str())];
            print(cli.output, &ask()?.get::<Why>("/api/v1/why", &question)?, show::why)?;
        }
        Command::Get { what: What::Certificates, local: true, .. } => {
            print(cli.output, &agent()?.get::<AgentState>("/api/v1/state", &[])?, show::local_certificates)?;
        }
        Command::Get { what: What::Certificates, node, .. } => {
            let question: Vec<_> = node.iter().map(|node| ("node", node.as_str())).collect();
            let answer = ask()?.get::<Certificates>("/api/v1/certificates", &question)?;
            print(cli.output, &answer, show::certificates)?;
        }
        Command::Get { what: What::Roots, .. } => {
            let answer = ask()?.get::<Certificates>("/api/v1/certificates", &[])?;
            print(cli.output, &answer.roots, |roots| show::roots(roots))?;
        }
        Command::Retire { what: Retire::Root { fingerprint, state_dir, force } } => {
            if !force {
                retire::may(&ask()?.get("/api/v1/certificates", &[])?, fingerprint)?;
            }
            Authority::existing(state_dir)?.retire_root(fingerprint)?;
            print(Output::Table, &(), |()| "retired; a running controller takes it over\n".to_owned())?;
        }
        Command::Connections { workload, limit } => {
            let limit = limit.to_string();
            let mut question = vec![("limit", limit.as_str())];
            question.extend(workload.as_ref().map(|name| ("workload", name.as_str())));
            let mut answer: Connections = agent()?.get("/api/v1/connections", &question)?;
            answer.node = agent()?.get::<AgentState>("/api/v1/state", &[])?.node;
            print(cli.output, &answer, show::connections)?;
        }
        Command::LogLevel { whose, filter } => {
            let server = match whose {
                Whose::Controller => ask()?,
                Whose::Agent => agent()?,
            };
            let path = "/api/v1/log-level";
            let level: LogLevel = match filter {
                None => server.get(path, &[])?,
                Some(filter) => server.put(path, filter)?,
            };
            print(cli.output, &level, |level| format!("{}\n", level.filter))?;
        }
        Command::Bundle { file } => bundle::write(file, &[("controller", ask()?), ("agent", agent()?)])?,
        Command::Completion { shell } => {
            let mut script = vec![];
            clap_complete::generate(*shell, &mut Cli::command(), "meshctl", &mut script);
            print(Output::Table, &(), |()| String::from_utf8_lossy(&script).into_owned())?;
        }
        Command::Check { dir, strict, default_mode } => {
            return check::check(cli.output, dir, *strict, *default_mode);
        }
    }
    Ok(ExitCode::SUCCESS)
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_reference_of_the_command_is_generated() {
        let introduction = "Asks the controller and, for what only an agent knows, the agent of the machine that it runs on: \
                            no agent answers other machines.";
        let page = mesh_settings::reference::page(&Cli::command(), introduction);
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/reference/meshctl.md");
        mesh_settings::reference::check(path.as_ref(), &page).unwrap();
    }
}
