//! What users of an application see while everything around it is restarted, updated, drained, killed and rotated: load runs
//! all along on a real Kubernetes, and each phase says what it may have seen.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking, in its helpers too")]

mod bed;
mod load;

use std::{collections::BTreeSet, time::Duration};

use mesh_tests::{cluster::mesh::NAMESPACE, until, wait::holds, wire};

use bed::{Bed, SOON};

/// What the application says; nobody may read it between the nodes.
const SECRET: &str = "a-secret-of-the-shop";
/// How long connections may take to end when an agent is replaced, as these tests install it.
const DRAIN: Duration = Duration::from_secs(10);

/// What is done; it asserts what the load may have seen.
type Phase = fn(&Bed);

#[test]
fn an_application_is_served_while_everything_around_it_changes() {
    let bed = Bed::up();
    let phases: &[(&str, Phase)] = &[
        ("rollout restart of the application", application_is_restarted),
        ("rollout restart of the controller", controller_is_restarted),
        ("restart of the kubelets", kubelets_are_restarted),
        ("evictions and a drain", a_node_is_drained),
        ("a Job", a_job_completes),
        ("controllers killed", controllers_are_killed),
        ("a controller cut off from the API server", a_controller_is_cut_off),
        ("rotation of the authority", authority_is_rotated),
        ("rollout restart of the agents", agents_are_restarted),
        ("reboot of a node", a_node_is_rebooted),
    ];
    for (name, phase) in phases {
        bed.begin(name);
        phase(&bed);
        bed.end(name);
    }
}

fn application_is_restarted(bed: &Bed) {
    bed.roll_out("shop", "deployment/web");
    bed.load.await_more(100);
    let seen = bed.seen();
    seen.assert_unharmed("rollout restart of the application");
    assert!(seen.left > 0, "no connection was asked to leave: nothing was restarted");
}

fn controller_is_restarted(bed: &Bed) {
    bed.roll_out(NAMESPACE, "deployment/nodemesh-controller");
    bed.await_agents_connected();
    bed.load.await_more(100);
    bed.seen().assert_unharmed("rollout restart of the controller");
}

fn kubelets_are_restarted(bed: &Bed) {
    // One after the other: a kubelet that starts calls pods not ready until it has probed them once, and of a Service
    // whose pods are all not ready Kubernetes says that nobody is there.
    for node in &bed.nodes {
        bed.cluster.kill_on_node(node, "kubelet").unwrap();
        // A pod that has to be started shows that it is at work again.
        bed.run_once(&format!("after-{node}"), node);
        bed.await_rolled_out("shop", "deployment/web");
    }
    bed.load.await_more(100);
    bed.seen().assert_unharmed("restart of the kubelets");
}

fn a_node_is_drained(bed: &Bed) {
    // By the API, one of two may go; the other may not until there is a new one.
    let pods = bed.pods_of("web");
    assert_eq!(pods.len(), 2, "{pods:?}");
    bed.evict(&pods[0]).unwrap();
    let error = bed.evict(&pods[1]).unwrap_err().to_string();
    assert!(error.contains("disruption budget"), "{error}");
    bed.await_rolled_out("shop", "deployment/web");

    let away = &bed.nodes[1];
    bed.kubectl(&[
        "drain",
        away,
        "--ignore-daemonsets",
        "--delete-emptydir-data",
        "--pod-selector=app!=walker",
        "--timeout=120s",
    ]);
    assert!(bed.pods_on("web", away).is_empty());
    bed.await_rolled_out("shop", "deployment/web");
    bed.load.await_more(100);
    bed.kubectl(&["uncordon", away]);
    // Back to both nodes.
    bed.roll_out("shop", "deployment/web");
    bed.await_rolled_out(NAMESPACE, "deployment/nodemesh-controller");
    bed.await_agents_connected();
    bed.load.await_more(100);
    bed.seen().assert_unharmed("evictions and a drain");
}

fn a_job_completes(bed: &Bed) {
    bed.job("accounts");
    let pod = bed.pods_of("accounts").remove(0);
    // It asked the service, and the mesh has let go of it.
    let events = until("its whole story is told", SOON, || {
        let events = bed.events(&pod);
        holds(events.contains("Enrolled"), || format!("{events:?}")).map(|()| events)
    });
    assert!(!events.contains("EnrolmentFailed"), "{events:?}");
    until("its pod says that it is not captured any more", SOON, || {
        let condition = bed.condition(&pod);
        holds(condition["status"] == "False" && condition["reason"] == "Ended", || condition.to_string())
    });
    bed.seen().assert_unharmed("a Job");
}

