//! The roots of the mesh for those who are not in it yet: a ConfigMap that agents mount.
//!
//! Invariant: roots never go back. What is published is read first, then the authority, and what is written names the
//! edition that was read: whoever has not heard of a rotation cannot take the newer roots away.

use std::collections::BTreeMap;

use k8s_openapi::{api::core::v1::ConfigMap, apimachinery::pkg::apis::meta::v1::ObjectMeta};
use kube::{Api, Client};
use mesh_core::model::Name;
use pem::{EncodeConfig, LineEnding, Pem};
use rustls_pki_types::CertificateDer;

use crate::kubernetes::{ApiError, in_time, put};

/// The key.
const KEY: &str = "roots.pem";

/// The roots cannot be published.
#[derive(Debug, thiserror::Error)]
#[error(
    "cannot {action} the ConfigMap {name}: {reason}; the controller's service account has to be let get, create and patch \
     it; agents that join now may not know the newest root"
)]
pub struct BundleError {
    action: &'static str,
    name: Name,
    reason: ApiError,
}

/// The ConfigMap.
#[derive(Clone)]
pub struct Bundle {
    client: Client,
    name: Name,
}

impl std::fmt::Debug for Bundle {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Bundle").field("name", &self.name).finish_non_exhaustive()
    }
}

/// What is published, and which edition it is; nothing where nothing is.
#[derive(Debug)]
pub struct Published(Option<(String, Option<String>)>);

impl Bundle {
    /// The ConfigMap with this name.
    pub fn new(client: Client, name: Name) -> Self {
        Self { client, name }
    }

    /// What is published now.
    pub async fn read(&self) -> Result<Published, BundleError> {
        let found = in_time(self.api().get_opt(&self.name.name)).await;
        let found = found.map_err(|reason| self.failed("read", reason))?;
        Ok(Published(found.map(|map| {
            let text = map.data.unwrap_or_default().remove(KEY).unwrap_or_default();
            (text, map.metadata.resource_version)
        })))
    }

    /// Publishes these roots over what was read before they were; does nothing if somebody else was faster.
    pub async fn write(&self, over: Published, roots: &[CertificateDer<'_>]) -> Result<(), BundleError> {
        let text = pem(roots);
        let over = match over.0 {
            Some((published, _)) if published == text => return Ok(()),
            published => published.map(|(_, edition)| edition),
        };
        let metadata = ObjectMeta { name: Some(self.name.name.clone()), ..ObjectMeta::default() };
        let data = Some(BTreeMap::from([(KEY.to_owned(), text)]));
        let written = put(&self.api(), ConfigMap { metadata, data, ..ConfigMap::default() }, over).await;
        // The next look sees what another wrote.
        written.map(drop).map_err(|reason| self.failed("write", reason))
    }

    fn api(&self) -> Api<ConfigMap> {
        Api::namespaced(self.client.clone(), &self.name.namespace)
    }

    fn failed(&self, action: &'static str, reason: ApiError) -> BundleError {
        BundleError { action, name: self.name.clone(), reason }
    }
}

/// The certificates as a file of them.
fn pem(roots: &[CertificateDer<'_>]) -> String {
    let roots: Vec<_> = roots.iter().map(|root| Pem::new("CERTIFICATE", root.to_vec())).collect();
    pem::encode_many_config(&roots, EncodeConfig::new().set_line_ending(LineEnding::LF))
}

#[cfg(test)]
mod tests {
    use rustls_pki_types::pem::PemObject;

    use super::*;

    #[test]
    fn roots_read_back() {
        let roots = [vec![1; 100], vec![2; 48]].map(CertificateDer::from);
        let text = pem(&roots);
        assert!(!text.contains('\r'), "a ConfigMap shows as one line otherwise");
        let read: Vec<_> = CertificateDer::pem_slice_iter(text.as_bytes()).map(Result::unwrap).collect();
        assert_eq!(read, roots);
    }
}
