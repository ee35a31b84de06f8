//! A new root, or a new issuing certificate, for controllers that run.

use std::time::SystemTime;

use anyhow::bail;
use mesh_controller::{
    ca::{self, Place},
    kubernetes,
};

use crate::Authority;

/// The authority that is meant.
pub(crate) async fn authority(of: &Authority) -> anyhow::Result<ca::Authority> {
    let place = match (&of.ca_secret, &of.state_dir) {
        (Some(name), _) => Place::Secret(kubernetes::client().await?, name.clone()),
        (None, Some(dir)) => Place::Directory(dir.clone()),
        (None, None) => bail!("give --state-dir or --ca-secret"),
    };
    Ok(ca::Authority::existing(place).await?)
}

/// Makes a root; how many are trusted now.
pub(crate) async fn root(of: &Authority) -> anyhow::Result<usize> {
    let authority = authority(of).await?;
    authority.rotate_root(SystemTime::now()).await?;
    Ok(authority.roots().len())
}

/// Makes an issuing certificate.
pub(crate) async fn intermediate(of: &Authority) -> anyhow::Result<()> {
    Ok(authority(of).await?.rotate_issuing(SystemTime::now()).await?)
}
