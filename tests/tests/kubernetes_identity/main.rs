//! Who is who in Kubernetes, and what is known of whom, against a real API server: agents that prove themselves with their
//! pod's token, controllers that share one authority and read what pods say of themselves.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking, in its helpers too")]

mod agent;
mod bed;
mod replicas;

use std::{fs, process::Command};

use mesh_agent::identity::join::{JoinError, Proof};
use mesh_tests::{netns, process, until, wait::holds};

use bed::{AUDIENCE, Bed, PODS, SOON};

#[test]
fn a_pods_token_makes_its_own_node_one_of_the_mesh_and_nothing_else_does() {
    let bed = Bed::up();
    let (node_a, node_b) = (bed.nodes[0].clone(), bed.nodes[1].clone());
    let shared = bed.shared();
    let options: Vec<&str> = shared.iter().map(String::as_str).collect();
    let controller = bed.controller("one", bed.kubeconfig("controller", None), &options);
    bed.pod("agent-a", &node_a, "agent");
    bed.pod("agent-b", &node_b, "agent");
    bed.pod("other-a", &node_a, "other");
    let roots = bed.roots(1);
    let proof = |token: &str| bed.proof(token, roots.clone());

    for (pod, node) in [("agent-a", &node_a), ("agent-b", &node_b)] {
        let identity = controller.join(node, &proof(&bed.token(pod, "mesh"))).unwrap();
        assert_eq!(identity, format!("spiffe://cluster.local/node/{node}"));
    }

    // Each for good: a pod with it has to be put right by somebody.
    let unbound = bed.kubectl(&["create", "token", "agent", "--audience", AUDIENCE]);
    for (token, expected) in [
        (bed.token("agent-b", "mesh"), format!("runs on node {node_b}, and the node {node_a} was claimed")),
        (bed.token("agent-a", "api"), "for the audience https://kubernetes.default.svc".to_owned()),
        (bed.token("other-a", "mesh"), format!("agents run as {}", bed.name("agent"))),
        (unbound, "bound to no pod".to_owned()),
        ("nonsense".to_owned(), "not a service-account token".to_owned()),
    ] {
        let error = controller.join(&node_a, &proof(&token)).unwrap_err();
        assert!(error.to_string().contains(&expected) && !error.is_transient(), "{error}");
    }

    // Forged: the claims are right, the signature is not.
    let token = bed.token("agent-a", "mesh");
    let (claims, _) = token.trim().rsplit_once('.').unwrap();
    let forged = controller.join(&node_a, &proof(&format!("{claims}.c2lnbmVk"))).unwrap_err();
    assert!(forged.to_string().contains("does not take"), "{forged}");

    // Of a pod that is gone: never seen here before, so that no review of it is remembered anywhere.
    bed.pod("agent-gone", &node_a, "agent");
    let token = bed.token("agent-gone", "mesh");
    bed.kubectl(&["delete", "pod", "agent-gone", "--force", PODS]);
    let gone = controller.join(&node_a, &proof(&token)).unwrap_err();
    assert!(gone.to_string().contains("does not take") && gone.is_transient(), "{gone}");
    assert!(controller.has_metric("nodemesh_joins_total{result=\"ok\"} 2").is_ok());

    // A controller that may not ask, and one whose API server is away: the agent tries again.
    let token = bed.token("agent-a", "mesh");
    let powerless = bed.controller("powerless", bed.kubeconfig("powerless", None), &[]);
    let away = bed.controller("away", bed.kubeconfig("controller", Some("https://127.0.0.1:1")), &[]);
    for (controller, name, expected) in
        [(&powerless, "powerless", "tokenreviews.authentication.k8s.io"), (&away, "away", "cannot be asked")]
    {
        // These have authorities of their own, in their state directories.
        let state = bed.files.path().join(name);
        let authority =
            mesh_controller::ca::Authority::open_in(&state, std::time::SystemTime::now()).unwrap();
        let proof = match proof(&token) {
            Proof::ServiceAccount { token, .. } => Proof::ServiceAccount { token, roots: authority.roots() },
            Proof::Token(_) => unreachable!("a service account's"),
        };
        let error = controller.join(&node_a, &proof).unwrap_err();
        assert!(error.to_string().contains(expected) && error.is_transient(), "{error}");
    }
}

