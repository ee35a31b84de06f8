//! `mesh-agent`: runs the agent of a node, takes it off the machine, or tells what the machine's kernel has.

use mesh_agent::{
    agent,
    capture::doctor,
    config::{Config, Invocation},
    enrol::uninstall,
};
use tracing_subscriber::EnvFilter;

fn main() -> anyhow::Result<()> {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info"));
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).init();
    match Invocation::of_process() {
        Invocation::Run(config) if config.print_config => print(&config),
        Invocation::Run(config) => agent::run(&config),
        Invocation::Uninstall(what) => {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
            runtime.block_on(uninstall::uninstall(&what.bpffs, what.run_dir.as_deref()))
        }
        Invocation::Doctor(what) => show(&doctor::examine(&what.bpffs)),
    }
}

#[allow(clippy::print_stdout, reason = "this is what --print-config is for")]
fn print(config: &Config) -> anyhow::Result<()> {
    println!("{}", config.to_json());
    Ok(())
}

#[allow(clippy::print_stdout, reason = "this is what the command is for")]
fn show(findings: &doctor::Findings) -> anyhow::Result<()> {
    print!("{}", findings.table);
    anyhow::ensure!(findings.capable, "an agent would not start on this kernel");
    Ok(())
}
