//! The agent's settings: one struct, read in one place: flags, environment, file.
//!
//! Data only: what a value means is with the module that it steers. `--print-config` shows what is in force.

use std::{ffi::OsString, fmt, net::SocketAddr, path::PathBuf, str::FromStr, time::Duration};

use clap::{Args, Command, FromArgMatches, ValueEnum};
use mesh_core::{
    http::trace::{Share, ShareError},
    view::MAX_ASKED,
};
use mesh_settings::{InForce, Settings};

/// What the variables of the agent's settings begin with.
pub const PREFIX: &str = "NODEMESH_AGENT_";
/// The subcommand that takes the agent off the machine.
const UNINSTALL: &str = "uninstall";
/// The subcommand that looks at the kernel.
const DOCTOR: &str = "doctor";

/// How spans are handed over.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum TracingProtocol {
    /// OTLP over gRPC: port 4317, most often
    Grpc,
    /// OTLP over HTTP/1.1, as protobuf: port 4318, and /v1/traces unless the endpoint has a path
    Http,
}

/// What the command line asks for.
#[derive(Debug)]
pub enum Invocation {
    /// Run the agent.
    Run(Box<Config>),
    /// Print the settings in force.
    PrintConfig(Vec<InForce>),
    /// Take it off the machine.
    Uninstall(Uninstall),
    /// Look at the kernel.
    Doctor(Doctor),
}

impl Invocation {
    /// Reads the command line of this process; says what is wrong with it, or `--help`, and exits.
    pub fn of_process() -> Self {
        Self::parse(std::env::args_os()).unwrap_or_else(|error| error.exit())
    }

    /// Reads a command line, the program's name first.
    pub fn parse<T: Into<OsString>>(words: impl IntoIterator<Item = T>) -> Result<Self, clap::Error> {
        let words: Vec<OsString> = words.into_iter().skip(1).map(Into::into).collect();
        if words.first().is_some_and(|word| word == UNINSTALL) {
            let matches = uninstall().no_binary_name(true).try_get_matches_from(&words[1..])?;
            return Uninstall::from_arg_matches(&matches).map(Self::Uninstall);
        }
        if words.first().is_some_and(|word| word == DOCTOR) {
            let matches = doctor().no_binary_name(true).try_get_matches_from(&words[1..])?;
            return Doctor::from_arg_matches(&matches).map(Self::Doctor);
        }
        let (matches, in_force) = settings().parse(&words)?;
        if Settings::print_only(&matches) {
            return Ok(Self::PrintConfig(in_force));
        }
        let config = Config::from_arg_matches(&matches)?;
        Ok(Self::Run(Box::new(Config { in_force, ..config })))
    }
}

/// Everything that the agent can be told; what the reference is generated from.
pub fn settings() -> Settings {
    let run = Command::new("mesh-agent")
        .version(env!("CARGO_PKG_VERSION"))
        .about("The agent of one node of the mesh.")
        .args_conflicts_with_subcommands(true)
        .subcommand_negates_reqs(true)
        .subcommand(uninstall())
        .subcommand(doctor());
    Settings::new(Config::augment_args(run), PREFIX)
}

fn uninstall() -> Command {
    let about = "Removes everything that the agent put onto the machine: programs, maps, rules, routes, settings, files. \
                 The agent must not run.";
    Uninstall::augment_args(Command::new(UNINSTALL).about(about))
}

fn doctor() -> Command {
    let about =
        "Tells what this kernel has of what capture needs, and what follows where it lacks something.";
    Doctor::augment_args(Command::new(DOCTOR).about(about))
}

/// What the agent needs to leave the machine as it found it.
#[derive(Debug, Clone, Args)]
pub struct Uninstall {
    /// Where programs and maps are pinned.
    #[arg(long, value_name = "DIR", default_value = "/sys/fs/bpf/nodemesh")]
    pub bpffs: PathBuf,
    /// The run directory of the agent, removed as well when given: without it, what the agent changed in namespaces'
    /// settings stays.
    #[arg(long, value_name = "DIR")]
    pub run_dir: Option<PathBuf>,
    /// The agent's own control group.
    #[arg(long, value_name = "NAME", default_value = "nodemesh-agent")]
    pub cgroup: String,
}

/// What is needed to look at the kernel.
#[derive(Debug, Clone, Args)]
pub struct Doctor {
    /// Where programs and maps would be pinned; what is tried goes beside it and is removed again.
    #[arg(long, value_name = "DIR", default_value = "/sys/fs/bpf/nodemesh")]
    pub bpffs: PathBuf,
}