#[test]
fn controllers_share_one_authority_through_its_rotation_and_its_damage() {
    let bed = Bed::up();
    let shared = bed.shared();
    let options: Vec<&str> = shared.iter().map(String::as_str).collect();
    let kubeconfig = bed.kubeconfig("controller", None);
    let controllers =
        ["one", "two", "three"].map(|name| bed.begin_controller(name, kubeconfig.clone(), &options));
    let first = controllers[0].roots();
    assert_eq!(first.len(), 1);
    assert!(controllers.iter().all(|it| it.roots() == first), "they began at once and made one authority");

    let node = bed.nodes[0].clone();
    bed.pod("agent-a", &node, "agent");
    let token = bed.token("agent-a", "mesh");
    let old = bed.proof(&token, bed.roots(1));

    // Rotated by a command: all of them sign under the new root, and who knows only the old one is not shut out.
    let mut rotate = Command::new(process::binaries().unwrap().join("mesh-controller"));
    rotate.args(["rotate-root", "--ca-secret", &bed.name("nodemesh-ca")]).env("KUBECONFIG", &kubeconfig);
    let said = netns::run(&mut rotate, None).unwrap();
    assert!(said.contains("2 roots are trusted now"), "{said}");
    for controller in &controllers {
        until("the rotation is taken over", SOON, || {
            let roots = controller.roots();
            holds(roots.len() == 2 && roots.is_superset(&first), || format!("{roots:?}"))
        });
        controller.join(&node, &old).unwrap();
    }
    let new = bed.proof(&token, bed.roots(2));
    let rotated = controllers[0].roots();

    // Damaged, and gone: what is in force stays, and says so.
    let backup = bed.kubectl(&["get", "secret", "nodemesh-ca", "-o", r"jsonpath={.data.authority\.json}"]);
    let put = |value: &str| {
        let patch = serde_json::json!({"data": {"authority.json": value}}).to_string();
        bed.kubectl(&["patch", "secret", "nodemesh-ca", "--type=merge", "-p", &patch])
    };
    put("e30=");
    for controller in &controllers {
        until("the damage is told", SOON, || {
            controller.has_metric("nodemesh_controller_state_unsaved{part=\"authority\"} 1")
        });
        controller.join(&node, &new).unwrap();
    }
    let beginner = bed.begin_controller("beginner", kubeconfig.clone(), &options);
    until("a controller that starts says what is wrong", SOON, || {
        let log = fs::read_to_string(&beginner.log).unwrap_or_default();
        holds(log.contains("nodemesh-ca is damaged") && log.contains("restore it from a backup"), || log)
    });
    put(&backup);
    bed.kubectl(&["delete", "secret", "nodemesh-ca"]);
    let back = ["get", "secret", "nodemesh-ca", "-o", r"jsonpath={.data.authority\.json}"];
    until("the Secret is put back as it was", SOON, || {
        let found = bed.try_kubectl(&back).map_err(|error| format!("{error:#}"))?;
        holds(found == backup, || "another authority".to_owned())
    });
    bed.kubectl(&["delete", "configmap", "nodemesh-roots"]);
    bed.roots(2);
    for controller in &controllers {
        until("all is in order again", SOON, || {
            controller.has_metric("nodemesh_controller_state_unsaved{part=\"authority\"} 0")?;
            controller.has_metric("nodemesh_controller_state_unsaved{part=\"roots\"} 0")
        });
        assert_eq!(controller.roots(), rotated);
        controller.join(&node, &new).unwrap();
    }

    // The old root goes, by one command for all.
    let retired = first.first().unwrap();
    let mut retire = Command::new(process::binaries().unwrap().join("meshctl"));
    retire.args(["retire", "root", retired, "--force", "--ca-secret", &bed.name("nodemesh-ca")]);
    netns::run(retire.env("KUBECONFIG", &kubeconfig), None).unwrap();
    for controller in &controllers {
        until("the old root is gone", SOON, || {
            let roots = controller.roots();
            holds(roots.len() == 1 && !roots.contains(retired), || format!("{roots:?}"))
        });
    }
    let error = controllers[0].join(&node, &old).unwrap_err();
    assert!(matches!(error, JoinError::Untrusted { .. }) && error.is_transient(), "{error}");
    controllers[1].join(&node, &bed.proof(&token, bed.roots(1))).unwrap();
}
