//! The certificates that are in force on this node, as ready TLS configurations.
//!
//! Connections look configurations up here; the control thread replaces them as certificates are renewed and roots
//! rotate. What is in force stays until something valid replaces it, or until it has expired: a connection that no peer
//! would take is refused here, where the reason is known.

use std::{
    collections::HashMap,
    sync::{Arc, RwLock},
};

use mesh_core::{
    frame::ALPN,
    identity::{SpiffeId, TrustDomain},
    refusal::Reason,
};
use rustls::{
    CipherSuite, ClientConfig, ServerConfig,
    crypto::{CryptoProvider, ring},
    sign::CertifiedKey,
    version::TLS13,
};
use rustls_pki_types::CertificateDer;
use time::OffsetDateTime;

use super::{
    credential::not_after,
    verify::{self, SpiffeClientVerifier, SpiffeServerVerifier},
};
use crate::{
    secrets::ToTunnel,
    surroundings::Clock,
    trust::{Led, Trust, root_store},
};

/// The TLS configurations of one identity.
#[derive(Debug, Clone)]
struct Configs {
    client: Arc<ClientConfig>,
    server: Arc<ServerConfig>,
    trust: Arc<Trust>,
    expires: OffsetDateTime,
}

/// All identities of this node.
#[derive(Debug, Default)]
pub struct Identities {
    configs: RwLock<HashMap<SpiffeId, Configs>>,
    clock: Clock,
}

impl Identities {
    /// An empty store.
    pub fn new() -> Self {
        Self::default()
    }

    /// An empty store by this clock.
    pub fn with_clock(clock: Clock) -> Self {
        Self { clock, ..Self::default() }
    }

