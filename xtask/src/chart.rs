//! The chart of deploy/helm, and the manifests that are made from it for who has no helm.
//!
//! helm is built from source, once, from the Go module proxy, like Kubernetes.

use std::{fs, path::PathBuf};

use anyhow::{Context, Result, ensure};

use crate::{
    dashboards,
    run::{clean, read, root, step, succeed},
    setup,
};

/// Its Kubernetes is that of the tests, so most of what it is built from is there already.
const HELM: &str = "v3.19.5";
/// What helm is told that it renders for: the oldest that the chart takes.
const KUBERNETES: &str = "1.29.0";
const CHART: &str = "deploy/helm/nodemesh";
const MANIFESTS: &str = "deploy/manifests/nodemesh.yaml";
/// Where everything is installed.
const NAMESPACE: &str = "nodemesh-system";
/// What the chart has copies of, as it can read nothing beside itself: from where, which files, to where in the chart.
const COPIED: [(&str, &str, &str); 3] = [
    ("deploy/crds", ".yaml", "crds-of-ours"),
    (dashboards::DIRECTORY, ".json", "dashboards-of-ours"),
    ("deploy/alerts", "nodemesh.yaml", "rules-of-ours"),
];

const HEAD: &str = "\
# Everything of Nodemesh, with the chart's own settings. Generated from deploy/helm by `cargo xtask generate`.
apiVersion: v1
kind: Namespace
metadata:
  name: nodemesh-system
  labels:
    # Agents enter the network namespaces of pods, and load programs into the kernel.
    pod-security.kubernetes.io/enforce: privileged
    nodemesh.io/enroll: \"false\"
";

/// Writes the manifests, and the chart's copies.
pub(crate) fn generate() -> Result<()> {
    step("Write deploy/manifests", || {
        for (path, text) in copies()? {
            fs::create_dir_all(path.parent().context("a file is in a directory")?)?;
            fs::write(path, text)?;
        }
        let path = root().join(MANIFESTS);
        fs::create_dir_all(path.parent().context("a file is in a directory")?)?;
        let text = manifests()?;
        fs::write(&path, text).with_context(|| format!("writing {}", path.display()))
    })
}

/// Fails when the chart is not one, and when the manifests are not what it makes.
pub(crate) fn check() -> Result<()> {
    step("Check the chart and its manifests", || {
        succeed(clean(helm()?).args(["lint", "--strict", "--quiet", CHART]))?;
        let mut stale: Vec<PathBuf> = vec![];
        for (path, text) in copies()?.into_iter().chain([(root().join(MANIFESTS), manifests()?)]) {
            if fs::read_to_string(&path).ok() != Some(text) {
                stale.push(path);
            }
        }
        ensure!(stale.is_empty(), "stale: {stale:?}; run `cargo xtask generate`");
        check_monitoring()?;
        check_tracing()
    })
}

fn manifests() -> Result<String> {
    Ok(format!("{HEAD}{}", template(&[])?))
}

/// What the chart makes with these settings.
fn template(settings: &[&str]) -> Result<String> {
    let mut template = clean(helm()?);
    template.args(["template", "nodemesh", CHART, "--namespace", NAMESPACE, "--kube-version", KUBERNETES]);
    read(template.args(settings))
}

/// What the chart has copies of, where it has them.
fn copies() -> Result<Vec<(PathBuf, String)>> {
    let mut found = vec![];
    for (from, ending, to) in COPIED {
        for entry in fs::read_dir(root().join(from)).with_context(|| format!("reading {from}"))? {
            let path = entry?.path();
            let name = path.file_name().context("an entry has a name")?.to_string_lossy().into_owned();
            if name.ends_with(ending) {
                found.push((root().join(CHART).join(to).join(name), fs::read_to_string(&path)?));
            }
        }
    }
    found.sort();
    Ok(found)
}

/// Fails unless what is made when it is asked for has all dashboards and the rules in it.
fn check_monitoring() -> Result<()> {
    // helm indents empty lines, too.
    let indented = |text: &str, by: usize| {
        text.lines().map(|line| format!("{:by$}{line}", "").trim_end().to_owned() + "\n").collect::<String>()
    };
    for (rules, kind, by) in
        [("PrometheusRule", "kind: PrometheusRule", 2), ("ConfigMap", "nodemesh.yaml: |", 4)]
    {
        let asked =
            format!("monitoring.dashboards=true,monitoring.rules={rules},monitoring.labels.release=mine");
        let made = template(&["--set", &asked, "--set", "agent.metricsPort=15022"])?;
        ensure!(
            made.contains(kind) && made.contains("--metrics-listen=0.0.0.0:15022"),
            "{asked} makes no {kind}"
        );
        for (path, text) in copies()? {
            let path = path.to_string_lossy().into_owned();
            let by = if path.contains("rules-of-ours") { by } else { 4 };
            let there = path.contains("crds-of-ours") || indented(&made, 0).contains(&indented(&text, by));
            ensure!(there, "{asked} makes nothing of {path}");
        }
        let (labelled, dashboards) =
            (made.matches("release: mine").count(), made.matches("grafana_dashboard:").count());
        ensure!(
            (labelled, dashboards) == (7, 6),
            "{asked} makes {labelled} objects, {dashboards} dashboards"
        );
    }
    Ok(())
}

/// Fails unless a collector that is spoken to by TLS is so only with roots, which the agents then have.
fn check_tracing() -> Result<()> {
    let collector = "agent.tracing.endpoint=https://otel.example:4318,agent.tracing.protocol=http";
    ensure!(template(&["--set", collector]).is_err(), "{collector} is taken without roots");
    let roots = "agent.tracing.rootsConfigMap=otel-roots,agent.tracing.rootsKey=bundle.pem";
    let made = template(&["--set", collector, "--set", roots])?;
    for part in [
        "--tracing-endpoint=https://otel.example:4318\n",
        "--tracing-protocol=http\n",
        "--tracing-roots=/etc/nodemesh/tracing/roots.pem\n",
        "{name: tracing-roots, mountPath: /etc/nodemesh/tracing, readOnly: true}\n",
        "name: otel-roots\n            items: [{key: \"bundle.pem\", path: roots.pem}]\n",
    ] {
        ensure!(made.contains(part), "with roots of a collector {part:?} is not made");
    }
    Ok(())
}

/// Runs it.
pub(crate) fn run(arguments: &[String]) -> Result<()> {
    succeed(clean(helm()?).args(arguments))
}

/// Builds it when it is not there.
pub(crate) fn helm() -> Result<PathBuf> {
    setup::built_by_go("helm", HELM, "helm.sh/helm/v3/cmd/helm")
}
