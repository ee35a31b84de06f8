//! gRPC's own client and server, unchanged, at the two ends of the mesh: what they say to each other by a GRPCRoute, whose
//! requests the client's agent reads, and under a policy for whose sake the server's agent reads them, too.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking, in its helpers too")]

use std::path::{Path, PathBuf};

use mesh_tests::{
    World,
    manifests::{Enrolment, Mode},
    process::Program,
    until,
    wait::{holds, scaled},
    workload::TIMEOUT,
};
use serde_json::Value;

/// The client's test cases (grpc/doc/interop-test-descriptions.md) but for those that want TLS, credentials of Google's,
/// xDS, or servers that say which one they are. This client has none about compression.
const CASES: [&str; 17] = [
    "empty_unary",
    "large_unary",
    "client_streaming",
    "server_streaming",
    "ping_pong",
    "empty_stream",
    "timeout_on_sleeping_server",
    "cancel_after_begin",
    "cancel_after_first_response",
    "status_code_and_message",
    "special_status_message",
    "custom_metadata",
    "unimplemented_method",
    "unimplemented_service",
    "rpc_soak",
    "channel_soak",
    "orca_per_rpc",
];

/// Without it `orca_per_rpc` has nothing to look at.
const BALANCING: &str = r#"{"loadBalancingConfig": [{"test_backend_metrics_load_balancer": {}}]}"#;

/// `shop/calls` leads to the server, which is no endpoint of it.
const ROUTE: &str = "
apiVersion: gateway.networking.k8s.io/v1
kind: GRPCRoute
metadata: {namespace: shop, name: calls}
spec:
  parentRefs: [{group: '', kind: Service, name: calls, port: 80}]
  rules:
    - matches:
        - method: {service: grpc.testing.TestService}
        - method: {service: grpc.testing.UnimplementedService}
      backendRefs: [{name: server, port: 80}]
";

const POLICY: &str = "
apiVersion: nodemesh.io/v1alpha1
kind: AuthorizationPolicy
metadata: {namespace: shop, name: calls}
spec:
  selector: {matchLabels: {app: db}}
  action: Allow
  rules: [{to: [{methods: [POST], paths: [/grpc.testing.*]}]}]
";

#[test]
fn grpc_s_own_client_and_server_understand_each_other() {
    let world = World::shop()
        .namespace("shop", Enrolment::Enrolled, Mode::Strict)
        .service("shop/calls", "nobody", 80, 8080)
        .service("shop/server", "db", 80, 8080)
        .build()
        .unwrap();
    world.yaml.write("route.yaml", ROUTE).unwrap();
    let server = world.workload("db");
    let log = world.directory().join("interop-server.log");
    let mut start = server.command(&peer("interop-server"));
    let _server = Program::start("interop-server", start.args(["--port", "8080"]), &log).unwrap();
    until("the route is in force, and the server there", TIMEOUT, || call(&world, "empty_unary"));

    all(&world);
    let routed = |line: &Value| line["path"] == "/grpc.testing.TestService/UnaryCall";
    let line = world.agent("a").wait_log("a call that was routed", routed);
    assert_eq!((&line["route"], &line["backend"]), (&"GRPCRoute/shop/calls".into(), &"shop/server".into()));

    world.yaml.write("policy.yaml", POLICY).unwrap();
    let read = |line: &Value| line["direction"] == "inbound" && line["rule"] == "shop/calls[0]";
    until("the policy is in force", TIMEOUT, || {
        call(&world, "empty_unary")?;
        let lines = world.agent("b").access_log().map_err(|error| error.to_string())?;
        holds(lines.iter().any(|line| read(line) && line["kind"] == "request"), || "not yet".into())
    });
    all(&world);
}

fn all(world: &World) {
    let failed: Vec<String> = CASES.iter().filter_map(|case| call(world, case).err()).collect();
    assert!(failed.is_empty(), "{}", failed.join("\n"));
}

/// Runs one case to its end. The client says nothing unless it fails.
fn call(world: &World, case: &str) -> Result<(), String> {
    let host = world.service("shop/calls").v4.to_string();
    let mut client = world.workload("web").command(&peer("interop-client"));
    client.args(["--server_host", &host, "--server_port", "80", "--test_case", case]);
    if case.starts_with("orca") {
        client.args(["--service_config_json", BALANCING]);
    }
    let log = world.directory().join(format!("interop-{case}.log"));
    let client = Program::start(case, &mut client, &log).map_err(|error| error.to_string())?;
    let ended = client.await_end(scaled(TIMEOUT)).map_err(|error| error.to_string())?;
    holds(ended.success(), || format!("{case}: {ended}: {}", mesh_tests::process::tail(&log)))
}

/// A program that `cargo xtask peers` builds, which is part of `cargo xtask test`.
fn peer(name: &str) -> String {
    let path: PathBuf = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/peers").join(name);
    assert!(path.is_file(), "{} is not there: cargo xtask peers", path.display());
    path.display().to_string()
}
