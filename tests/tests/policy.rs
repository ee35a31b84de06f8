//! Who may connect, as seen by the one who is refused and in the log of the one who refuses.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking, in its helpers too")]

use std::{
    io::{ErrorKind, Read, Write},
    net::{SocketAddr, TcpStream},
    time::{Duration, Instant},
};

use mesh_core::refusal::Reason;
use mesh_tests::{
    Server, Workload, WorkloadSpec, World, apps, log,
    manifests::{Enrolment, Mode},
    until,
    wait::{holds, scaled},
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

/// A policy `shop/APP` for the workloads with this label.
fn manifest(app: &str, action: &str, enforcement: &str, rules: &str) -> String {
    format!(
        "apiVersion: nodemesh.io/v1alpha1\nkind: AuthorizationPolicy\nmetadata:\n  namespace: shop\n  name: {app}\nspec:\n  selector:\n    matchLabels:\n      app: {app}\n  action: {action}\n  {enforcement}\n  rules:\n{rules}"
    )
}

impl Shop {
    fn apply(&self, action: &str, rules: &str) {
        self.apply_with(action, "", rules);
    }

    fn apply_with(&self, action: &str, enforcement: &str, rules: &str) {
        let version = || self.world.agent("b").state().unwrap()["view_version"].clone();
        let before = version();
        self.world.yaml.write("policy.yaml", &manifest("db", action, enforcement, rules)).unwrap();
        // Else the policy before this one might give the answer that is expected of this one.
        until("the policy is in force", TIMEOUT, || holds(version() != before, || before.to_string()));
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

/// Each kind of source and port, said either way, in one world: what each lets through and what not.
#[test]
fn every_kind_of_source_and_port_allows_and_denies_on_the_wire() {
    let shop = shop();
    let (web, api, stranger) = (&shop.web, &shop.api, &shop.stranger);
    let block = |workload: &Workload| format!("{}/32", workload.address.v4);
    // A rule of an allow policy, who is let through by it and who is not; to port 8080 over IPv4.
    for (rule, allowed, refused) in [
        ("from: [{namespaces: [other]}]".to_owned(), vec![stranger], vec![web, api]),
        ("from: [{identities: ['spiffe://cluster.local/ns/shop/*']}]".into(), vec![web, api], vec![stranger]),
        ("from: [{trustDomains: [elsewhere]}]".into(), vec![], vec![web, stranger]),
        ("from: [{trustDomains: [cluster.local], notNamespaces: [shop]}]".into(), vec![stranger], vec![web]),
        (format!("from: [{{notIdentities: ['{}']}}]", web.identity()), vec![api, stranger], vec![web]),
        ("from: [{notTrustDomains: [cluster.local]}]".into(), vec![], vec![web, stranger]),
        (format!("from: [{{addressBlocks: ['{}']}}]", block(api)), vec![api], vec![web]),
        (format!("from: [{{notAddressBlocks: ['{}']}}]", block(api)), vec![web], vec![api]),
        ("to: [{ports: [8000-8999]}]".into(), vec![web], vec![]),
        ("to: [{ports: [9090]}]".into(), vec![], vec![web]),
        ("to: [{notPorts: [9090]}]".into(), vec![api], vec![]),
    ] {
        shop.apply("Allow", &format!("    - {rule}\n"));
        for (sources, expected) in [(&allowed, true), (&refused, false)] {
            sources.iter().for_each(|from| shop.settles(from, shop.db.v4(8080), expected));
        }
        shop.apply("Deny", &format!("    - {rule}\n"));
        for (sources, expected) in [(&allowed, false), (&refused, true)] {
            sources.iter().for_each(|from| shop.settles(from, shop.db.v4(8080), expected));
        }
    }
    // A block is of one family, a port is one of two.
    shop.apply(
        "Deny",
        &format!("    - {{from: [{{addressBlocks: ['{}']}}], to: [{{ports: [8080]}}]}}\n", block(api)),
    );
    shop.settles(api, shop.db.v4(8080), false);
    shop.settles(api, shop.db.v6(8080), true);
    shop.settles(api, shop.db.v4(9090), true);
}

#[test]
fn an_audited_policy_counts_and_logs_what_it_would_refuse_and_refuses_nothing() {
    let shop = shop();
    let agent = shop.world.agent("b");
    shop.apply_with(
        "Allow",
        "enforcement: Audit",
        &format!("    - from: [{{identities: ['{}']}}]\n", shop.web.identity()),
    );
    let counted = || {
        let labels = [("policy", "shop/db"), ("workload", "shop/db"), ("reason", "policy_not_allowed")];
        agent.metrics().unwrap().sum("nodemesh_policy_audit_refusals_total", &labels)
    };
    until("the policy has arrived", TIMEOUT, || {
        assert_eq!(shop.api.exchange(shop.db.v4(8080), b"x").unwrap(), b"x");
        holds(counted() >= 1.0, || "nothing is counted".into())
    });
    let line = agent.wait_log("would_refuse", |line| !line["would_refuse"].is_null());
    assert_eq!((&line["outcome"], &line["source"]["workload"]), (&"ok".into(), &"shop/api".into()), "{line}");
    let expected = serde_json::json!({"policy": "shop/db", "rule": null, "reason": "policy_not_allowed"});
    assert_eq!(line["would_refuse"], expected);
    let before = counted();
    for to in shop.db.both(8080) {
        assert_eq!(shop.web.exchange(to, b"x").unwrap(), b"x");
        assert_eq!(shop.stranger.exchange(to, b"x").unwrap(), b"x");
    }
    assert_eq!(counted(), before + 2.0, "the stranger's two, and none of web's");
    let why = shop.world.meshctl(&["why", "shop/api", "shop/db:8080"]).unwrap().stdout;
    assert!(why.contains("ALLOWED") && why.contains("shop/db (policy_not_allowed) would refuse it"), "{why}");
    let policies = shop.world.meshctl(&["get", "policies"]).unwrap().stdout;
    assert!(policies.contains("Allow, audit"), "{policies}");
    // In force, it refuses exactly that.
    shop.world.yaml.replace("policy.yaml", "Audit", "Enforce").unwrap();
    shop.settles(&shop.api, shop.db.v4(8080), false);
    shop.settles(&shop.web, shop.db.v4(8080), true);
}

/// Holds connections open while the manifests change; each is cut within a second of the change, and says why.
#[test]
fn live_connections_end_within_a_second_of_the_change_that_forbids_them() {
    let shop = World::shop().with(WorkloadSpec::new("shop/old", "a").outside()).build().unwrap();
    let (web, old, db) = (shop.workload("web"), shop.workload("old"), shop.workload("db"));
    let _app = db.serve(8080, apps::echo()).unwrap();
    let cut_by = |change: &dyn Fn(), held: Vec<TcpStream>, reason: Reason| {
        let changed = Instant::now();
        change();
        for mut stream in held {
            let error = stream.read(&mut [0; 1]).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::ConnectionReset, "{reason}");
            assert!(
                changed.elapsed() < scaled(Duration::from_secs(1)),
                "{reason} after {:?}",
                changed.elapsed()
            );
        }
        shop.agent("b").wait_log(reason.label(), log::refused(log::INBOUND, reason));
        let labels = [("direction", "inbound"), ("outcome", "refused"), ("reason", reason.label())];
        assert!(shop.agent("b").metrics().unwrap().sum("nodemesh_connections_total", &labels) >= 1.0);
    };
    let hold = |from: &Workload| -> Vec<TcpStream> {
        let held = db.both(8080).into_iter().map(|to| {
            let mut stream = from.connect(to).unwrap();
            stream.write_all(b"ping").unwrap();
            stream.read_exact(&mut [0; 4]).unwrap();
            stream
        });
        held.collect()
    };
    let write = |action: &str, rules: &str| {
        shop.yaml.write("policy.yaml", &manifest("db", action, "", rules)).unwrap();
    };
    cut_by(&|| write("Deny", "    - from: [{namespaces: [shop]}]\n"), hold(&web), Reason::PolicyDeny);
    write("Allow", "    - from: [{notNamespaces: [elsewhere]}, {addressBlocks: [0.0.0.0/0, '::/0']}]\n");
    until("the deny is gone", TIMEOUT, || {
        holds(web.exchange(db.v4(8080), b"x").is_ok(), || "still refused".into())
    });
    let (kept, plain) = (hold(&web), hold(&old));
    // The workload's own label, against its namespace's: its plaintext ends, and nothing else.
    let strict =
        || shop.yaml.replace("workload-db.yaml", "app: db", "app: db\n    nodemesh.io/mode: strict").unwrap();
    cut_by(&strict, plain, Reason::PlaintextToStrict);
    old.assert_refused(db.v4(8080));
    let shown = shop.meshctl(&["get", "workloads"]).unwrap().stdout;
    let of_db = shown.lines().find(|line| line.starts_with("shop/db")).unwrap();
    assert!(of_db.contains("strict (workload)"), "{shown}");
    for mut stream in kept {
        stream.write_all(b"ping").unwrap();
        stream.read_exact(&mut [0; 4]).unwrap();
    }
    // Somebody else runs at the source's address.
    let moved =
        || shop.yaml.replace("workload-web.yaml", "serviceAccount: web", "serviceAccount: other").unwrap();
    let held = hold(&web);
    let changed = Instant::now();
    moved();
    for mut stream in held {
        assert_eq!(stream.read(&mut [0; 1]).unwrap_err().kind(), ErrorKind::ConnectionReset);
        assert!(changed.elapsed() < scaled(Duration::from_secs(1)), "identity after {:?}", changed.elapsed());
    }
    let ended = |line: &serde_json::Value| line["reason"] == "identity_mismatch";
    let line = until("an agent says why", TIMEOUT, || {
        let logs = ["a", "b"].map(|node| shop.agent(node).access_log().unwrap()).concat();
        logs.into_iter().find(ended).ok_or_else(|| "no line".into())
    });
    assert_eq!(line["outcome"], "refused", "{line}");
}

#[test]
fn the_default_mode_holds_where_nobody_says_one() {
    let world = World::shop()
        .with(WorkloadSpec::new("shop/old", "a").outside())
        .default_mode(Mode::Strict)
        .build()
        .unwrap();
    let (web, old, db) = (world.workload("web"), world.workload("old"), world.workload("db"));
    let _app = db.serve(8080, apps::echo()).unwrap();
    // Worlds label their namespaces: without the label the default holds.
    assert_eq!(old.exchange(db.v4(8080), b"plain").unwrap(), b"plain");
    world.yaml.replace("namespace-shop.yaml", "    nodemesh.io/mode: permissive\n", "").unwrap();
    until("db is strict", TIMEOUT, || {
        holds(old.exchange(db.v4(8080), b"x").is_err(), || "plaintext is still taken".into())
    });
    old.assert_refused(db.v6(8080));
    assert_eq!(web.exchange(db.v4(8080), b"x").unwrap(), b"x");
    let shown = world.meshctl(&["get", "workloads"]).unwrap().stdout;
    assert!(shown.contains("strict (default)"), "{shown}");
}

#[test]
fn a_policy_holds_between_workloads_of_one_node() {
    let shop = shop();
    let _app = shop.api.serve(8080, apps::echo()).unwrap();
    let text = manifest("api", "Deny", "", "    - from: [{namespaces: [other]}]\n");
    shop.world.yaml.write("policy-api.yaml", &text).unwrap();
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

/// The agent's socket is in TIME_WAIT then, and the kernel looks for a listener by itself: the application's is there.
#[test]
fn nobody_gets_past_a_policy_by_a_port_that_was_just_used() {
    let world = World::shop().with(WorkloadSpec::new("shop/old", "a").outside()).build().unwrap();
    let (old, db) = (world.workload("old"), world.workload("db"));
    let app = db.serve(8080, apps::namer("db")).unwrap();
    let ask = |to| {
        let mut said = String::new();
        old.connect_from(7000, to)?.read_to_string(&mut said)?;
        std::io::Result::Ok(said)
    };
    for to in db.both(8080) {
        assert_eq!(ask(to).unwrap(), "db");
    }
    let rules =
        format!("    - from: [{{addressBlocks: [{}/32, '{}/128']}}]\n", old.address.v4, old.address.v6);
    let before = world.agent("b").state().unwrap()["view_version"].clone();
    world.yaml.write("policy.yaml", &manifest("db", "Deny", "", &rules)).unwrap();
    until("the policy is in force", TIMEOUT, || {
        let now = world.agent("b").state().unwrap()["view_version"].clone();
        holds(now != before, || before.to_string())
    });
    for to in db.both(8080) {
        ask(to).unwrap_err();
    }
    assert_eq!(app.peers().len(), 2, "the application saw {:?}", app.peers());
}
