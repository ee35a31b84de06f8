//! The chart of deploy/helm, and the manifests that are made from it for who has no helm.
//!
//! helm is built from source, once, from the Go module proxy, like Kubernetes.

use std::{fs, path::PathBuf};

use anyhow::{Context, Result, ensure};

use crate::{
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
const CRDS: &str = "deploy/crds";

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

/// Writes the manifests, and the chart's copy of the CRDs.
pub(crate) fn generate() -> Result<()> {
    step("Write deploy/manifests", || {
        for (path, text) in crds()? {
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
        for (path, text) in crds()?.into_iter().chain([(root().join(MANIFESTS), manifests()?)]) {
            if fs::read_to_string(&path).ok() != Some(text) {
                stale.push(path);
            }
        }
        ensure!(stale.is_empty(), "stale: {stale:?}; run `cargo xtask generate`");
        Ok(())
    })
}

fn manifests() -> Result<String> {
    let mut template = clean(helm()?);
    template.args(["template", "nodemesh", CHART, "--namespace", NAMESPACE, "--kube-version", KUBERNETES]);
    Ok(format!("{HEAD}{}", read(&mut template)?))
}

/// The CRDs, where the chart has them.
fn crds() -> Result<Vec<(PathBuf, String)>> {
    let directory = root().join(CRDS);
    if !directory.is_dir() {
        return Ok(vec![]);
    }
    let mut found = vec![];
    for entry in fs::read_dir(&directory)? {
        let path = entry?.path();
        let name = path.file_name().context("an entry has a name")?;
        if path.extension().is_some_and(|extension| extension == "yaml") {
            found.push((root().join(CHART).join("crds-of-ours").join(name), fs::read_to_string(&path)?));
        }
    }
    found.sort();
    Ok(found)
}

/// Runs it.
pub(crate) fn run(arguments: &[String]) -> Result<()> {
    succeed(clean(helm()?).args(arguments))
}

/// Builds it when it is not there.
pub(crate) fn helm() -> Result<PathBuf> {
    setup::built_by_go("helm", HELM, "helm.sh/helm/v3/cmd/helm")
}