/// The settings of a running agent.
#[derive(Debug, Clone, Args)]
pub struct Config {
    /// This node's name, as workloads and the join token name it.
    #[arg(long, value_name = "NAME")]
    pub node: String,
    /// Where the controller serves agents.
    #[arg(long, value_name = "HOST:PORT")]
    pub controller: HostPort,
    /// The join token; read only when this node has no valid certificate.
    #[arg(long, value_name = "FILE")]
    pub join_token_file: Option<PathBuf>,
    /// In Kubernetes, in the place of a join token: the projected service-account token of this pod, with the audience
    /// `nodemesh`; read again whenever this node has no valid certificate.
    #[arg(long, value_name = "FILE", requires = "roots", conflicts_with = "join_token_file")]
    pub join_service_account_token: Option<PathBuf>,
    /// The roots of the mesh, PEM, of which the controller has to lead to one while this node has no certificate: key
    /// `roots.pem` of the ConfigMap `nodemesh-roots`. Read again as it changes.
    #[arg(long, value_name = "FILE", requires = "join_service_account_token")]
    pub roots: Option<PathBuf>,
    /// Keys, certificates and the last view; has to be on a tmpfs, so that keys never reach a disk.
    #[arg(long, value_name = "DIR", default_value = "/run/nodemesh")]
    pub run_dir: PathBuf,
    /// Where programs and maps are pinned; a folder of a bpf file system.
    #[arg(long, value_name = "DIR", default_value = "/sys/fs/bpf/nodemesh")]
    pub bpffs: PathBuf,
    /// The agent's own control group, by which the kernel's guard knows the agent's sockets; `.` for the one that it was
    /// started in, which in a container is its own.
    #[arg(long, value_name = "NAME", default_value = "nodemesh-agent")]
    pub cgroup: String,
    /// Metrics, health and state over HTTP.
    #[arg(long, value_name = "ADDR:PORT", default_value = "127.0.0.1:15021")]
    pub admin_listen: SocketAddr,
    /// Metrics alone, for a Prometheus that is not on the node: they tell names and identities of workloads to whoever asks.
    #[arg(long, value_name = "ADDR:PORT")]
    pub metrics_listen: Option<SocketAddr>,
    /// One JSON object a line for every connection; `-` is standard output.
    #[arg(long, value_name = "PATH|-", default_value = "-")]
    pub access_log: PathBuf,
    /// What of that is logged: `on`, all; `5%`, what was refused or failed, and so many of those that went well; `errors`, none
    /// of these; `off`, nothing.
    #[arg(long, value_name = "on|N%|errors|off", default_value = "on")]
    pub access_log_mode: LogMode,
    /// The collector of spans of requests, by OTLP: `http://HOST:PORT`, or `https://HOST:PORT`. Without it nothing is traced.
    #[arg(long, value_name = "URL")]
    pub tracing_endpoint: Option<String>,
    /// What the collector speaks.
    #[arg(long, value_name = "PROTOCOL", value_enum, default_value = "grpc")]
    pub tracing_protocol: TracingProtocol,
    /// The roots, PEM, of which the collector has to lead to one, for https; without it those that the system trusts.
    #[arg(long, value_name = "FILE", requires = "tracing_endpoint")]
    pub tracing_roots: Option<PathBuf>,
    /// How many of the requests are traced of which nobody has said so yet: those that bring a context are traced as it says.
    /// `0%` begins no traces.
    #[arg(long, value_name = "N%", default_value = "1%")]
    pub tracing_sample: Share,
    /// How long an agent that was told to stop serves on for want of a successor, and how long connections may take to
    /// finish once there is one. A supervisor has to grant both, one after the other.
    #[arg(long, value_name = "DURATION", default_value = "30s", value_parser = parse_duration)]
    pub drain_deadline: Duration,
    /// Most memory for bytes that wait for readers who do not read: of workloads of this node and of their peers. A reader
    /// has as much of it as is left for all others; connections that need more are ended.
    #[arg(long, value_name = "SIZE", default_value = "256MiB", value_parser = parse_size)]
    pub stalled_memory: usize,
    /// Addresses of the mesh that a workload may have in use or have used lately, each way: what it costs the node and the
    /// controller to know them, where the mesh is larger than the controller's `--whole-views-up-to`. A workload that uses
    /// more gives up what it has not used for longest.
    #[arg(long, value_name = "COUNT", default_value_t = 8192, value_parser = at_least_one)]
    pub addresses_per_workload: usize,
    /// How long at most what a new pod sends is held until the pod is captured, or known to be outside of the mesh; a pod
    /// that is known to be strict is held until it is captured. `0s` holds nothing. For nodes of Kubernetes: every new veth of the node is taken for a pod's.
    #[arg(long, value_name = "DURATION", default_value = "0s", value_parser = parse_duration)]
    pub hold_new: Duration,
    /// What the log says: `error`, `warn`, `info`, `debug` or `trace`, or a filter such as `info,mesh_agent::enrol=debug`.
    /// `RUST_LOG` wins over it; `meshctl log-level` changes it while the agent runs.
    #[arg(long, value_name = "FILTER", default_value = "info")]
    pub log_level: String,
    /// All of the above as they were given, each with where it comes from.
    #[arg(skip)]
    pub in_force: Vec<InForce>,
}

