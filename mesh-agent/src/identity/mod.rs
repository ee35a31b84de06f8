//! Who the node and its workloads are: their certificates, the roots that others' certificates must lead to, and how
//! both are renewed.
//!
//! | module | what |
//! |---|---|
//! | [`join`] | a join token for the node's first certificate |
//! | [`node`] | the node's certificate, kept over restarts and renewed |
//! | [`workloads`] | the certificates of the workloads of this node |
//! | [`store`] | what is in force, as TLS configurations for connections |
//! | [`channel`] | the authenticated connection to the controller |
//! | [`credential`] | a key with its certificates, checked when it arrives and when it is read back |
//! | [`issue`] | asking the controller for a certificate |
//! | [`schedule`] | when a certificate is renewed: pure |
//! | [`verify`] | whose certificate is it, and does it lead to a root |
//!
//! Invariants: keys are made here and leave this process only for the run directory, which is on a tmpfs; what is
//! valid stays in force until something valid replaces it, however long the controller is away.

pub mod channel;
pub mod credential;
mod hex;
pub mod issue;
pub mod join;
pub mod node;
pub mod schedule;
pub mod store;
pub mod verify;
pub mod workloads;

use std::collections::BTreeMap;

use mesh_core::{identity::SpiffeId, view::Snapshot};
use rustls_pki_types::CertificateDer;
use serde::Serialize;
use time::OffsetDateTime;

/// Where the roots in force come from: the view's, once there is one.
type Roots = Vec<CertificateDer<'static>>;

fn roots_of(snapshot: &Snapshot) -> Roots {
    snapshot.mesh().roots.iter().map(|root| CertificateDer::from(root.clone())).collect()
}

/// The certificates of this node's identities, its own among them; what is published for metrics and state.
pub type Certificates = BTreeMap<SpiffeId, CertificateStatus>;

/// How it stands with the certificate of one identity.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct CertificateStatus {
    /// Until when the certificate in force is valid; `None` while there is none.
    #[serde(serialize_with = "time::serde::rfc3339::option::serialize")]
    pub expires: Option<OffsetDateTime>,
    /// Why the last attempt at a newer one failed; `None` when it did not.
    pub error: Option<String>,
}
