//! What a person does to this repository, as commands: nobody types a toolchain, a linker flag or a package name.
//!
//! | module | what it does |
//! |---|---|
//! | [`setup`] | installs what is missing: packages, toolchains, tools |
//! | [`ebpf`] | builds the kernel programs |
//! | [`fuzz`] | feeds arbitrary bytes to what reads bytes of others |
//! | [`check`] | `test` and `ci` |
//! | [`generate`] | writes the reference in docs/reference |
//! | [`dashboards`] | Grafana's dashboards in deploy/dashboards |
//! | [`chart`] | the chart of deploy/helm, and deploy/manifests, which is made from it |
//! | [`kernel`] | `test --kernel`: the same on other kernels, in virtual machines |
//! | [`cluster`] | a real Kubernetes of two nodes on this machine |
//! | [`conformance`] | the Gateway API's conformance tests for meshes |
//! | [`peers`] | programs of others that tests run: gRPC's interoperability tests, h2spec |
//! | [`image`] | OCI images of agent and controller |
//! | [`profile`] | counts how often which of the agent's code runs, for release builds |
//! | [`demo`] | shows a mesh at work |
//! | [`bench`] | measures what the mesh costs, beside peers |
//! | [`debian`], [`go`], [`elf`] | packages that are unpacked instead of installed; programs built by Go; what programs load |
//! | [`run`] | the steps' headings, and commands with an environment of their own |

mod bench;
mod chart;
mod check;
mod cluster;
mod conformance;
mod dashboards;
mod debian;
mod demo;
mod ebpf;
mod elf;
mod fuzz;
mod generate;
mod go;
mod image;
mod kernel;
mod peers;
mod profile;
mod run;
mod setup;

use std::path::PathBuf;

use clap::{Parser, Subcommand};

/// Nodemesh's tasks.
#[derive(Debug, Parser)]
#[command(name = "cargo xtask")]
struct Arguments {
    #[command(subcommand)]
    task: Task,
}

#[derive(Debug, Subcommand)]
enum Task {
    /// Show a mesh at work: two nodes, six workloads, real traffic. Needs root.
    Demo {
        /// End after showing, instead of waiting for Ctrl-C.
        #[arg(long)]
        once: bool,
    },
    /// Format, lints, kernel programs, binaries, all tests. Needs root, unless --pure.
    Test {
        /// Only what needs neither root nor the kernel toolchain.
        #[arg(long)]
        pure: bool,
        /// Only tests with this in their name; skips format and lints.
        #[arg(long)]
        filter: Option<String>,
        /// Only those about the kernel, on another kernel in a virtual machine: 6.1, 6.12, or all of them.
        #[arg(long, value_name = "VERSION|all", num_args = 0..=1, default_missing_value = "all")]
        #[arg(conflicts_with = "pure")]
        kernel: Option<String>,
    },
    /// Feed arbitrary bytes to everything that reads bytes of others.
    Fuzz {
        /// Only this target: frames, preface, documents, views or packets.
        #[arg(long)]
        target: Option<String>,
        /// Inputs that are tried, for each target.
        #[arg(long, default_value_t = fuzz::RUNS)]
        runs: u64,
        /// Write the seeds that are missing in tests/fuzz/corpus, and nothing else.
        #[arg(long)]
        seeds: bool,
    },
    /// Measure what the mesh costs, as ratios to no mesh and to peers. Needs root and a quiet machine.
    Bench(bench::Arguments),
    /// A real Kubernetes of two nodes on this machine, for tests and for trying things. Needs root and Go.
    Cluster(cluster::Arguments),
    /// The Gateway API's conformance tests for meshes, on a cluster that stays up. Needs root and Go.
    Conformance(conformance::Arguments),
    /// Make OCI images of agent and controller in target/images, without Docker.
    Image {
        /// From the programs that this directory has, instead of a release build.
        #[arg(long, value_name = "DIRECTORY")]
        from: Option<PathBuf>,
        /// Where the archives go, instead of target/images.
        #[arg(long, value_name = "DIRECTORY")]
        to: Option<PathBuf>,
        /// An image of this program instead, `nodemesh.local/NAME:test`; for applications of tests.
        #[arg(long, value_name = "FILE", conflicts_with = "from")]
        program: Option<PathBuf>,
    },
    /// Build agent, controller and meshctl as users get them.
    Release {
        /// Where the programs go; a directory of target, which is said, unless given.
        #[arg(long, value_name = "DIRECTORY")]
        to: Option<PathBuf>,
    },
    /// Count anew how often which of the agent's code runs under load, by which release builds are laid out. Needs root and a quiet
    /// machine.
    Profile,
    /// Write the reference in docs/reference from the programs' own definitions, deploy/dashboards, and deploy/manifests from the
    /// chart.
    Generate {
        /// Only this; all of it unless given.
        what: Option<generate::Part>,
    },
    /// helm, of the version that tests use.
    #[command(disable_help_flag = true)]
    Helm {
        /// Its arguments.
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        arguments: Vec<String>,
    },
    /// Build programs of others that tests run into target/peers: gRPC's interoperability tests, h2spec. Needs Go.
    Peers,
    /// Build the kernel programs into target/mesh-ebpf/mesh-ebpf.o.
    BuildEbpf,
    /// Install what is missing for all of the above.
    Setup,
    /// What a merge must pass: the tests, and cargo-deny on dependencies.
    Ci,
}

fn main() -> anyhow::Result<()> {
    match Arguments::parse().task {
        Task::Demo { once } => demo::demo(if once { demo::End::Once } else { demo::End::OnInterrupt }),
        Task::Test { kernel: Some(version), filter, .. } => kernel::test(&version, filter.as_deref()),
        Task::Test { pure: true, filter, .. } => check::pure(filter.as_deref()),
        Task::Test { pure: false, filter, .. } => check::everything(filter.as_deref()),
        Task::Fuzz { seeds: true, .. } => fuzz::seeds(),
        Task::Fuzz { seeds: false, target, runs } => fuzz::run(target.as_deref(), runs),
        Task::Bench(arguments) => bench::bench(&arguments),
        Task::BuildEbpf => {
            setup::kernel_toolchain()?;
            ebpf::build().map(drop)
        }
        Task::Cluster(arguments) => cluster::cluster(arguments),
        Task::Conformance(arguments) => conformance::conformance(&arguments),
        Task::Image { from: _, to, program: Some(program) } => image::of_program(&program, to),
        Task::Image { from, to, program: None } => image::make(from, to),
        Task::Release { to } => check::release(to.as_deref()),
        Task::Profile => profile::record(),
        Task::Generate { what: None } => {
            generate::reference().and_then(|()| dashboards::generate()).and_then(|()| chart::generate())
        }
        Task::Generate { what: Some(generate::Part::Reference) } => generate::reference(),
        Task::Generate { what: Some(generate::Part::Dashboards) } => dashboards::generate(),
        Task::Generate { what: Some(generate::Part::Manifests) } => chart::generate(),
        Task::Helm { arguments } => chart::run(&arguments),
        Task::Peers => peers::prepare().map(drop),
        Task::Setup => setup::everything(),
        Task::Ci => check::ci(),
    }
}
