//! Who the node and its workloads are: their certificates, the roots that others' certificates must lead to, and how
//! both are renewed.
//!
//! | module | what |
//! |---|---|
//! | [`join`] | a join token, or a service-account token, for the node's first certificate |
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

use mesh_core::view::Snapshot;
use rustls_pki_types::CertificateDer;

/// Where the roots in force come from: the view's, once there is one.
type Roots = Vec<CertificateDer<'static>>;

fn roots_of(snapshot: &Snapshot) -> Roots {
    snapshot.mesh().roots.iter().map(|root| CertificateDer::from(root.clone())).collect()
}

pub use crate::health::{CertificateStatus, Certificates};
