//! Prometheus, of Debian's package: its program beside a world, asked by its API, and promtool.

use std::{
    fs,
    net::SocketAddr,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use crate::{
    http, netns,
    netns::NetNs,
    process::{self, Program},
    wait,
};

/// How often it asks its targets and evaluates its rules.
const INTERVAL: &str = "200ms";
/// What it keeps besides: traces of requests beside buckets, and, where native histograms are wanted, those. Then it asks for
/// metrics as messages.
const EXEMPLARS: &str = "exemplar-storage";
const NATIVE: &str = "exemplar-storage,native-histograms";
/// How long it may take to be ready.
const READY: Duration = Duration::from_secs(20);

/// `promtool` with these arguments, in this directory: what it says, or what it complains of.
pub fn promtool(directory: &Path, arguments: &[&str]) -> Result<String> {
    let mut command = Command::new("promtool");
    netns::run(command.current_dir(directory).args(arguments), None)
        .context("promtool, of Debian's package prometheus; `cargo xtask test` installs it")
}

/// A Prometheus that runs.
#[derive(Debug)]
pub struct Prometheus {
    netns: NetNs,
    at: SocketAddr,
    log: PathBuf,
    _program: Program,
}

/// Who is asked for metrics: a job and an address.
#[derive(Debug, Clone)]
pub struct Target {
    /// The job's name.
    pub job: &'static str,
    /// What its series have as `instance`.
    pub instance: String,
    /// Where it answers.
    pub address: SocketAddr,
}

impl Prometheus {
    /// Starts it in a namespace, with files in a directory of its own, and waits until it is ready.
    pub fn start(
        netns: &NetNs,
        at: SocketAddr,
        directory: &Path,
        targets: &[Target],
        rules: &str,
    ) -> Result<Self> {
        Self::start_with(EXEMPLARS, netns, at, directory, targets, rules)
    }

    /// One that keeps native histograms, which takes the place of their buckets of fixed bounds.
    pub fn start_native(netns: &NetNs, at: SocketAddr, directory: &Path, targets: &[Target]) -> Result<Self> {
        Self::start_with(NATIVE, netns, at, directory, targets, "groups: []\n")
    }

    fn start_with(
        features: &str,
        netns: &NetNs,
        at: SocketAddr,
        directory: &Path,
        targets: &[Target],
        rules: &str,
    ) -> Result<Self> {
        fs::create_dir_all(directory)?;
        fs::write(directory.join("rules.yaml"), rules)?;
        fs::write(directory.join("prometheus.yaml"), configuration(targets))?;
        let log = directory.join("prometheus.log");
        let mut command = netns.command("prometheus");
        command.arg("--config.file").arg(directory.join("prometheus.yaml"));
        command.arg("--storage.tsdb.path").arg(directory.join("data"));
        command.arg(format!("--web.listen-address={at}")).arg(format!("--enable-feature={features}"));
        // Of ALERTS, too, the last value is not older than that.
        command.args(["--query.lookback-delta", "2s", "--rules.alert.resend-delay", "1s"]);
        let program = Program::start("prometheus", &mut command, &log)
            .context("prometheus, of Debian's package; `cargo xtask test` installs it")?;
        let prometheus = Self { netns: netns.clone(), at, log, _program: program };
        wait::try_until(READY, || {
            let answer = prometheus.get("/-/ready").map_err(|error| format!("{error:#}"))?;
            wait::holds(answer.status == 200, || answer.body)
        })
        .map_err(|last| {
            anyhow::anyhow!("prometheus is not ready: {last}\n{}", process::tail(&prometheus.log))
        })?;
        Ok(prometheus)
    }

    fn get(&self, path: &str) -> Result<http::Answer> {
        http::get(&self.netns, self.at, path)
    }

    /// What an expression comes to: a list of series, each with its value.
    pub fn query(&self, expression: &str) -> Result<Vec<Value>> {
        let answer = self.get(&format!("/api/v1/query?query={}", encoded(expression)))?;
        let said: Value = serde_json::from_str(&answer.body).with_context(|| answer.body.clone())?;
        ensure!(said["status"] == "success", "{expression}: {}", said["error"]);
        Ok(said["data"]["result"].as_array().cloned().unwrap_or_default())
    }

    /// The traces that stand beside the series of an expression, each with labels, value and time; those of the last minutes.
    pub fn exemplars(&self, expression: &str) -> Result<Vec<Value>> {
        let answer = self.get(&format!("/api/v1/query_exemplars?query={}", encoded(expression)))?;
        let said: Value = serde_json::from_str(&answer.body).with_context(|| answer.body.clone())?;
        ensure!(said["status"] == "success", "{expression}: {}", said["error"]);
        let series = said["data"].as_array().cloned().unwrap_or_default();
        Ok(series.iter().flat_map(|it| it["exemplars"].as_array().cloned().unwrap_or_default()).collect())
    }

    /// The alerts that fire, each with labels and annotations.
    pub fn firing(&self) -> Result<Vec<Value>> {
        let answer = self.get("/api/v1/alerts")?;
        let said: Value = serde_json::from_str(&answer.body).with_context(|| answer.body.clone())?;
        let all = said["data"]["alerts"].as_array().cloned().with_context(|| answer.body.clone())?;
        Ok(all.into_iter().filter(|alert| alert["state"] == "firing").collect())
    }
}

fn configuration(targets: &[Target]) -> String {
    let mut text = format!(
        "global: {{scrape_interval: {INTERVAL}, scrape_timeout: {INTERVAL}, evaluation_interval: {INTERVAL}}}\n\
         rule_files: [rules.yaml]\nscrape_configs:\n"
    );
    for Target { job, instance, address } in targets {
        text += &format!(
            "  - {{job_name: {job}-{instance}, static_configs: [{{targets: ['{address}'], labels: {{job: {job}, \
             instance: {instance}}}}}]}}\n"
        );
    }
    text
}

/// For a URL's query.
fn encoded(text: &str) -> String {
    text.bytes()
        .map(|byte| match byte {
            b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' => char::from(byte).to_string(),
            other => format!("%{other:02X}"),
        })
        .collect()
}
