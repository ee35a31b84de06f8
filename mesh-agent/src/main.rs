//! `mesh-agent`: runs the agent of a node, or takes it off the machine.

use mesh_agent::{
    agent,
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
    }
}

#[allow(clippy::print_stdout, reason = "this is what --print-config is for")]
fn print(config: &Config) -> anyhow::Result<()> {
    println!("{}", config.to_json());
    Ok(())
}
