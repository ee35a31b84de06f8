//! The `meshctl` command: what is in force, who has it, why a connection is allowed or refused, and whether manifests
//! are good before they are put in place.

mod ask;
mod bundle;
mod check;
mod install;
mod retire;
mod rotate;
mod show;

use std::{path::PathBuf, process::ExitCode, time::Duration};

use ask::{Server, Who};
use clap::{CommandFactory, Parser, Subcommand, ValueEnum};
use mesh_controller::admin::answer::{
    AgentState, AuthenticationRow, Certificates, Connections, LogLevel, PolicyRow, RouteRow, ServiceRow,
    Status, TrafficRow, Why, WorkloadRow,
};
use mesh_core::model::Name;
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
    /// Makes something new in the place of what is in use, which stays trusted. Controllers that run take it over.
    Rotate {
        /// Of which kind.
        #[command(subcommand)]
        what: Rotate,
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
        /// What it asks for there, where requests are routed: a method and a path, such as 'GET /cart?id=1'.
        #[arg(long, value_name = "REQUEST")]
        request: Option<String>,
        /// A header of the request; may be given several times.
        #[arg(short = 'H', long = "header", value_name = "NAME:VALUE", requires = "request")]
        headers: Vec<String>,
        /// The name that it asks for in TLS, where connections are routed by it, such as db.example.com.
        #[arg(long, value_name = "NAME")]
        server_name: Option<String>,
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
    /// Installs the mesh to the Kubernetes cluster of KUBECONFIG, or brings it up to this version.
    Install {
        /// How long it may take until all of it serves.
        #[arg(long, value_name = "DURATION", default_value = "5m", value_parser = mesh_controller::config::duration)]
        timeout: Duration,
    },
    /// Removes the mesh from the Kubernetes cluster of KUBECONFIG, and from its nodes, whoever installed it.
    Uninstall {
        /// How long each step may take.
        #[arg(long, value_name = "DURATION", default_value = "5m", value_parser = mesh_controller::config::duration)]
        timeout: Duration,
        /// The image that takes off the nodes what agents put there, where no agents are left to tell theirs.
        #[arg(long, value_name = "IMAGE")]
        agent_image: Option<String>,
    },
    /// What a shell needs to complete this command: `meshctl completion bash > /etc/bash_completion.d/meshctl`.
    Completion {
        /// Which shell.
        #[arg(value_enum)]
        shell: clap_complete::Shell,
    },
    /// Whether the manifests in a directory are good, and what in them is suspicious; needs no controller. Exit code
    /// 1 if one is refused. With --pre, whether the mesh can be installed to a Kubernetes cluster.
    Check {
        /// The directory.
        #[arg(required_unless_present = "pre")]
        dir: Option<PathBuf>,
        /// What the Kubernetes cluster of KUBECONFIG lacks, or you may not do there. Exit code 1 if there is such a thing.
        #[arg(long, conflicts_with_all = ["dir", "strict", "default_mode"])]
        pre: bool,
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
    /// Policies on end users, whose tokens they take, and the workloads that they select.
    Authentication,
    /// Routes of requests and of connections, the services that they are in force for, and where they lead.
    Routes,
    /// Policies on how requests and connections are sent, and what they are in force for.
    Traffic,
    /// The certificates that agents hold, and the roots that they lead to.
    Certificates,
    /// The roots that are trusted, and how many certificates lead to each.
    Roots,
}

#[derive(Debug, Subcommand)]
enum Rotate {
    /// A new root, and an issuing certificate below it. Agents renew under it within seconds; the old root stays trusted
    /// until it is retired. Join tokens that were made before are no longer good.
    Root(Authority),
    /// A new issuing certificate below the same root. Certificates that were signed by the one before stay valid, and are
    /// renewed when they are due.
    Intermediate(Authority),
}

/// Whose authority.
#[derive(Debug, clap::Args)]
struct Authority {
    /// The state directory of the controller.
    #[arg(long, value_name = "DIR", required_unless_present = "ca_secret", conflicts_with = "ca_secret")]
    state_dir: Option<PathBuf>,
    /// The Secret of the controllers in Kubernetes, where theirs is one.
    #[arg(long, value_name = "NAMESPACE/NAME")]
    ca_secret: Option<Name>,
}

#[derive(Debug, Subcommand)]
enum Retire {
    /// The oldest root: what leads to it alone is refused within a second, open connections included. Refused while an
    /// agent holds such a certificate or does not say what it holds. Run it on the controller's machine, as its user.
    Root {
        /// Its SHA-256 in hex, or the beginning of it; `meshctl get roots` has them.
        fingerprint: String,
        #[command(flatten)]
        authority: Authority,
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
        Command::Get { what: What::Authentication, .. } => {
            print(cli.output, &ask()?.get::<Vec<AuthenticationRow>>("/api/v1/authentication", &[])?, |it| {
                show::authentication(it)
            })?;
        }
        Command::Get { what: What::Routes, .. } => {
            print(cli.output, &ask()?.get::<Vec<RouteRow>>("/api/v1/routes", &[])?, |it| show::routes(it))?;
        }
        Command::Get { what: What::Traffic, .. } => {
            print(cli.output, &ask()?.get::<Vec<TrafficRow>>("/api/v1/traffic", &[])?, |it| {
                show::traffic(it)
            })?;
        }
        Command::Why { source, destination, request, headers, server_name } => {
            let headers = headers.join("\n");
            let mut question = vec![("source", source.as_str()), ("destination", destination.as_str())];
            question.extend(request.as_ref().map(|request| ("request", request.as_str())));
            question.extend(server_name.as_ref().map(|name| ("server_name", name.as_str())));
            question.push(("headers", headers.as_str()));
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
        Command::Rotate { what: Rotate::Root(authority) } => {
            let roots = wait_for(rotate::root(authority))?;
            let said = format!("new root; {roots} roots are trusted now\n");
            print(Output::Table, &(), |()| said)?;
        }
        Command::Rotate { what: Rotate::Intermediate(authority) } => {
            wait_for(rotate::intermediate(authority))?;
            print(Output::Table, &(), |()| "new issuing certificate\n".to_owned())?;
        }
        Command::Retire { what: Retire::Root { fingerprint, authority, force } } => {
            if !force {
                retire::may(&ask()?.get("/api/v1/certificates", &[])?, fingerprint)?;
            }
            wait_for(retire::root(fingerprint, authority))?;
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
        Command::Check { dir: Some(dir), strict, default_mode, .. } => {
            return check::check(cli.output, dir, *strict, *default_mode);
        }
        Command::Check { dir: None, .. } => {
            let good = wait_for(install::check())?;
            return Ok(if good { ExitCode::SUCCESS } else { ExitCode::from(1) });
        }
        Command::Install { timeout } => wait_for(install::install(*timeout))?,
        Command::Uninstall { timeout, agent_image } => {
            wait_for(install::uninstall(*timeout, agent_image.as_deref()))?
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// Runs what waits for a cluster.
fn wait_for<T>(work: impl Future<Output = anyhow::Result<T>>) -> anyhow::Result<T> {
    tokio::runtime::Builder::new_current_thread().enable_all().build()?.block_on(work)
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
