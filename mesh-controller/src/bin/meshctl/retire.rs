//! Whether a root may go: nobody's certificate leads to it alone, as far as everybody says. And its going.

use anyhow::{bail, ensure};
use mesh_controller::admin::answer::{Certificates, HeldCertificate};

use crate::{Authority, rotate::authority};

/// Names certificates of an error at most.
const NAMED: usize = 5;

/// Refuses for what would end with the root. What begins with nothing, or twice, is for the authority to refuse.
pub(crate) fn may(known: &Certificates, fingerprint: &str) -> anyhow::Result<()> {
    let mut meant = known.roots.iter().filter(|root| root.sha256.starts_with(fingerprint));
    let (Some(root), None) = (meant.next(), meant.next()) else { return Ok(()) };
    if root.signs {
        return Ok(());
    }
    let leads = |it: &&HeldCertificate| it.root.as_ref() == Some(&root.sha256);
    let held: Vec<String> =
        known.certificates.iter().filter(leads).map(|it| format!("{} on {}", it.identity, it.node)).collect();
    if !held.is_empty() {
        let more = held.len().saturating_sub(NAMED);
        let more = if more > 0 { format!(", and {more} more") } else { String::new() };
        let named = held[..held.len().min(NAMED)].join(", ");
        bail!(
            "{} certificates lead to this root: {named}{more}; they are renewed under the newest one within minutes, \
             --force ends their connections",
            held.len()
        );
    }
    ensure!(
        known.silent.is_empty(),
        "the agents of {} do not say which certificates they hold: wait until they are back (meshctl status), or --force",
        known.silent.join(", ")
    );
    Ok(())
}

/// Takes a root out of an authority.
pub(crate) async fn root(fingerprint: &str, of: &Authority) -> anyhow::Result<()> {
    Ok(authority(of).await?.retire_root(fingerprint).await?)
}

#[cfg(test)]
mod tests {
    use mesh_controller::admin::answer::Root;

    use super::*;

    fn root(sha256: &str, signs: bool) -> Root {
        let text = String::new;
        Root {
            sha256: sha256.into(),
            subject: text(),
            since: text(),
            not_after: text(),
            signs,
            certificates: 0,
        }
    }

    fn known(leading_to: Option<&str>, silent: &[&str]) -> Certificates {
        let held = |root: &str| HeldCertificate {
            identity: "spiffe://td/ns/a/sa/b".into(),
            node: "n1".into(),
            expires: None,
            root: Some(root.into()),
            error: None,
        };
        Certificates {
            roots: vec![root("bb", true), root("aa", false)],
            certificates: leading_to.map(held).into_iter().collect(),
            silent: silent.iter().map(|node| (*node).to_owned()).collect(),
        }
    }

    #[test]
    fn a_root_goes_once_nothing_leads_to_it_and_everybody_has_said_so() {
        may(&known(None, &[]), "aa").unwrap();
        may(&known(Some("bb"), &[]), "aa").unwrap();
        let error = may(&known(Some("aa"), &[]), "a").unwrap_err().to_string();
        assert!(error.contains("spiffe://td/ns/a/sa/b on n1") && error.contains("--force"), "{error}");
        let error = may(&known(None, &["n2"]), "aa").unwrap_err().to_string();
        assert!(error.contains("n2 do not say") && error.contains("--force"), "{error}");
        may(&known(Some("bb"), &["n2"]), "bb").unwrap();
    }
}