fn at_least_one(text: &str) -> Result<usize, String> {
    let found = text.parse().ok().filter(|count| (1..=MAX_ASKED).contains(count));
    found.ok_or_else(|| format!("'{text}' is not a number from 1 to {MAX_ASKED}"))
}

/// What the access log has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LogMode {
    /// What was refused or failed, and this part of what went well.
    Part(Share),
    /// Nothing at all.
    Off,
}

/// A text is no mode.
#[derive(Debug, thiserror::Error)]
#[error(
    "'{0}' is not what can be logged: write on, errors, off, or how many of those that went well, as in 5%"
)]
pub struct LogModeError(String, #[source] ShareError);

impl LogMode {
    /// Everything.
    pub const ON: Self = Self::Part(Share::ALL);
}

impl FromStr for LogMode {
    type Err = LogModeError;

    /// Reads `on`, `errors`, `off`, `5%`.
    fn from_str(text: &str) -> Result<Self, LogModeError> {
        let part = match text {
            "on" => Ok(Share::ALL),
            "off" => return Ok(Self::Off),
            "errors" => "0%".parse(),
            part => part.parse(),
        };
        part.map(Self::Part).map_err(|error| LogModeError(text.to_owned(), error))
    }
}

/// A host, by name or address, and a port.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HostPort {
    /// Name or address, an IPv6 address without brackets.
    pub host: String,
    /// Port.
    pub port: u16,
}

/// A text is not `HOST:PORT`.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("'{0}' is not HOST:PORT; write an IPv6 address as [ADDRESS]:PORT")]
pub struct HostPortError(String);

impl FromStr for HostPort {
    type Err = HostPortError;
    fn from_str(text: &str) -> Result<Self, HostPortError> {
        let bad = || HostPortError(text.to_owned());
        let (host, port) = text.rsplit_once(':').ok_or_else(bad)?;
        let port = port.parse().ok().filter(|port| *port != 0).ok_or_else(bad)?;
        let bare = host.strip_prefix('[').and_then(|host| host.strip_suffix(']'));
        match bare {
            Some(address) if address.parse::<std::net::Ipv6Addr>().is_ok() => {
                Ok(Self { host: address.to_owned(), port })
            }
            None if !host.is_empty() && !host.contains([':', '[', ']', '/']) => {
                Ok(Self { host: host.to_owned(), port })
            }
            _ => Err(bad()),
        }
    }
}

impl From<SocketAddr> for HostPort {
    fn from(address: SocketAddr) -> Self {
        Self { host: address.ip().to_string(), port: address.port() }
    }
}

impl fmt::Display for HostPort {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.host.contains(':') {
            write!(f, "[{}]:{}", self.host, self.port)
        } else {
            write!(f, "{}:{}", self.host, self.port)
        }
    }
}

/// A text is not a size.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "'{0}' is not a size: write a number of KiB, MiB or GiB, as in 256MiB, at least 1MiB and at most 1024GiB"
)]
pub struct SizeError(String);

