//! What people and tools say to the controller, and what it says back.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking, in its helpers too")]

use mesh_tests::{World, apps, controller::CommandOutput, until, wait::holds, workload::TIMEOUT};
use serde_json::Value;

#[track_caller]
fn succeeds(output: &CommandOutput) -> &str {
    assert!(output.success, "meshctl failed: {}{}", output.stdout, output.stderr);
    &output.stdout
}

fn json(world: &World, arguments: &[&str]) -> Value {
    let output = world.meshctl(&[&["--output", "json"], arguments].concat()).unwrap();
    serde_json::from_str(succeeds(&output)).expect("meshctl --output json prints JSON")
}

/// The bad document is refused by name and place; everything else, old and new, is in force.
#[test]
fn a_bad_document_is_refused_alone() {
    let world = World::shop().build().unwrap();
    let (web, db) = (world.workload("web"), world.workload("db"));
    let _app = db.serve(8080, apps::echo()).unwrap();
    let policy = |name: &str, action: &str, port: &str| {
        format!(
            "apiVersion: nodemesh.io/v1alpha1\nkind: AuthorizationPolicy\nmetadata:\n  namespace: shop\n  name: {name}\nspec:\n  action: {action}\n  rules:\n    - to:\n        - ports: [{port}]\n"
        )
    };
    let text = format!("{}---\n{}", policy("good", "Deny", "9090"), policy("bad", "Perhaps", "70000"));
    world.yaml.write("mixed.yaml", &text).unwrap();
    let refused =
        || world.controller().metrics().map(|m| m.sum("nodemesh_documents", &[("state", "refused")]));
    until("the bad document is counted", TIMEOUT, || {
        let count = refused().map_err(|e| format!("{e:#}"))?;
        holds(count == 1.0, || format!("{count} refused"))
    });
    let status = json(&world, &["status"]).to_string();
    assert!(status.contains("mixed.yaml"), "status names the file: {status}");
    let policies = json(&world, &["get", "policies"]).to_string();
    assert!(policies.contains("good"), "the good half of the file is in force: {policies}");
    assert_eq!(web.exchange(db.v4(8080), b"x").unwrap(), b"x");
    world.yaml.write("mixed.yaml", &policy("good", "Deny", "9090")).unwrap();
    until("the cure is seen", TIMEOUT, || {
        let count = refused().map_err(|e| format!("{e:#}"))?;
        holds(count == 0.0, || format!("{count} refused"))
    });
}

/// A file that turns bad keeps its last good meaning.
#[test]
fn the_last_good_document_stays_in_force() {
    let world = World::shop().build().unwrap();
    let before = world.yaml.read("workload-db.yaml").unwrap();
    world.yaml.write("workload-db.yaml", &before.replace("addresses:", "adresses:")).unwrap();
    until("it is refused", TIMEOUT, || {
        let metrics = world.controller().metrics().map_err(|e| format!("{e:#}"))?;
        holds(metrics.sum("nodemesh_documents", &[("state", "refused")]) == 1.0, || "not yet".into())
    });
    let db = world.workload("db");
    let _app = db.serve(8080, apps::echo()).unwrap();
    assert_eq!(world.workload("web").exchange(db.v4(8080), b"x").unwrap(), b"x");
    world.agent("b").await_enrolled(1, TIMEOUT).unwrap();
}

#[test]
fn check_reads_a_directory_without_a_controller() {
    let world = World::shop().build().unwrap();
    let directory = world.yaml.directory().to_string_lossy().into_owned();
    succeeds(&world.meshctl(&["check", &directory]).unwrap());
    let bad = "apiVersion: v1\nkind: Service\nmetadata:\n  namespace: shop\n  name: db\nspec:\n  clusterIP: \"10.0.0.300\"\n  ports:\n    - port: 80\n";
    world.yaml.write("bad.yaml", bad).unwrap();
    let output = world.meshctl(&["check", &directory]).unwrap();
    assert!(!output.success, "a bad directory fails: {}", output.stdout);
    let said = output.stdout + &output.stderr;
    assert!(said.contains("bad.yaml") && said.contains("clusterIP"), "file and field are named: {said}");
}

#[test]
fn get_lists_what_is_in_force() {
    let world = World::shop().service("shop/db", "db", 5432, 8080).build().unwrap();
    let workloads = json(&world, &["get", "workloads"]).to_string();
    for name in ["web", "api", "db"] {
        assert!(workloads.contains(name), "{workloads}");
        let table = world.meshctl(&["get", "workloads"]).unwrap();
        assert!(succeeds(&table).contains(name), "{}", table.stdout);
    }
    let services = json(&world, &["get", "services"]).to_string();
    assert!(services.contains(&world.service("shop/db").v4.to_string()), "{services}");
    let status = json(&world, &["status"]).to_string();
    assert!(status.contains("\"a\"") && status.contains("\"b\""), "status lists the nodes: {status}");
}

/// `why` runs the decision of the agents: what it says is what happens.
#[test]
fn why_says_what_happens() {
    let world = World::shop().build().unwrap();
    let (web, api, db) = (world.workload("web"), world.workload("api"), world.workload("db"));
    let _app = db.serve(8080, apps::echo()).unwrap();
    let text = format!(
        "apiVersion: nodemesh.io/v1alpha1\nkind: AuthorizationPolicy\nmetadata:\n  namespace: shop\n  name: only-web\nspec:\n  selector:\n    matchLabels:\n      app: db\n  action: Allow\n  rules:\n    - from:\n        - identities: [\"{}\"]\n",
        web.identity()
    );
    world.yaml.write("policy.yaml", &text).unwrap();
    until("api is refused", TIMEOUT, || {
        holds(api.exchange(db.v4(8080), b"x").is_err(), || "it is allowed".into())
    });
    let to = db.v4(8080).to_string();
    let allowed = world.meshctl(&["why", "shop/web", &to]).unwrap();
    assert!(format!("{}{}", allowed.stdout, allowed.stderr).contains("only-web"), "{allowed:?}");
    assert_eq!(web.exchange(db.v4(8080), b"x").unwrap(), b"x");
    let refused = world.meshctl(&["why", "shop/api", &to]).unwrap();
    let said = format!("{}{}", refused.stdout, refused.stderr);
    assert!(said.contains("policy_not_allowed"), "{said}");
}
