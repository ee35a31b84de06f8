//! The settings of a controller, each with its default and its reason; read once, from flags, environment and file.

use std::{ffi::OsString, net::SocketAddr, path::PathBuf, time::Duration};

use clap::{Args, Command, FromArgMatches, Subcommand};
use mesh_core::{
    identity::TrustDomain,
    model::{Mode, Name},
};
use mesh_settings::{InForce, Settings};

use crate::source::Place;

/// Shortest life of a certificate: below, renewal could not keep up with clocks that differ.
const MIN_TTL: Duration = Duration::from_secs(10);

/// What the variables of the controller's settings begin with.
pub const PREFIX: &str = "NODEMESH_CONTROLLER_";
/// The subcommand that has settings.
const RUN: &str = "run";

/// What the command line asks for.
#[derive(Debug)]
pub enum Invocation {
    /// Run the controller.
    Run(Box<Config>),
    /// Print the settings in force.
    PrintConfig(Vec<InForce>),
    /// Do something with its state.
    State(StateCommand),
}

/// What is done with the state, also while a controller runs.
#[derive(Debug, Subcommand)]
pub enum StateCommand {
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
        #[arg(long, value_name = "DIR", required_unless_present = "ca_secret", conflicts_with = "ca_secret")]
        state_dir: Option<PathBuf>,
        /// The Secret of the controllers in Kubernetes, where theirs is one.
        #[arg(long, value_name = "NAMESPACE/NAME")]
        ca_secret: Option<Name>,
    },
}

impl Invocation {
    /// Reads the command line of this process; says what is wrong with it, or `--help`, and exits.
    pub fn of_process() -> Self {
        Self::parse(std::env::args_os()).unwrap_or_else(|error| error.exit())
    }

    /// Reads a command line, the program's name first.
    pub fn parse<T: Into<OsString>>(words: impl IntoIterator<Item = T>) -> Result<Self, clap::Error> {
        let words: Vec<OsString> = words.into_iter().map(Into::into).collect();
        if words.get(1).is_some_and(|word| word == RUN) {
            let (matches, in_force) = settings().parse(&words[2..])?;
            if Settings::print_only(&matches) {
                return Ok(Self::PrintConfig(in_force));
            }
            let config = Config::from_arg_matches(&matches)?;
            return Ok(Self::Run(Box::new(Config { in_force, ..config })));
        }
        StateCommand::from_arg_matches(&command().try_get_matches_from(words)?).map(Self::State)
    }
}

/// The whole command line; what the reference is generated from.
pub fn command() -> Command {
    let base = Command::new("mesh-controller")
        .version(env!("CARGO_PKG_VERSION"))
        .about("The controller of a Nodemesh mesh.")
        .subcommand_required(true)
        .arg_required_else_help(true)
        .subcommand(settings().command().clone());
    StateCommand::augment_subcommands(base)
}

fn settings() -> Settings {
    let run = Command::new(RUN)
        .bin_name("mesh-controller run")
        .about("Serve agents with their views and certificates.");
    Settings::new(Config::augment_args(run), PREFIX)
}

/// What a controller is started with.
#[derive(Debug, Clone, Args)]
pub struct Config {
    /// Where the desired state is, followed as it changes: a directory of manifests (*.yaml, *.yml), or `kube` for the
    /// Kubernetes cluster of this pod's service account, or of KUBECONFIG.
    #[arg(long, value_name = "DIR|kube")]
    pub source: Place,
    /// Directory of the controller's own state: certificate authority, join tokens, reports.
    #[arg(long, value_name = "DIR")]
    pub state_dir: PathBuf,
    /// Where agents connect (gRPC over TLS).
    #[arg(long, value_name = "ADDR:PORT", default_value = "0.0.0.0:15012")]
    pub listen: SocketAddr,
    /// Where metrics, readiness and `meshctl` connect (HTTP). It has no authentication: keep it local.
    #[arg(long, value_name = "ADDR:PORT", default_value = "127.0.0.1:15020")]
    pub admin_listen: SocketAddr,
    /// The trust domain of every identity: spiffe://NAME/...
    #[arg(long, value_name = "NAME", default_value = "cluster.local")]
    pub trust_domain: TrustDomain,
    /// Whether workloads take plaintext (permissive) or not (strict), where neither the label nodemesh.io/mode of the
    /// workload nor that of its namespace says it.
    #[arg(long, value_name = "MODE", default_value = "permissive")]
    pub default_mode: Mode,
    /// Up to so many workloads and services every node is told of all of them, and needs nobody while the controller is
    /// away. In a larger mesh a node is told of its own workloads and of the addresses that these use; 0: always.
    #[arg(long, value_name = "COUNT", default_value_t = 1000)]
    pub whole_views_up_to: usize,
    /// How long certificates of nodes and workloads live; agents renew them from half of it.
    #[arg(long, value_name = "DURATION", default_value = "24h", value_parser = certificate_ttl)]
    pub certificate_ttl: Duration,
    /// The Secret in Kubernetes that has the certificate authority, in the place of the state directory: several controllers
    /// share it. Made if it is not there.
    #[arg(long, value_name = "NAMESPACE/NAME", conflicts_with = "issuer_dir")]
    pub ca_secret: Option<Name>,
    /// Directory of an issuing certificate that somebody else makes and renews, followed as it changes: `tls.crt`,
    /// `tls.key` and `ca.crt`, as cert-manager's Secrets have it. In the place of an authority of the controller's own.
    #[arg(long, value_name = "DIR")]
    pub issuer_dir: Option<PathBuf>,
    /// The ConfigMap in Kubernetes where the roots are published for agents that join: key `roots.pem`.
    #[arg(long, value_name = "NAMESPACE/NAME")]
    pub roots_config_map: Option<Name>,
    /// The service account that agents run as in Kubernetes, such as nodemesh-system/nodemesh-agent: a pod of it makes its
    /// node one of the mesh, with a projected token of the audience `nodemesh`, by the word of the API server of this pod's
    /// service account or of KUBECONFIG. Without it only join tokens do.
    #[arg(long, value_name = "NAMESPACE/NAME")]
    pub join_service_account: Option<Name>,
    /// The Service in Kubernetes whose endpoints are all controllers of the mesh, with a port named `admin`: what is asked of
    /// one is answered for all, and one that the API server does not answer sends its agents to one that is ready.
    #[arg(long, value_name = "NAMESPACE/NAME")]
    pub controllers: Option<Name>,
    /// What the log says: `error`, `warn`, `info`, `debug` or `trace`, or a filter such as
    /// `info,mesh_controller::api=debug`. `RUST_LOG` wins over it; `meshctl log-level` changes it at run time.
    #[arg(long, value_name = "FILTER", default_value = "info")]
    pub log_level: String,
    /// All of the above as they were given, each with where it comes from.
    #[arg(skip)]
    pub in_force: Vec<InForce>,
}

