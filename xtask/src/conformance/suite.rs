//! Which of the Gateway API's tests are run: all that there are for meshes, whether a report counts them or not.

use std::{
    fs::{self, File},
    io::{BufRead, BufReader, Write},
    path::Path,
    process::Stdio,
};

use anyhow::{Context, Result, ensure};

use super::{
    parts::{self, Parts},
    verdicts::{MARK, Verdicts},
};
use crate::run::clean;

/// Sets of features, each with the core tests that it takes to have it.
const PROFILES: &str = "MESH-HTTP,MESH-GRPC";
/// What may be supported beside the core: all that a test for meshes is about.
const FEATURES: [&str; 14] = [
    "MeshClusterIPMatching",
    "MeshConsumerRoute",
    "MeshHTTPRouteBackendRequestHeaderModification",
    "MeshHTTPRouteNamedRouteRule",
    "MeshHTTPRouteQueryParamMatching",
    "MeshHTTPRouteRedirectPath",
    "MeshHTTPRouteRedirectPort",
    "MeshHTTPRouteRewritePath",
    "MeshHTTPRouteSchemeRedirect",
    // No profile for meshes has these: their tests are run, and are in no report.
    "HTTPRoute303RedirectStatusCode",
    "HTTPRoute307RedirectStatusCode",
    "HTTPRoute308RedirectStatusCode",
    "HTTPRouteParentRefPort",
    "HTTPRouteResponseHeaderModification",
];
/// The suite's own 3 in a row are reached by chance, without any mesh, where one of two backends is wanted.
const IN_A_ROW: &str = "RequiredConsecutiveSuccesses:20";
/// Namespaces are of the mesh before there is a pod in them.
const ENROLLED: &str = "nodemesh.io/enroll=true";
/// How long all of it may take: half an hour, when everything fails that can.
const LIMIT: &str = "40m";

/// Runs them, or one of them. What the program says is in `output.log`, and goes to the error for tests that fail.
pub(super) fn run(parts: &Parts, kubeconfig: &Path, only: Option<&str>, flags: &[String]) -> Result<()> {
    let directory = parts::directory();
    let (log, report) = (directory.join("output.log"), directory.join("report.yaml"));
    let mut suite = clean(&parts.suite);
    suite.env("KUBECONFIG", kubeconfig).current_dir(&directory);
    suite.args(["-test.v=test2json", &format!("-test.timeout={LIMIT}")]);
    suite.arg(format!("--conformance-profiles={PROFILES}"));
    suite.arg(format!("--supported-features={}", FEATURES.join(",")));
    suite.arg(format!("--namespace-labels={ENROLLED}"));
    suite.arg(format!("--timeout-config-overrides={IN_A_ROW}"));
    // The next run, of one test maybe, need not wait for pods.
    suite.arg("--cleanup-base-resources=false");
    match only {
        Some(name) => {
            suite.arg(format!("--run-test={name}"));
        }
        None => {
            suite.arg(format!("--report-output={}", report.display())).args(implementation());
            // One that is there is of this run.
            let _ = fs::remove_file(&report);
        }
    }
    let mut out = File::create(&log).with_context(|| format!("making {}", log.display()))?;
    suite.args(flags).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(out.try_clone()?);
    let mut child = suite.spawn().context("starting the conformance tests")?;
    let said = BufReader::new(child.stdout.take().context("its output is ours")?);
    let mut verdicts = Verdicts::default();
    for line in said.split(b'\n') {
        let line = String::from_utf8_lossy(&line?).into_owned();
        writeln!(out, "{}", line.trim_start_matches(MARK))?;
        if let Some(ended) = verdicts.hear(&line) {
            eprintln!("  {ended}");
        }
    }
    let status = child.wait()?;
    eprintln!("  {}; all that they said is in {}", verdicts.count(), log.display());
    ensure!(status.success(), "conformance tests failed ({status})\n{}", verdicts.failures());
    Ok(())
}

/// Who it is that a report is about.
fn implementation() -> [String; 5] {
    [
        "--organization=nodemesh".to_owned(),
        "--project=nodemesh".to_owned(),
        "--url=https://github.com/nodemesh/nodemesh".to_owned(),
        "--contact=https://github.com/nodemesh/nodemesh/issues".to_owned(),
        format!("--version=v{}", env!("CARGO_PKG_VERSION")),
    ]
}
