//! Where the authority's state is kept: in a file, or in a Secret that several controllers share.
//!
//! Both are written the same way: what was read is changed and put back unless somebody else has written meanwhile; then
//! all of it is done again. So of two that begin at once one makes the authority, and the other takes it.

use std::{
    collections::BTreeMap,
    fmt,
    path::{Path, PathBuf},
};

use k8s_openapi::{ByteString, api::core::v1::Secret, apimachinery::pkg::apis::meta::v1::ObjectMeta};
use kube::{Api, Client};
use mesh_core::model::Name;

use crate::{
    digest::digest,
    kubernetes::{ApiError, in_time, put},
    store::{self, StoreError},
};

/// The file below the state directory, and the key in the Secret.
const NAME: &str = "authority.json";

/// The state cannot be read or written.
#[derive(Debug, thiserror::Error)]
pub enum KeepError {
    /// A file cannot.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// A Secret cannot.
    #[error(
        "cannot {action} the Secret {secret}: {reason}; the controller's service account has to be let get, create and \
         patch it"
    )]
    Secret {
        /// What was tried.
        action: &'static str,
        /// On what.
        secret: Name,
        /// What the API server said.
        reason: String,
    },
    /// The Secret is there, and what it is for is not in it.
    #[error(
        "the Secret {0} has no key {NAME}: put it back from a backup (only if there is none, and every node shall join \
         anew, delete the Secret)"
    )]
    Empty(Name),
}

/// A place that keeps it.
#[derive(Clone)]
pub(super) enum Keep {
    /// A directory of ours.
    Directory(PathBuf),
    /// A Secret.
    Secret(Client, Name),
}

impl fmt::Debug for Keep {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl fmt::Display for Keep {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Directory(dir) => dir.join(NAME).display().fmt(f),
            Self::Secret(_, name) => write!(f, "the Secret {name}"),
        }
    }
}

/// What was read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Kept {
    pub(super) bytes: Vec<u8>,
    edition: Edition,
}

/// Which one, for whoever writes over it.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Edition {
    File([u8; 32]),
    Secret(Option<String>),
}

impl Keep {
    /// What is kept; `None` where nothing was ever kept.
    pub(super) async fn read(&self) -> Result<Option<Kept>, KeepError> {
        match self {
            Self::Directory(dir) => Ok(read_file(dir)?),
            Self::Secret(client, name) => read_secret(client, name).await,
        }
    }

    /// Puts this in the place of what was read; `false` if something else is there now.
    pub(super) async fn replace(&self, bytes: &[u8], over: Option<&Kept>) -> Result<bool, KeepError> {
        match self {
            Self::Directory(dir) => {
                store::private_dir(dir)?;
                let _lock = store::lock(&dir.join("lock"))?;
                if read_file(dir)?.as_ref() != over {
                    return Ok(false);
                }
                store::replace(&dir.join(NAME), bytes)?;
                Ok(true)
            }
            Self::Secret(client, name) => replace_secret(client, name, bytes, over).await,
        }
    }
}

fn read_file(dir: &Path) -> Result<Option<Kept>, StoreError> {
    let bytes = store::read(&dir.join(NAME))?;
    Ok(bytes.map(|bytes| Kept { edition: Edition::File(digest(&bytes)), bytes }))
}

async fn read_secret(client: &Client, name: &Name) -> Result<Option<Kept>, KeepError> {
    let secrets: Api<Secret> = Api::namespaced(client.clone(), &name.namespace);
    let found = in_time(secrets.get_opt(&name.name)).await;
    let Some(secret) = found.map_err(|error| failed("read", name, &error))? else { return Ok(None) };
    let bytes = secret.data.unwrap_or_default().remove(NAME).ok_or_else(|| KeepError::Empty(name.clone()))?;
    Ok(Some(Kept { bytes: bytes.0, edition: Edition::Secret(secret.metadata.resource_version) }))
}

async fn replace_secret(
    client: &Client,
    name: &Name,
    bytes: &[u8],
    over: Option<&Kept>,
) -> Result<bool, KeepError> {
    let over = match over.map(|kept| &kept.edition) {
        None => None,
        Some(Edition::Secret(edition)) => Some(edition.clone()),
        // Of another keep: whatever it was, it is not here.
        Some(Edition::File(_)) => return Ok(false),
    };
    let metadata = ObjectMeta { name: Some(name.name.clone()), ..ObjectMeta::default() };
    let data = Some(BTreeMap::from([(NAME.to_owned(), ByteString(bytes.to_vec()))]));
    let secret = Secret { metadata, data, ..Secret::default() };
    let written = put(&Api::namespaced(client.clone(), &name.namespace), secret, over).await;
    written.map_err(|error| failed("write", name, &error))
}

fn failed(action: &'static str, secret: &Name, error: &ApiError) -> KeepError {
    KeepError::Secret { action, secret: secret.clone(), reason: error.to_string() }
}
