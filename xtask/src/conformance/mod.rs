//! `conformance`: the Gateway API's conformance tests for meshes, against Nodemesh on a cluster of ours.
//!
//! | module | what it does |
//! |---|---|
//! | [`parts`] | the program that the tests are, and the image that they run in their pods |
//! | [`suite`] | which of the tests are run, with which limits |
//! | [`verdicts`] | what became of each test, as the program says it |

mod parts;
mod suite;
mod verdicts;

use anyhow::{Context, Result};
use mesh_tests::cluster::{
    mesh::NAMESPACE,
    names::{Names, OF_PEOPLE},
};

use crate::{
    check,
    cluster::{self, Options},
    ebpf, image,
    run::{read, step, target},
    setup,
};
pub(crate) use parts::prepare;

/// What of the mesh runs, and how long it may take until it does.
const MESH: [&str; 2] = ["deployment/nodemesh-controller", "daemonset/nodemesh-agent"];
const ROLLED_OUT: &str = "--timeout=180s";

/// The command line.
#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// The number of the cluster. It is brought up, unless it is up, and stays.
    #[arg(long, env = "NODEMESH_CLUSTER", default_value_t = OF_PEOPLE)]
    number: u8,
    /// Only this one, by the suite's name for it, as MeshBasic. Writes no report.
    #[arg(long, value_name = "NAME")]
    run_test: Option<String>,
    /// With the mesh that is installed, instead of building this one and installing it.
    #[arg(long)]
    as_it_is: bool,
    /// Flags for the suite itself, after `--`.
    #[arg(last = true)]
    flags: Vec<String>,
}

/// Runs them. Fails with the end of what each one says that fails.
pub(crate) fn conformance(arguments: &Arguments) -> Result<()> {
    let names = Names::new(arguments.number).context("clusters have the numbers 0 to 9")?;
    // First, as it says what the machine lacks.
    cluster::prepare()?;
    let parts = prepare()?;
    cluster::up(names, Options::FOR_CONFORMANCE)?;
    cluster::load(names, vec![parts.echo.clone()])?;
    if !arguments.as_it_is {
        install(names)?;
    }
    step("Run the Gateway API's conformance tests", || {
        suite::run(&parts, &names.kubeconfig(), arguments.run_test.as_deref(), &arguments.flags)
    })
}

/// Installs what is built from this source, in the place of what is there.
fn install(names: Names) -> Result<()> {
    setup::kernel_toolchain()?;
    ebpf::build()?;
    let images = target().join("conformance/images");
    image::make(Some(check::build_binaries()?), Some(images.clone()))?;
    cluster::load(names, ["agent.tar", "controller.tar"].map(|name| images.join(name)).into())?;
    step("Install Nodemesh", || {
        let inside = |arguments: &[&str]| {
            let mut kubectl = cluster::kubectl(names);
            kubectl.args(["--namespace", NAMESPACE]).args(arguments);
            read(&mut kubectl).map(drop)
        };
        inside(&["apply", "--filename", "deploy/manifests/nodemesh.yaml"])?;
        // Images have the name that they had before.
        inside(&[&["rollout", "restart"][..], &MESH].concat())?;
        MESH.into_iter().try_for_each(|what| inside(&["rollout", "status", what, ROLLED_OUT]))
    })
}