fn controllers_are_killed(bed: &Bed) {
    let before = bed.await_leader();
    let leader = before.holder_pod();
    let both: BTreeSet<String> = bed.controllers();
    assert!(both.len() == 2 && both.contains(&leader), "{both:?} {leader}");
    let policy = bed.watched_policy("first");
    policy.assert_written(2);

    bed.cluster.kill_pod(NAMESPACE, &leader).unwrap();
    let after = until("another one leads", Duration::from_secs(60), || {
        let after = bed.lease();
        holds(after.holder != before.holder && !after.holder.is_empty(), || format!("{after:?}"))
            .map(|()| after)
    });
    assert_eq!(after.transitions, before.transitions + 1, "it changed hands once");
    policy.change(8082);
    policy.await_accepted(2);
    policy.assert_written(4);
    assert_eq!(policy.writers(), ["nodemesh-controller"], "of its status");

    for controller in bed.controllers() {
        bed.cluster.kill_pod(NAMESPACE, &controller).unwrap();
    }
    bed.await_rolled_out(NAMESPACE, "deployment/nodemesh-controller");
    bed.await_agents_connected();
    bed.load.await_more(100);
    policy.assert_written(4);
    bed.seen().assert_unharmed("controllers killed");
}

fn a_controller_is_cut_off(bed: &Bed) {
    let (before, both) = (bed.await_leader(), bed.controllers());
    let alone = before.holder_pod();
    let other = both.iter().find(|it| **it != alone).unwrap();
    let policy = bed.watched_policy("second");
    policy.assert_written(2);
    let api = bed.cluster.names().unwrap().address(128, 1);
    let filter = |change: &str| {
        let rules = format!(
            "iptables -{change} OUTPUT -d {api} -j DROP && iptables -{change} INPUT -s {api} -j DROP"
        );
        bed.cluster.pod_netns(NAMESPACE, &alone).unwrap().shell(&rules).unwrap();
    };

    filter("I");
    let ready = |pod: &str, says: &str| {
        bed.kubectl(&[
            "--namespace",
            NAMESPACE,
            "wait",
            &format!("pod/{pod}"),
            &format!("--for=condition=Ready={says}"),
            "--timeout=60s",
        ]);
    };
    ready(&alone, "false");
    let metric = |name: &str| bed.controller_metrics(&alone).sum(name, &[]);
    assert_eq!(metric("nodemesh_controller_source_connected"), 0.0);
    until("it gives up leading before another one takes it", SOON, || {
        holds(metric("nodemesh_controller_leader") == 0.0, || "it leads".to_owned())
    });
    let after = until("another one leads", SOON, || {
        let after = bed.lease();
        holds(after.holder_pod() == *other, || format!("{after:?}")).map(|()| after)
    });
    assert_eq!(after.transitions, before.transitions + 1, "it changed hands once");
    until("agents go to the other one", SOON, || {
        let (here, there) = (bed.agents_of(&alone), bed.agents_of(other));
        holds(here.is_empty() && there == bed.nodes, || format!("{here:?} {there:?}"))
    });
    policy.change(8082);
    policy.await_accepted(2);
    policy.assert_written(4);
    bed.job("meanwhile");

    filter("D");
    ready(&alone, "true");
    until("it knows what has changed meanwhile", SOON, || {
        let [one, two] = [&alone, other].map(|it| bed.ask_controller(it, "/api/v1/policies"));
        holds(one == two && one.contains("8082"), || format!("{one} {two}"))
    });
    assert_eq!(bed.await_leader().holder, after.holder, "who leads goes on");
    policy.assert_written(4);
    assert_eq!(policy.writers(), ["nodemesh-controller"], "of its status");
    bed.load.await_more(100);
    bed.seen().assert_unharmed("a controller cut off from the API server");
}

