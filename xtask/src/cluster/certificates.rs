//! Who is who in a cluster: one CA, a certificate for each client and server, and what clients read: kubeconfigs.

use std::{fs, path::PathBuf};

use anyhow::{Context, Result};
use mesh_tests::cluster::names::{Machine, NODES, Names};
use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, DnType, ExtendedKeyUsagePurpose, IsCa, KeyPair,
    KeyUsagePurpose,
};
use serde_json::json;

/// The API server's names inside of the cluster.
const API_SERVER_NAMES: [&str; 5] = [
    "localhost",
    "kubernetes",
    "kubernetes.default",
    "kubernetes.default.svc",
    "kubernetes.default.svc.cluster.local",
];
/// Clients beside the nodes: name of the files, common name, organization.
const CLIENTS: [(&str, &str, &str); 5] = [
    ("admin", "admin", "system:masters"),
    ("controller-manager", "system:kube-controller-manager", ""),
    ("scheduler", "system:kube-scheduler", ""),
    ("proxy", "system:kube-proxy", ""),
    ("kubelet-client", "api-server", "system:masters"),
];

/// A file of keys and certificates.
pub(super) fn file(names: Names, name: &str) -> PathBuf {
    names.home().join("certificates").join(name)
}

/// What a client of this name needs.
pub(super) fn kubeconfig(names: Names, client: &str) -> PathBuf {
    file(names, &format!("{client}.kubeconfig"))
}

/// Writes them all.
pub(super) fn write(names: Names) -> Result<()> {
    let directory = file(names, "");
    fs::create_dir_all(&directory).with_context(|| format!("making {}", directory.display()))?;
    let mut ca = parameters("nodemesh test cluster", "", &[])?;
    ca.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    ca.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    let ca = CertifiedIssuer::self_signed(ca, KeyPair::generate()?)?;
    put(names, "ca.crt", &ca.pem())?;
    put(names, "ca.key", &ca.key().serialize_pem())?;

    let signs_tokens = KeyPair::generate()?;
    put(names, "tokens.key", &signs_tokens.serialize_pem())?;
    put(names, "tokens.pub", &signs_tokens.public_key_pem())?;

    let addresses = ["127.0.0.1".to_owned(), names.of_machine(Machine::Control).to_string()];
    let first_service = names.address(128, 1).to_string();
    let hosts = API_SERVER_NAMES.map(str::to_owned).into_iter().chain(addresses).chain([first_service]);
    issue(names, &ca, "api-server", "kube-apiserver", "", &hosts.collect::<Vec<_>>())?;
    for (name, common_name, organization) in CLIENTS {
        issue(names, &ca, name, common_name, organization, &[])?;
    }
    for node in NODES {
        let name = node.to_string();
        issue(names, &ca, &name, &format!("system:node:{name}"), "system:nodes", &[])?;
    }
    fs::copy(kubeconfig(names, "admin"), names.kubeconfig())?;
    Ok(())
}

fn parameters(common_name: &str, organization: &str, hosts: &[String]) -> Result<CertificateParams> {
    let mut parameters = CertificateParams::new(hosts)?;
    parameters.distinguished_name.push(DnType::CommonName, common_name);
    if !organization.is_empty() {
        parameters.distinguished_name.push(DnType::OrganizationName, organization);
    }
    Ok(parameters)
}

/// A certificate, its key, and a kubeconfig with both.
fn issue(
    names: Names,
    ca: &CertifiedIssuer<'_, KeyPair>,
    name: &str,
    common_name: &str,
    organization: &str,
    hosts: &[String],
) -> Result<()> {
    let key = KeyPair::generate()?;
    let mut parameters = parameters(common_name, organization, hosts)?;
    parameters.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    parameters.extended_key_usages =
        vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
    put(names, &format!("{name}.crt"), &parameters.signed_by(&key, ca)?.pem())?;
    put(names, &format!("{name}.key"), &key.serialize_pem())?;
    let server = format!("https://{}:{}", names.of_machine(Machine::Control), super::control_plane::PORT);
    let config = json!({
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": names.prefix(), "cluster": {
            "server": server,
            "certificate-authority": file(names, "ca.crt"),
        }}],
        "users": [{"name": name, "user": {
            "client-certificate": file(names, &format!("{name}.crt")),
            "client-key": file(names, &format!("{name}.key")),
        }}],
        "contexts": [{"name": names.prefix(), "context": {"cluster": names.prefix(), "user": name}}],
        "current-context": names.prefix(),
    });
    put(names, &format!("{name}.kubeconfig"), &serde_json::to_string_pretty(&config)?)
}

fn put(names: Names, name: &str, content: &str) -> Result<()> {
    let path = file(names, name);
    fs::write(&path, content).with_context(|| format!("writing {}", path.display()))
}
