//! Removes every trace of capture from a node, also when no agent runs: cgroup, links, maps, rules, routes,
//! settings, files.

use std::{fs, io, path::Path};

use anyhow::Context;

use crate::{
    capture::{
        clsact::Filters,
        routing::Routing,
        settings::{forget_settings, saved_settings},
    },
    net::{
        cgroup,
        netns::{Namespace, namespaces},
    },
};

/// Removes what is pinned below `bpffs` and what the node's namespaces have of us. Programs go with
/// their links, or with their filters.
/// Must be called inside a runtime.
pub async fn uninstall(bpffs: &Path, run_dir: Option<&Path>, cgroup: &str) -> anyhow::Result<()> {
    // First: it cannot be removed under a running agent, which would put back what is removed below.
    cgroup::remove(cgroup)
        .with_context(|| format!("cannot remove the cgroup {cgroup}: stop the agent first"))?;
    // What they are recorded by is below `bpffs` too.
    Filters::below(bpffs).remove_all()?;
    match fs::remove_dir_all(bpffs) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error.into()),
        _ => {}
    }
    for path in namespaces()? {
        // A namespace may go while we look; then nothing is left in it.
        let Ok(namespace) = Namespace::open(&path) else { continue };
        let routing = Routing::open(&namespace)?;
        routing.remove().await?;
        if let Some(run_dir) = run_dir
            && let Some(settings) = saved_settings(run_dir, &namespace)?
        {
            settings.restore(&namespace)?;
            forget_settings(run_dir, &namespace)?;
        }
    }
    match run_dir.map(fs::remove_dir_all) {
        // What is mounted for the agent is whoever's it is that mounted it; by then nothing is in it.
        Some(Err(error))
            if !matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::ResourceBusy) =>
        {
            Err(error.into())
        }
        _ => Ok(()),
    }
}
