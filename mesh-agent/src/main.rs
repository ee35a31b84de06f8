//! `mesh-agent`: runs the agent of a node, takes it off the machine, or tells what the machine's kernel has.

use mesh_agent::{agent, capture::doctor, config::Invocation, enrol::uninstall, net::sysctl};
use mesh_settings::log;

/// What one thread allocates for a request another one often frees: in glibc's allocator the two wait for each other
/// (docs/PERFORMANCE.md).
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> anyhow::Result<()> {
    match Invocation::of_process() {
        Invocation::PrintConfig(settings) => {
            print(&mesh_settings::layers::print(&settings));
            Ok(())
        }
        Invocation::Run(config) => agent::run(&config, log::start(&config.log_level)?),
        Invocation::Uninstall(what) => {
            log::start("info")?;
            sysctl::make_writable()?;
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
            runtime.block_on(uninstall::uninstall(&what.bpffs, what.run_dir.as_deref(), &what.cgroup))
        }
        Invocation::Doctor(what) => show(&doctor::examine(&what.bpffs)),
    }
}

#[allow(clippy::print_stdout, reason = "this is what --print-config is for")]
fn print(text: &str) {
    print!("{text}");
}

#[allow(clippy::print_stdout, reason = "this is what the command is for")]
fn show(findings: &doctor::Findings) -> anyhow::Result<()> {
    print!("{}", findings.table);
    anyhow::ensure!(findings.capable, "an agent would not start on this kernel");
    Ok(())
}
