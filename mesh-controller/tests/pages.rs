//! Pages for users: the manifests that they show are taken as they are, and do what the page says.

// A test's unwrap is its failure.
#![allow(clippy::unwrap_used)]

use std::{path::PathBuf, sync::Arc};

use mesh_controller::{
    model::{KeysAt, Model},
    source::ledger::{FileContent, Ledger},
};
use mesh_core::model::{Action, TokenPlace};

/// The manifests of a page, together.
fn manifests(page: &str) -> Model {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../docs/operate").join(page);
    let page = std::fs::read_to_string(path).unwrap();
    let blocks = page.split("```yaml\n").skip(1).map(|rest| rest.split("```").next().unwrap());
    let text = blocks.collect::<Vec<_>>().join("---\n");
    assert!(!text.is_empty());
    let ledger = Ledger::default().next(&[("page.yaml".into(), Arc::new(FileContent::parse(&text)))].into());
    assert_eq!(ledger.refused(), []);
    ledger.model()
}

#[test]
fn the_policies_of_the_page_on_authorization_are_taken() {
    assert_eq!(manifests("authorization.md").policies.len(), 2);
}

#[test]
fn the_policies_of_the_page_on_authentication_say_what_it_says() {
    let model = manifests("authentication.md");
    let policy = model.authentications.values().next().unwrap();
    assert!(policy.required && policy.has_port(8080) && !policy.has_port(8081));
    let issuer = &policy.issuers[0];
    assert_eq!((issuer.issuer.as_str(), issuer.strip), ("https://id.example/", true));
    let places = [
        TokenPlace::Header { name: "authorization".into(), prefix: "Bearer".into() },
        TokenPlace::Query("access_token".into()),
        TokenPlace::Cookie("session".into()),
    ];
    assert_eq!(issuer.places, places);
    let at = KeysAt { url: "https://id.example/.well-known/jwks.json".into(), ca_bundle: String::new() };
    let elsewhere: Vec<_> = model.keys_elsewhere.values().flat_map(|it| &it.elsewhere).collect();
    assert_eq!(elsewhere, [&(0, at)]);
    let staff = model.policies.values().next().unwrap();
    assert_eq!(
        (staff.action, staff.rules[0].to[0].none_of.claims[0].name.as_str()),
        (Action::Deny, "/realm_access/roles")
    );
}