/// Reads `1024KiB`, `256MiB`, `2GiB`, in bytes.
pub fn parse_size(text: &str) -> Result<usize, SizeError> {
    let bad = || SizeError(text.to_owned());
    let digits = text.find(|c: char| !c.is_ascii_digit()).ok_or_else(bad)?;
    let (number, unit) = text.split_at(digits);
    let bits = match unit {
        "KiB" => 10,
        "MiB" => 20,
        "GiB" => 30,
        _ => return Err(bad()),
    };
    let bytes = number.parse::<usize>().ok().and_then(|number| number.checked_mul(1 << bits));
    bytes.filter(|bytes| (1 << 20..=1 << 40).contains(bytes)).ok_or_else(bad)
}

/// A text is not a duration.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("'{0}' is not a duration: write a number and ms, s, m or h, as in 500ms, 30s or 24h")]
pub struct DurationError(String);

/// Reads `500ms`, `30s`, `5m`, `24h`.
pub fn parse_duration(text: &str) -> Result<Duration, DurationError> {
    let bad = || DurationError(text.to_owned());
    let digits = text.find(|c: char| !c.is_ascii_digit()).ok_or_else(bad)?;
    let (number, unit) = text.split_at(digits);
    let number: u64 = number.parse().map_err(|_| bad())?;
    let milliseconds: u64 = match unit {
        "ms" => 1,
        "s" => 1_000,
        "m" => 60_000,
        "h" => 3_600_000,
        _ => return Err(bad()),
    };
    number.checked_mul(milliseconds).map(Duration::from_millis).ok_or_else(bad)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(line: &str) -> Result<Invocation, clap::Error> {
        Invocation::parse(line.split(' '))
    }

    #[test]
    fn settings_print_as_they_were_given_and_defaults_are_filled_in() {
        let line = "mesh-agent --node n1 --controller [fd00::1]:15012 --drain-deadline 90s --print-config";
        let Invocation::PrintConfig(settings) = parse(line).unwrap() else { panic!("not a print") };
        let value = |name: &str| settings.iter().find(|it| it.name == name).unwrap().value.as_str();
        assert_eq!(
            [value("node"), value("controller"), value("drain-deadline"), value("admin-listen")],
            ["n1", "[fd00::1]:15012", "90s", "127.0.0.1:15021"]
        );
    }

    #[test]
    fn the_reference_of_the_agents_settings_is_generated() {
        let introduction = include_str!("../reference.md");
        let page = mesh_settings::reference::page(settings().command(), introduction);
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/reference/mesh-agent.md");
        mesh_settings::reference::check(path.as_ref(), &page).unwrap();
    }

    #[test]
    fn a_run_needs_a_node_and_a_controller() {
        for line in [
            "mesh-agent",
            "mesh-agent --node n1",
            "mesh-agent --controller a:1",
            "mesh-agent --node n1 --controller a",
        ] {
            assert!(parse(line).is_err(), "{line}");
        }
    }

    #[test]
    fn uninstall_needs_neither() {
        let Invocation::Uninstall(uninstall) = parse("mesh-agent uninstall --bpffs /sys/fs/bpf/x").unwrap()
        else {
            panic!("not an uninstall")
        };
        assert_eq!(uninstall.bpffs, PathBuf::from("/sys/fs/bpf/x"));
        assert_eq!(uninstall.run_dir, None);
    }

    #[test]
    fn sizes_are_a_number_and_a_unit() {
        for (text, bytes) in [("1024KiB", 1 << 20), ("256MiB", 256 << 20), ("2GiB", 2 << 30)] {
            assert_eq!(parse_size(text), Ok(bytes));
        }
        for text in ["", "1", "MiB", "1MB", "-1MiB", "0MiB", "1023KiB", "1025GiB", "99999999999999999999GiB"]
        {
            assert!(parse_size(text).is_err(), "{text}");
        }
    }

    #[test]
    fn durations_and_addresses_are_checked() {
        for (text, ms) in [("500ms", 500), ("30s", 30_000), ("5m", 300_000), ("24h", 86_400_000)] {
            assert_eq!(parse_duration(text), Ok(Duration::from_millis(ms)));
        }
        for text in ["", "s", "30", "30x", "-1s", "1.5s", "99999999999999999999h", "18446744073709551615h"] {
            assert!(parse_duration(text).is_err(), "{text}");
        }
        for text in ["a:1", "10.0.0.1:15012", "[::1]:1"] {
            assert_eq!(text.parse::<HostPort>().unwrap().to_string(), text);
        }
        for text in ["a", ":1", "a:", "a:0", "a:65536", "::1:1", "[a]:1", "http://a:1"] {
            assert!(text.parse::<HostPort>().is_err(), "{text}");
        }
    }
}
