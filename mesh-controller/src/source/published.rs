//! What a source has found, as what is in force: what readers follow, what the log says of refusals, and what is kept
//! over a restart. The same for every source.

use std::{collections::BTreeMap, path::PathBuf, sync::Arc};

use tokio::sync::watch;

use super::ledger::{FileContent, InForce, Ledger};
use crate::store::{self, Part, Unsaved};

/// Most documents of a source: a mesh of this size fits the controller's memory and a node's view.
pub const MAX_DOCUMENTS: usize = 100_000;

/// What was in force before cannot be told.
#[derive(Debug, thiserror::Error)]
pub enum PublishedError {
    /// What was kept over a restart cannot be read.
    #[error(
        "{path} is damaged: {reason}; remove it (what is lost are the last good versions of documents that are \
         refused now) and start again"
    )]
    Kept {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// The state cannot be read or written.
    #[error(transparent)]
    Store(#[from] store::StoreError),
}

/// What is in force, for those who follow it.
#[derive(Debug)]
pub struct Published {
    kept_file: PathBuf,
    ledger: watch::Sender<Arc<Ledger>>,
    unsaved: Unsaved,
}

impl Published {
    /// With the last good versions of before a restart, which are in `kept_file`.
    pub fn open(kept_file: PathBuf) -> Result<Self, PublishedError> {
        let kept = match store::read(&kept_file)? {
            None => vec![],
            Some(bytes) => serde_json::from_slice::<Vec<InForce>>(&bytes).map_err(|error| {
                PublishedError::Kept { path: kept_file.clone(), reason: error.to_string() }
            })?,
        };
        let ledger = watch::channel(Arc::new(Ledger::remembering(kept))).0;
        Ok(Self { kept_file, ledger, unsaved: Unsaved::default() })
    }

    /// What is in force, now and as it changes.
    pub fn subscribe(&self) -> watch::Receiver<Arc<Ledger>> {
        self.ledger.subscribe()
    }

    /// The same, which says there what it could not save.
    pub fn telling(mut self, unsaved: Unsaved) -> Self {
        if self.unsaved.has(Part::Kept) {
            let before = std::mem::replace(&mut self.unsaved, unsaved).problems().join("; ");
            self.unsaved.tried(Part::Kept, &Err::<(), _>(before));
        } else {
            self.unsaved = unsaved;
        }
        self
    }

    /// No document is in force.
    pub fn is_empty(&self) -> bool {
        self.ledger.borrow().documents_accepted() == 0
    }

    /// Puts in force what is good of this.
    pub fn publish(&self, mut contents: BTreeMap<PathBuf, Arc<FileContent>>) {
        self.save_again();
        limit_documents(&mut contents);
        let before = self.ledger.borrow().clone();
        let next = before.next(&contents);
        if next == *before {
            return;
        }
        for refused in next.refused() {
            if !before.refused().contains(refused) {
                tracing::warn!(last_good_in_force = refused.last_good_in_force, "refused: {refused}");
            }
        }
        if !before.kept().eq(next.kept()) {
            self.keep(&next);
        }
        tracing::info!(
            accepted = next.documents_accepted(),
            refused = next.documents_refused(),
            "manifests read"
        );
        self.ledger.send_replace(Arc::new(next));
    }

    /// Saves what could not be saved before.
    pub fn save_again(&self) {
        if self.unsaved.has(Part::Kept) {
            self.keep(&self.ledger.borrow());
        }
    }

    fn keep(&self, ledger: &Ledger) {
        let kept: Vec<&InForce> = ledger.kept().collect();
        let written = serde_json::to_vec_pretty(&kept)
            .map_err(|error| error.to_string())
            .and_then(|bytes| store::replace(&self.kept_file, &bytes).map_err(|error| error.to_string()));
        let news = self.unsaved.tried(Part::Kept, &written);
        if let Err(error) = written
            && news
        {
            tracing::error!(%error, "the last good versions of refused documents would not survive a restart");
        }
    }
}

/// Refuses the files beyond [`MAX_DOCUMENTS`], in the order of their names.
pub(super) fn limit_documents(contents: &mut BTreeMap<PathBuf, Arc<FileContent>>) {
    let mut documents = 0;
    for content in contents.values_mut() {
        documents += content.len();
        if documents > MAX_DOCUMENTS {
            *content = Arc::new(FileContent::unreadable(
                format!("with this there are more than {MAX_DOCUMENTS} documents"),
                "remove what is not needed".into(),
            ));
        }
    }
}
