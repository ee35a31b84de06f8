//! The settings of a controller, each with its default and its reason; read from the command line, once.

use std::{net::SocketAddr, path::PathBuf, time::Duration};

use mesh_core::{identity::TrustDomain, model::Mode};

/// Shortest life of a certificate: below, renewal could not keep up with clocks that differ.
const MIN_TTL: Duration = Duration::from_secs(10);

/// What a controller is started with.
#[derive(Debug, Clone, clap::Args)]
pub struct Config {
    /// Directory of the manifests (*.yaml, *.yml), followed as it changes.
    #[arg(long, value_name = "DIR")]
    pub source: PathBuf,
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
    /// How long certificates of nodes and workloads live; agents renew them from half of it.
    #[arg(long, value_name = "DURATION", default_value = "24h", value_parser = certificate_ttl)]
    pub certificate_ttl: Duration,
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
