//! Where the desired state comes from. A source reads, checks, and yields a whole [`Model`](crate::model::Model);
//! what it refuses it says, and never lets a mistake in one object touch another.
//!
//! | module | what |
//! |---|---|
//! | [`document`] | YAML text into documents, with the line of every value |
//! | [`manifest`] | one document into one checked object |
//! | [`ledger`] | which of all documents are in force: duplicates, refusals, the last good ones. Pure |
//! | [`published`] | what a source has found, for those who follow it |
//! | [`files`] | a directory, watched |
//! | [`kube`] | a Kubernetes cluster, watched |

pub mod document;
pub mod files;
pub mod kube;
pub mod ledger;
pub mod manifest;
pub mod published;

use std::{convert::Infallible, fmt, net::SocketAddr, path::PathBuf, pin::Pin, str::FromStr, sync::Arc};

use mesh_core::model::Name;
use serde::{Deserialize, Serialize};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use self::ledger::Ledger;
use crate::{conditions::Pods, jwks::Keys, store::Unsaved};

/// What `--source` says for a cluster.
const KUBE: &str = "kube";

/// Where the desired state is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Place {
    /// In the Kubernetes cluster of this pod, or of `KUBECONFIG`.
    Kubernetes,
    /// In the manifests of a directory.
    Directory(PathBuf),
}

impl FromStr for Place {
    type Err = Infallible;

    /// `kube`, or a directory; one of that name is `./kube`.
    fn from_str(text: &str) -> Result<Self, Infallible> {
        Ok(if text == KUBE { Self::Kubernetes } else { Self::Directory(text.into()) })
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Kubernetes => f.write_str(KUBE),
            Self::Directory(path) => path.display().fmt(f),
        }
    }
}

/// How a controller stands with its source, and among others.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Presence {
    /// The source can be asked: what is in force is what it says.
    pub answered: bool,
    /// This is the one of several controllers that writes status.
    pub leads: bool,
}

impl Default for Presence {
    fn default() -> Self {
        Self { answered: true, leads: false }
    }
}

/// A place cannot be a source.
#[derive(Debug, thiserror::Error)]
pub enum SourceError {
    /// A directory cannot.
    #[error(transparent)]
    Files(#[from] files::FilesError),
    /// A cluster cannot.
    #[error(transparent)]
    Kube(#[from] kube::KubeError),
}

/// A place whose state is followed.
#[derive(Debug)]
pub enum Source {
    /// A directory.
    Files(files::Source),
    /// A cluster.
    Kube(Box<kube::Source>),
}

impl Source {
    /// Reads all of it. The last good versions of what is refused are kept in `kept_file` over restarts.
    pub async fn open(place: &Place, kept_file: PathBuf) -> Result<Self, SourceError> {
        Ok(match place {
            Place::Directory(path) => Self::Files(files::Source::open(path, kept_file)?),
            Place::Kubernetes => Self::Kube(Box::new(kube::Source::open(kept_file).await?)),
        })
    }

    /// What is in force, now and as it changes.
    pub fn subscribe(&self) -> watch::Receiver<Arc<Ledger>> {
        match self {
            Self::Files(source) => source.subscribe(),
            Self::Kube(source) => source.subscribe(),
        }
    }

    /// The pods that workloads are, where they keep what is said of them.
    pub fn pods(&self) -> Option<Pods> {
        match self {
            Self::Files(_) => None,
            Self::Kube(source) => Some(source.pods()),
        }
    }

    /// How we stand with it. A directory has one controller.
    pub fn presence(&self) -> watch::Receiver<Presence> {
        match self {
            Self::Files(_) => watch::Sender::new(Presence { answered: true, leads: true }).subscribe(),
            Self::Kube(source) => source.presence(),
        }
    }

    /// The same, of which the endpoints of this Service are the controllers.
    pub fn among(self, controllers: Option<Name>) -> Self {
        match (self, controllers) {
            (Self::Kube(source), Some(service)) => Self::Kube(Box::new(source.among(service))),
            (source, _) => source,
        }
    }

    /// Where the admin interfaces of the other controllers are, now and as they come and go.
    pub fn others(&self) -> watch::Receiver<Arc<Vec<SocketAddr>>> {
        match self {
            Self::Files(_) => watch::Sender::default().subscribe(),
            Self::Kube(source) => source.others(),
        }
    }

    /// The same, which says there what it could not save.
    pub fn telling(self, unsaved: Unsaved) -> Self {
        match self {
            Self::Files(source) => Self::Files(source.telling(unsaved)),
            Self::Kube(source) => Self::Kube(Box::new(source.telling(unsaved))),
        }
    }

    /// The same, which says of policies whether the keys that they name by a URL can be had.
    pub fn knowing(self, keys: watch::Receiver<Arc<Keys>>) -> Self {
        match self {
            Self::Kube(source) => Self::Kube(Box::new(source.knowing(keys))),
            source @ Self::Files(_) => source,
        }
    }

    /// Writes what became of objects into their status, where they have one, until cancelled.
    pub fn write(&self, cancel: CancellationToken) -> Option<Pin<Box<dyn Future<Output = ()> + Send>>> {
        match self {
            Self::Files(_) => None,
            Self::Kube(source) => Some(Box::pin(source.write(cancel))),
        }
    }

    /// Follows the place until cancelled.
    pub async fn follow(self, cancel: CancellationToken) {
        match self {
            Self::Files(source) => source.follow(cancel).await,
            Self::Kube(source) => source.follow(cancel).await,
        }
    }
}

/// One thing that is wrong with a document.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problem {
    /// Line within the file, from 1.
    pub line: usize,
    /// Path of the field, `spec.rules[0].from[0].addressBlocks[1]`; empty for the document as a whole.
    pub field: String,
    /// What is wrong.
    pub reason: String,
    /// What to write instead.
    pub cure: String,
}

/// A document, or a whole file, that was not taken; what `meshctl check` and `meshctl status` print.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Refused {
    /// The file.
    pub file: PathBuf,
    /// Line of what is wrong, from 1.
    pub line: usize,
    /// The object that the document is about, where it says so.
    pub object: Option<String>,
    /// Path of the field; empty for the document as a whole.
    pub field: String,
    /// What is wrong.
    pub reason: String,
    /// What to write instead.
    pub cure: String,
    /// An earlier version of the object is still in force.
    pub last_good_in_force: bool,
}

impl std::fmt::Display for Refused {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}:{}: ", self.file.display(), self.line)?;
        if let Some(object) = &self.object {
            write!(f, "{object}: ")?;
        }
        if !self.field.is_empty() {
            write!(f, "{}: ", self.field)?;
        }
        write!(f, "{}; {}", self.reason, self.cure)
    }
}
