//! AuthenticationPolicies in a cluster: let in or not, and told of in their status, with what became of their issuers' keys.

use mesh_tests::{cluster::Cluster, process, until, wait};

use crate::{LEASE, controller::Controller, try_apply};

/// A policy that says this of its one issuer.
fn policy(name: &str, issuer: &str) -> String {
    format!(
        "apiVersion: nodemesh.io/v1alpha1\nkind: AuthenticationPolicy\nmetadata: {{name: {name}, namespace: shop}}\n\
         spec: {{ports: [8080], issuers: [{{issuer: 'https://id.example/', audiences: [shop], {issuer}}}]}}\n"
    )
}

/// A public key.
const INLINE: &str = r#"jwks: {inline: '{"keys":[{"kty":"OKP","crv":"Ed25519","kid":"a","x":"11qYAYKxCrfVS_7TyWQHOg7hcvPapiMlrwIaaPcHURo"}]}'}"#;

pub(crate) fn policies_on_them_say_what_became_of_them(cluster: &Cluster, controller: &Controller) {
    for (issuer, part) in [
        (format!("{INLINE}, from: [{{}}]"), "one of header, query and cookie"),
        (format!("{INLINE}, from: [{{cookie: a, prefix: b}}]"), "prefix is for header alone"),
        ("jwks: {}".to_owned(), "either inline or url"),
    ] {
        let manifest = policy("users", &issuer);
        let said = try_apply(cluster, &manifest).expect_err(&manifest);
        assert!(said.contains(part), "{manifest}\n{said}");
    }
    // Where nobody listens.
    let url = "jwks: {url: 'https://127.0.0.1:1/keys'}";
    cluster.apply(&format!("{}---\n{}", policy("users", INLINE), policy("elsewhere", url))).unwrap();
    for (name, expected) in [
        ("users", "Accepted=True Accepted "),
        ("elsewhere", "Accepted=True Accepted KeysFetched=False FetchFailed "),
    ] {
        until(&format!("the policy {name} says {expected}"), LEASE, || {
            let path = "jsonpath={range .status.conditions[*]}{.type}={.status} {.reason} {end}";
            let asked = ["--namespace", "shop", "get", "authenticationpolicy", name, "-o", path];
            let said = cluster.kubectl(&asked).map_err(|error| format!("{error:#}"))?;
            wait::holds(said == expected, || format!("{said:?}\n{}", process::tail(&controller.log)))
        });
    }
}
