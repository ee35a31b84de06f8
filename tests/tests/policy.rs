//! Who may connect, as seen by the one who is refused and in the log of the one who refuses.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking, in its helpers too")]

use std::net::SocketAddr;

use mesh_core::refusal::Reason;
use mesh_tests::{
    Server, Workload, WorkloadSpec, World, apps, log,
    manifests::{Enrolment, Mode},
    until,
    wait::holds,
    workload::TIMEOUT,
};

struct Shop {
    world: World,
    web: Workload,
    api: Workload,
    stranger: Workload,
    db: Workload,
    _apps: [Server; 2],
}

/// The shop, and `other/stranger` beside `web`; `db` echoes on 8080 and 9090.
fn shop() -> Shop {
    let world = World::shop().workload("other/stranger", "a").build().unwrap();
    let db = world.workload("db");
    Shop {
        web: world.workload("web"),
        api: world.workload("api"),
        stranger: world.workload("stranger"),
        _apps: [8080, 9090].map(|port| db.serve(port, apps::echo()).unwrap()),
        db,
        world,
    }
}

impl Shop {
    fn apply(&self, action: &str, rules: &str) {
        self.world.yaml.write("policy.yaml", &format!(
            "apiVersion: nodemesh.io/v1alpha1\nkind: AuthorizationPolicy\nmetadata:\n  namespace: shop\n  name: db\nspec:\n  selector:\n    matchLabels:\n      app: db\n  action: {action}\n  rules:\n{rules}"
        )).unwrap();
    }

    /// Waits until the connection is let through or refused as said; the change travels to the agents meanwhile.
    #[track_caller]
    fn settles(&self, from: &Workload, to: SocketAddr, allowed: bool) {
        let what = format!("{} to {to} is {}", from.name, if allowed { "allowed" } else { "refused" });
        until(&what, TIMEOUT, || {
            let result = from.exchange(to, b"x");
            holds(result.is_ok() == allowed, || format!("{result:?}"))
        });
        if !allowed {
            from.assert_refused(to);
        }
    }

    #[track_caller]
    fn says(&self, reason: Reason) {
        let refused = log::refused(log::INBOUND, reason);
        let line = self.world.agent("b").wait_log(reason.label(), refused);
        assert_eq!(line["step"], "authorize", "{line}");
        let metrics = self.world.agent("b").metrics().unwrap();
        let labels = [("direction", "inbound"), ("outcome", "refused"), ("reason", reason.label())];
        assert!(metrics.sum("nodemesh_connections_total", &labels) >= 1.0, "{metrics:#?}");
    }
}

#[test]
fn allow_by_identity_refuses_everybody_else() {
    let shop = shop();
    shop.apply("Allow", &format!("    - from:\n        - identities: [\"{}\"]\n", shop.web.identity()));
    shop.settles(&shop.api, shop.db.v4(8080), false);
    shop.settles(&shop.web, shop.db.v4(8080), true);
    shop.settles(&shop.web, shop.db.v6(8080), true);
    shop.settles(&shop.stranger, shop.db.v6(8080), false);
    shop.says(Reason::PolicyNotAllowed);
}

#[test]
fn deny_wins_and_names_its_rule() {
    let shop = shop();
    shop.apply("Deny", &format!("    - from:\n        - identities: [\"{}\"]\n", shop.api.identity()));
    shop.settles(&shop.api, shop.db.v4(8080), false);
    shop.settles(&shop.web, shop.db.v4(8080), true);
    shop.says(Reason::PolicyDeny);
    let line = shop.world.agent("b").wait_log("the rule", log::refused(log::INBOUND, Reason::PolicyDeny));
    assert!(line["rule"].as_str().is_some_and(|rule| rule.contains("shop/db")), "{line}");
    shop.world.yaml.remove("policy.yaml").unwrap();
    shop.settles(&shop.api, shop.db.v4(8080), true);
}

#[test]
fn allow_by_namespace() {
    let shop = shop();
    shop.apply("Allow", "    - from:\n        - namespaces: [other]\n");
    shop.settles(&shop.web, shop.db.v4(8080), false);
    shop.settles(&shop.stranger, shop.db.v4(8080), true);
}

#[test]
fn allow_by_port() {
    let shop = shop();
    shop.apply("Allow", "    - to:\n        - ports: [8080]\n");
    shop.settles(&shop.web, shop.db.v4(9090), false);
    shop.settles(&shop.web, shop.db.v4(8080), true);
}

#[test]
fn deny_by_address_block() {
    let shop = shop();
    let block = format!("{}/32", shop.api.address.v4);
    shop.apply("Deny", &format!("    - from:\n        - addressBlocks: [\"{block}\"]\n"));
    shop.settles(&shop.api, shop.db.v4(8080), false);
    // Only this block of this family was named.
    shop.settles(&shop.api, shop.db.v6(8080), true);
    shop.settles(&shop.web, shop.db.v4(8080), true);
}

#[test]
fn a_policy_holds_between_workloads_of_one_node() {
    let shop = shop();
    let _app = shop.api.serve(8080, apps::echo()).unwrap();
    let text = "apiVersion: nodemesh.io/v1alpha1\nkind: AuthorizationPolicy\nmetadata:\n  namespace: shop\n  name: api\nspec:\n  selector:\n    matchLabels:\n      app: api\n  action: Deny\n  rules:\n    - from:\n        - namespaces: [other]\n";
    shop.world.yaml.write("policy-api.yaml", text).unwrap();
    shop.settles(&shop.stranger, shop.api.v4(8080), false);
    shop.settles(&shop.web, shop.api.v4(8080), true);
}

#[test]
fn strict_takes_no_plaintext_and_permissive_does() {
    let world = World::shop()
        .with(WorkloadSpec::new("shop/old", "a").outside())
        .workload("vault/safe", "b")
        .namespace("vault", Enrolment::Enrolled, Mode::Strict)
        .build()
        .unwrap();
    let (web, old) = (world.workload("web"), world.workload("old"));
    let (db, safe) = (world.workload("db"), world.workload("safe"));
    let app = db.serve(8080, apps::echo()).unwrap();
    let _safe = safe.serve(8080, apps::echo()).unwrap();
    for (to_db, to_safe) in db.both(8080).into_iter().zip(safe.both(8080)) {
        assert_eq!(old.exchange(to_db, b"plain").unwrap(), b"plain");
        assert_eq!(web.exchange(to_safe, b"sealed").unwrap(), b"sealed");
        old.assert_refused(to_safe);
    }
    assert_eq!(app.peers().iter().map(SocketAddr::ip).collect::<Vec<_>>(), old.address.both());
    world.agent("b").wait_log("plaintext", log::refused(log::INBOUND, Reason::PlaintextToStrict));
    // Strict while traffic flows: no restart of anything.
    world.yaml.replace("namespace-shop.yaml", "permissive", "strict").unwrap();
    until("db is strict", TIMEOUT, || {
        holds(old.exchange(db.v4(8080), b"x").is_err(), || "plaintext is still taken".into())
    });
    old.assert_refused(db.v6(8080));
    assert_eq!(web.exchange(db.v4(8080), b"x").unwrap(), b"x");
}