fn authority_is_rotated(bed: &Bed) {
    let refused = bed.refused_for_certificates();
    bed.follow_docs("Look first");
    bed.follow_docs("A new intermediate");
    bed.job("under-another-intermediate");
    bed.load.await_more(50);
    bed.seen().assert_unharmed("a new intermediate");

    let old = bed.roots_of(bed.controllers().first().unwrap());
    let [old] = old.as_slice() else { panic!("one root: {old:?}") };
    bed.follow_docs("A new root");
    // Whichever controller is asked answers for the agents of both.
    for controller in bed.controllers() {
        until("nothing leads to the old root any more", Duration::from_secs(90), || {
            let answer = bed.certificates(&controller);
            let leading =
                answer["certificates"].as_array().unwrap().iter().filter(|it| it["root"] == old.as_str());
            let nodes: BTreeSet<&str> = answer["certificates"]
                .as_array()
                .unwrap()
                .iter()
                .filter_map(|it| it["node"].as_str())
                .collect();
            let whole = answer["silent"] == serde_json::json!([]) && nodes.len() == bed.nodes.len();
            holds(leading.count() == 0 && whole && bed.roots_of(&controller).len() == 2, || {
                format!("{answer:#}")
            })
        });
    }
    bed.load.await_more(50);
    bed.seen().assert_unharmed("a new root");

    // Connections of before were proven under the old root: they end with it, so they are let go in order before.
    bed.roll_out("shop", "deployment/web");
    bed.load.await_running(SOON);
    bed.follow_docs("The old root goes");
    for controller in bed.controllers() {
        until("the old root is gone", SOON, || {
            let roots = bed.roots_of(&controller);
            holds(roots.len() == 1 && roots[0] != *old, || format!("{roots:?}"))
        });
    }
    bed.job("under-another-root");
    bed.load.await_more(100);
    bed.seen().assert_unharmed("the old root gone");
    let now = bed.refused_for_certificates();
    assert_eq!(now, refused, "the walker's and the Jobs' too: {}", bed.told_of_certificates());
}

fn agents_are_restarted(bed: &Bed) {
    let logs = bed.logs_of_agents();
    bed.roll_out(NAMESPACE, "daemonset/nodemesh-agent");
    bed.load.await_more(100);
    let seen = bed.seen();
    seen.assert_served("rollout restart of the agents");
    assert!(!seen.lost.is_empty(), "long connections live for longer than agents drain");
    let young: Vec<_> = seen.lost.iter().filter(|lost| lost.age < DRAIN).collect();
    assert!(young.is_empty(), "lost before the deadline: {young:#?}");
    until("each that was cut has its reason in an access log", SOON, || {
        let cut = logs.cut_to_end();
        let silent: Vec<_> = seen.lost.iter().filter(|lost| !cut.contains(&lost.from)).collect();
        holds(silent.is_empty(), || format!("{} of {}: {silent:#?}", silent.len(), seen.lost.len()))
    });
}

fn a_node_is_rebooted(bed: &Bed) {
    let node = &bed.nodes[1];
    let mut between_nodes = bed.cluster.capture().unwrap();
    let mut assert_secret = || {
        let carries = |frame: &[u8]| frame.windows(SECRET.len()).any(|it| it == SECRET.as_bytes());
        // The API server writes the pods' specifications into etcd, on the loopback of the wire's machine.
        let crosses =
            |frame: &[u8]| wire::parse(frame).is_none_or(|packet| !packet.source.ip().is_loopback());
        let readable = between_nodes.sift(|frame| carries(frame) && crosses(frame)).unwrap();
        let readable: Vec<_> = readable.iter().map(|frame| wire::parse(frame)).collect();
        assert!(readable.is_empty(), "what nobody may read crossed the wire: {readable:#?}");
    };
    let before = bed.sandboxes_on(node).unwrap();
    bed.cluster.reboot(node).unwrap();
    until("all pods of the node run anew, and are captured", Duration::from_secs(150), || {
        assert_secret();
        let now = bed.sandboxes_on(node)?;
        let anew = now.keys().eq(before.keys()) && now.iter().all(|(pod, born)| before[pod] != *born);
        holds(anew, || format!("{before:?} {now:?}"))?;
        now.keys().try_for_each(|pod| bed.is_captured(node, pod))
    });
    until("a pod of that node is served again", SOON, || bed.ask_from("walker"));
    bed.await_rolled_out(NAMESPACE, "daemonset/nodemesh-agent");
    bed.await_rolled_out(NAMESPACE, "deployment/nodemesh-controller");
    bed.await_rolled_out("shop", "deployment/web");
    bed.await_agents_connected();
    bed.load.await_all_heard(SOON);
    eprintln!("meanwhile {}", bed.load.take());
    bed.load.await_more(200);
    bed.load.await_all_heard(SOON);
    assert_secret();
    bed.seen().assert_unharmed("after the reboot of a node");
}
