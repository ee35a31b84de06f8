//! Keeps the settings that a namespace had before enrolment, in the run directory, until they are put back.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use super::routing::Settings;
use crate::net::netns::Namespace;

fn settings_path(run_dir: &Path, namespace: &Namespace) -> PathBuf {
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
    super::gone_or(fs::remove_file(settings_path(run_dir, namespace)))
}