/// Why a text is not a duration.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum DurationError {
    /// Not a number and a unit.
    #[error("'{0}' is not a duration: write a number and a unit (ms, s, m, h, d), such as 90s or 24h")]
    Malformed(String),
    /// Too short.
    #[error("certificates must live at least {}s", MIN_TTL.as_secs())]
    TooShort,
}

fn certificate_ttl(text: &str) -> Result<Duration, DurationError> {
    duration(text).and_then(|ttl| if ttl < MIN_TTL { Err(DurationError::TooShort) } else { Ok(ttl) })
}

/// Reads a duration such as `90s`, `15m`, `24h`, `7d`, `500ms`.
pub fn duration(text: &str) -> Result<Duration, DurationError> {
    let malformed = || DurationError::Malformed(text.chars().take(50).collect());
    let digits = text.find(|c: char| !c.is_ascii_digit()).ok_or_else(malformed)?;
    let (number, unit) = text.split_at(digits);
    let number: u64 = number.parse().map_err(|_| malformed())?;
    let unit_ms = match unit {
        "ms" => 1,
        "s" => 1000,
        "m" => 60 * 1000,
        "h" => 3600 * 1000,
        "d" => 24 * 3600 * 1000,
        _ => return Err(malformed()),
    };
    // A century is longer than anything here lives, and keeps sums of times within their types.
    let limit_ms = 100 * 365 * 24 * 3600 * 1000;
    number.checked_mul(unit_ms).filter(|ms| *ms <= limit_ms).map(Duration::from_millis).ok_or_else(malformed)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings_come_from_flag_file_and_default_and_print_with_their_source() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), "source: /etc/mesh\nlisten: 127.0.0.1:1\ncertificate-ttl: 2h\n").unwrap();
        let path = file.path().display().to_string();
        let words =
            ["mesh-controller", "run", "--state-dir", "/s", "--listen", "127.0.0.1:2", "--config", &path];
        let Invocation::Run(config) = Invocation::parse(words).unwrap() else { panic!("not a run") };
        assert_eq!((config.source, config.listen.port()), (Place::Directory("/etc/mesh".into()), 2));
        assert_eq!(config.certificate_ttl, Duration::from_secs(7200));
        let words = words.into_iter().chain(["--print-config"]);
        let Invocation::PrintConfig(settings) = Invocation::parse(words).unwrap() else {
            panic!("not a print")
        };
        let of = |name: &str| settings.iter().find(|it| it.name == name).unwrap().source.clone();
        assert_eq!(
            [of("source"), of("listen"), of("trust-domain")],
            [format!("{path}:1"), "flag".into(), "default".into()]
        );
    }

    #[test]
    fn the_reference_of_the_controllers_settings_is_generated() {
        let page = mesh_settings::reference::page(&command(), include_str!("../reference.md"));
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/reference/mesh-controller.md");
        mesh_settings::reference::check(path.as_ref(), &page).unwrap();
    }

    #[test]
    fn durations_are_a_number_and_a_unit() {
        for (text, expected) in [
            ("90s", Some(Duration::from_secs(90))),
            ("24h", Some(Duration::from_secs(86400))),
            ("500ms", Some(Duration::from_millis(500))),
            ("7d", Some(Duration::from_secs(7 * 86400))),
            ("", None),
            ("5", None),
            ("h", None),
            ("1.5h", None),
            ("-1s", None),
            ("99999999999999999d", None),
        ] {
            assert_eq!(duration(text).ok(), expected, "{text}");
        }
        assert_eq!(certificate_ttl("1s"), Err(DurationError::TooShort));
    }
}
