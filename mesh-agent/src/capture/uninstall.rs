//! Removes every trace of capture from a node, also when no agent runs: links, maps, rules, routes, settings.

use std::{fs, io, path::Path};

use super::routing::{Routing, Settings};
use crate::{enrol::discover, net::netns::Namespace};

/// Removes what is pinned below `bpffs` and what the node's namespaces have of us. Programs go with their links.
/// Must be called inside a runtime.
pub async fn uninstall(bpffs: &Path, run_dir: Option<&Path>) -> anyhow::Result<()> {
    match fs::remove_dir_all(bpffs) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error.into()),
        _ => {}
    }
    for path in discover::namespaces()? {
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
        Some(Err(error)) if error.kind() != io::ErrorKind::NotFound => return Err(error.into()),
        _ => {}
    }
    Ok(())
}

fn settings_path(run_dir: &Path, namespace: &Namespace) -> std::path::PathBuf {
    run_dir.join("settings").join(namespace.inode().to_string())
}

/// Keeps a namespace's settings from before enrolment, over restarts of the agent. The first word stays.
pub fn save_settings(run_dir: &Path, namespace: &Namespace) -> anyhow::Result<()> {
    let path = settings_path(run_dir, namespace);
    if path.exists() {
        return Ok(());
    }
    fs::create_dir_all(run_dir.join("settings"))?;
    Ok(fs::write(path, serde_json::to_vec(&Settings::of(namespace)?)?)?)
}

/// The settings that were kept for a namespace.
pub fn saved_settings(run_dir: &Path, namespace: &Namespace) -> anyhow::Result<Option<Settings>> {
    match fs::read(settings_path(run_dir, namespace)) {
        Ok(bytes) => Ok(Some(serde_json::from_slice(&bytes)?)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// Forgets the settings of a namespace.
pub fn forget_settings(run_dir: &Path, namespace: &Namespace) -> io::Result<()> {
    match fs::remove_file(settings_path(run_dir, namespace)) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}
