//! A policy on end users, as its manifest wants it: where its issuers' keys are, beside what agents are told.

use std::{collections::BTreeMap, sync::Arc};

use mesh_core::model::{Authentication, VerifyingKey};
use serde::{Deserialize, Serialize};

/// An AuthenticationPolicy.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AuthenticationPolicy {
    /// What agents are told. Issuers whose keys are elsewhere have none here.
    pub said: Authentication,
    /// Of which issuers, by their places, the keys are elsewhere.
    pub elsewhere: Vec<(usize, KeysAt)>,
}

/// Where an issuer publishes its keys.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct KeysAt {
    /// By https.
    pub url: String,
    /// Roots that its certificate has to lead to, PEM; empty: those of the system.
    pub ca_bundle: String,
}

/// The keys that were fetched.
pub type Fetched = BTreeMap<KeysAt, Arc<Vec<VerifyingKey>>>;

impl AuthenticationPolicy {
    /// What agents are told, with the keys that were fetched. An issuer whose keys nobody has yet has none, and its tokens
    /// are refused.
    pub fn with_keys(&self, fetched: &Fetched) -> Authentication {
        let mut said = self.said.clone();
        for (place, at) in &self.elsewhere {
            if let (Some(issuer), Some(keys)) = (said.issuers.get_mut(*place), fetched.get(at)) {
                issuer.keys = keys.to_vec();
            }
        }
        said
    }
}