    /// Puts a certificate in force, with the roots that peers of it must lead to.
    pub fn install(
        &self,
        id: SpiffeId,
        certificate: Arc<CertifiedKey>,
        roots: &[CertificateDer<'static>],
    ) -> Result<(), rustls::Error> {
        let expires = not_after(certificate.end_entity_cert()?).map_err(verify::invalid)?;
        let mut client = client_config(certificate.clone(), roots, id.trust_domain(), &[ALPN], &self.clock)?;
        let mut server = server_config(certificate, roots, id.trust_domain(), &[ALPN], &self.clock)?;
        // The tunnel's record layer is its own.
        (client.enable_secret_extraction, server.enable_secret_extraction) = (true, true);
        (client.key_log, server.key_log) = (Arc::new(ToTunnel), Arc::new(ToTunnel));
        let (client, server, trust) = (Arc::new(client), Arc::new(server), Trust::new(roots)?);
        let configs = Configs { client, server, trust, expires };
        self.configs.write().expect("no holder of this lock panics").insert(id, configs);
        Ok(())
    }

    /// Forgets an identity that no workload of this node has any more.
    pub fn remove(&self, id: &SpiffeId) {
        self.configs.write().expect("no holder of this lock panics").remove(id);
    }

    /// For connections that this identity opens.
    pub fn client(&self, id: &SpiffeId) -> Result<Arc<ClientConfig>, Reason> {
        Ok(self.configs(id)?.client)
    }

    /// What peers of this identity have to lead to. Ask before [`Identities::client`] and [`Identities::server`]: roots
    /// that are older than these say nothing that a newer view does not end.
    pub fn trust(&self, id: &SpiffeId) -> Result<Arc<Trust>, Reason> {
        Ok(self.configs(id)?.trust)
    }

    /// To which root the chain of a peer led that was taken just now.
    pub fn led(&self, trust: &Arc<Trust>, chain: &[CertificateDer<'_>]) -> Led {
        trust.led(chain, self.clock.now())
    }

    /// For connections that this identity takes.
    pub fn server(&self, id: &SpiffeId) -> Result<Arc<ServerConfig>, Reason> {
        Ok(self.configs(id)?.server)
    }

    fn configs(&self, id: &SpiffeId) -> Result<Configs, Reason> {
        let configs = self.configs.read().expect("no holder of this lock panics");
        let valid = configs.get(id).filter(|found| self.clock.now() <= found.expires);
        valid.cloned().ok_or(Reason::NoCertificate)
    }
}

/// TLS 1.3 with a client certificate, to a server of the trust domain.
pub fn client_config(
    certificate: Arc<CertifiedKey>,
    roots: &[CertificateDer<'static>],
    trust_domain: &TrustDomain,
    alpn: &[&[u8]],
    clock: &Clock,
) -> Result<ClientConfig, rustls::Error> {
    let verifier = SpiffeServerVerifier::new(root_store(roots)?, trust_domain.clone());
    let mut config = ClientConfig::builder_with_details(Arc::new(provider()), Arc::new(clock.clone()))
        .with_protocol_versions(&[&TLS13])?
        .dangerous()
        .with_custom_certificate_verifier(verifier)
        .with_client_cert_resolver(Arc::new(rustls::sign::SingleCertAndKey::from(certificate)));
    config.alpn_protocols = alpn.iter().map(|name| name.to_vec()).collect();
    config.enable_sni = false;
    config.resumption = rustls::client::Resumption::disabled();
    Ok(config)
}

/// TLS 1.3 that demands a client certificate of the trust domain.
pub fn server_config(
    certificate: Arc<CertifiedKey>,
    roots: &[CertificateDer<'static>],
    trust_domain: &TrustDomain,
    alpn: &[&[u8]],
    clock: &Clock,
) -> Result<ServerConfig, rustls::Error> {
    let verifier = SpiffeClientVerifier::new(root_store(roots)?, trust_domain.clone())?;
    let mut config = ServerConfig::builder_with_details(Arc::new(provider()), Arc::new(clock.clone()))
        .with_protocol_versions(&[&TLS13])?
        .with_client_cert_verifier(verifier)
        .with_cert_resolver(Arc::new(rustls::sign::SingleCertAndKey::from(certificate)));
    config.alpn_protocols = alpn.iter().map(|name| name.to_vec()).collect();
    config.session_storage = Arc::new(rustls::server::NoServerSessionStorage {});
    config.send_tls13_tickets = 0;
    Ok(config)
}

/// ring, with AES-128 before AES-256: a fifth less CPU for bulk, and no weaker than the P-256 keys beside it.
fn provider() -> CryptoProvider {
    let mut provider = ring::default_provider();
    provider.cipher_suites.sort_by_key(|suite| suite.suite() != CipherSuite::TLS13_AES_128_GCM_SHA256);
    provider
}

#[cfg(test)]
mod tests {
    use time::Duration;

    use super::*;
    use crate::identity::credential::tests::Authority;

    fn installed(life: Duration) -> (Identities, SpiffeId) {
        let credential = Authority::new().credential("spiffe://td/ns/shop/sa/web", Duration::HOUR);
        let (identities, id) = (Identities::new(), credential.id().clone());
        identities.install(id.clone(), credential.certified(), credential.bundle()).unwrap();
        if let Some(configs) = identities.configs.write().unwrap().get_mut(&id) {
            configs.expires = OffsetDateTime::now_utc() + life;
        }
        (identities, id)
    }

    #[test]
    fn what_is_installed_serves_until_it_is_removed() {
        let (identities, id) = installed(Duration::HOUR);
        assert!(identities.client(&id).is_ok());
        assert!(identities.server(&id).is_ok());
        identities.remove(&id);
        assert_eq!(identities.client(&id).unwrap_err(), Reason::NoCertificate);
    }

    #[test]
    fn an_expired_certificate_is_none() {
        let (identities, id) = installed(-Duration::SECOND);
        assert_eq!(identities.client(&id).unwrap_err(), Reason::NoCertificate);
        assert_eq!(identities.server(&id).unwrap_err(), Reason::NoCertificate);
    }

    #[test]
    fn a_chain_ends_with_its_own_root_and_not_with_another() {
        let [old, new] =
            [(); 2].map(|()| Authority::new().credential("spiffe://td/ns/shop/sa/web", Duration::HOUR));
        let (old_root, new_root) = (old.bundle()[0].clone(), new.bundle()[0].clone());
        let trust = Trust::new(&[new_root.clone(), old_root.clone()]).unwrap();
        let now = OffsetDateTime::now_utc();
        let only = |root: &CertificateDer<'_>| vec![root.to_vec()];
        for (credential, own, other) in [(&old, &old_root, &new_root), (&new, &new_root, &old_root)] {
            let led = trust.led(&credential.certified().cert, now);
            assert!(led.holds(&only(own)) && !led.holds(&only(other)));
            let alone = Trust::new(std::slice::from_ref(own)).unwrap().led(&credential.certified().cert, now);
            assert!(alone.holds(&only(own)) && !alone.holds(&only(other)));
        }
        let unknown = trust.led(&[], now);
        assert!(!unknown.holds(&only(&new_root)));
        assert!(unknown.holds(&[old_root.to_vec(), new_root.to_vec()]));
    }
}
