//! The Gateway API's own conformance tests for meshes, all of them, on a real Kubernetes with Nodemesh as we ship it; what
//! they report is what would be handed in.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking, in its helpers too")]

use mesh_tests::cluster::Cluster;
use serde_json::Value;

/// The profiles of meshes, each with the levels that it has tests of.
const PROFILES: [(&str, &[&str]); 2] = [("MESH-HTTP", &["core", "extended"]), ("MESH-GRPC", &["core"])];

#[test]
fn conformance_tests_of_the_gateway_api_pass() {
    let cluster = Cluster::up(&["--dns", "--gateway-api"]).unwrap();
    cluster.install().unwrap();
    let report = cluster.conformance().unwrap_or_else(|error| {
        panic!("{error:#}\n{}", cluster.state_of_mesh());
    });
    let report: Value = serde_saphyr::from_str(&report).unwrap();
    assert_eq!(report["gatewayAPIChannel"], "standard");
    let profiles = report["profiles"].as_array().unwrap();
    for (name, levels) in PROFILES {
        let profile = profiles.iter().find(|profile| profile["name"] == name).unwrap();
        for level in levels {
            assert_eq!(profile[level]["result"], "success", "{name}: {profile}");
        }
        // What is not supported is not counted as failed.
        assert_eq!(profile["extended"]["unsupportedFeatures"], Value::Null, "{name}: {profile}");
    }
}
