//! The two commands, as processes: what they print, and how they end.

// A test's unwrap is its failure.
#![allow(clippy::unwrap_used)]

mod world;

use std::{
    path::Path,
    process::{Command, Output, Stdio},
};

use world::{World, namespace, workload};

fn meshctl(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_meshctl")).args(arguments).output().unwrap()
}

async fn ask(world: &World, arguments: &[&str]) -> String {
    let url = world.admin_url();
    let arguments: Vec<String> =
        ["--controller", &url].iter().chain(arguments).map(|it| (*it).to_owned()).collect();
    let output = tokio::task::spawn_blocking(move || {
        meshctl(&arguments.iter().map(String::as_str).collect::<Vec<_>>())
    })
    .await
    .unwrap();
    assert!(output.status.success(), "{output:?}");
    String::from_utf8(output.stdout).unwrap()
}

#[tokio::test]
async fn meshctl_shows_what_is_in_force() {
    let service = "---\napiVersion: v1\nkind: Service\nmetadata: {name: web, namespace: shop}\nspec: {clusterIP: \
                   10.96.0.1, selector: {app: web}, ports: [{name: http, port: 80, targetPort: 8080}]}\n";
    let policy = "---\napiVersion: nodemesh.io/v1alpha1\nkind: AuthorizationPolicy\nmetadata: {name: no-db, \
                  namespace: shop}\nspec: {action: Deny, rules: [{from: [{addressBlocks: [10.0.0.2/32]}]}]}\n";
    let route = "---\napiVersion: gateway.networking.k8s.io/v1\nkind: HTTPRoute\nmetadata: {name: split, namespace: \
                 shop}\nspec: {parentRefs: [{group: '', kind: Service, name: front}, {group: '', kind: Service, name: \
                 none}], rules: [{matches: [{path: {value: /a}}], backendRefs: [{name: web, port: 80, weight: 3}, {name: \
                 no, port: 1}]}]}\n---\napiVersion: v1\nkind: Service\nmetadata: {name: front, namespace: shop}\nspec: \
                 {clusterIP: 10.96.0.2, ports: [{port: 80}]}\n";
    let world = World::start(&[
        ("ns.yaml", namespace("shop")),
        ("w.yaml", workload("web", "node-a", "10.0.0.1") + &workload("db", "node-b", "10.0.0.2")),
        ("s.yaml", service.to_owned() + policy),
        ("r.yaml", route.to_owned()),
        ("bad.yaml", workload("bad", "node-a", "nonsense")),
    ])
    .await;
    for (arguments, parts) in [
        (&["status"][..], &["trust domain td", "7 accepted, 1 refused", "bad.yaml:5", "never connected"][..]),
        (
            &["get", "workloads"],
            &[
                "shop/web",
                "spiffe://td/ns/shop/sa/web",
                "permissive (default)",
                "pending",
                "has not reported",
            ],
        ),
        (&["get", "services"], &["shop/web", "10.96.0.1", "http", "80", "shop/web 10.0.0.1:8080"]),
        (
            &["get", "policies"],
            &["shop/no-db", "Deny", "from address in 10.0.0.2/32 to any port", "all of the namespace"],
        ),
        (
            &["get", "routes"],
            &[
                "shop/split",
                "HTTPRoute",
                "shop/front",
                "shop/none: NoMatchingParent",
                "/a/* -> shop/web:80 weight 3, shop/no:1 weight 1",
                "spec.rules[0].backendRefs[1]: there is no Service shop/no",
            ],
        ),
        (
            &["why", "shop/db", "shop/front:80", "--request", "GET /a/b", "-H", "x: y"],
            &["HTTPRoute shop/split spec.rules[0]", "policy_deny", "no_backend"],
        ),
        (
            &["why", "shop/db", "shop/web:80"],
            &["identify", "REFUSED", "shop/no-db[0]", "policy_deny", "to change it"],
        ),
        (
            &["--output", "json", "why", "shop/web", "10.0.0.2:5432"],
            &["\"verdict\": \"allowed\"", "\"steps\""],
        ),
        (&["--output", "json", "get", "workloads"], &["\"identity\": \"spiffe://td/ns/shop/sa/db\""]),
    ] {
        let text = ask(&world, arguments).await;
        for part in parts {
            assert!(text.contains(part), "{part} is not in the answer to {arguments:?}:\n{text}");
        }
    }
    for path in ["/healthz", "/readyz"] {
        assert!(world.get(path).await.starts_with("HTTP/1.1 200"));
    }
    world.stop().await;
}

#[test]
fn check_needs_no_controller_and_ends_with_1_when_something_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("a.yaml"), workload("web", "node-a", "10.0.0.1")).unwrap();
    let path = dir.path().to_str().unwrap();
    let good = meshctl(&["check", path]);
    assert_eq!(good.status.code(), Some(0), "{good:?}");
    assert!(String::from_utf8_lossy(&good.stdout).contains("1 accepted, 0 refused"));
    std::fs::write(dir.path().join("b.yaml"), workload("web", "node-a", "x").replace("node:", "nod:"))
        .unwrap();
    let bad = meshctl(&["check", path]);
    assert_eq!(bad.status.code(), Some(1), "{bad:?}");
    let text = String::from_utf8_lossy(&bad.stdout).into_owned();
    assert!(
        text.contains("b.yaml:5: Workload shop/web: spec.nod: ") && text.contains("did you mean 'node'"),
        "{text}"
    );
}

#[test]
fn check_warns_of_what_is_legal_and_suspicious_and_fails_for_it_when_told_to() {
    let dir = tempfile::tempdir().unwrap();
    let policy = "---\napiVersion: nodemesh.io/v1alpha1\nkind: AuthorizationPolicy\nmetadata:\n  name: p\n  namespace: \
                  shop\nspec:\n  action: Allow\n  selector:\n    matchLabels: {app: wob}\n";
    let text = namespace("shop") + &workload("web", "node-a", "10.0.0.1") + policy;
    std::fs::write(dir.path().join("a.yaml"), &text).unwrap();
    let path = dir.path().to_str().unwrap();
    let warned = meshctl(&["check", path]);
    assert_eq!(warned.status.code(), Some(0), "{warned:?}");
    let said = String::from_utf8_lossy(&warned.stdout).into_owned();
    let line = text.lines().position(|it| it.contains("wob")).unwrap() + 1;
    let expected =
        format!("a.yaml:{line}: AuthorizationPolicy shop/p: spec.selector: it selects no workload");
    assert!(said.contains(&expected) && said.contains("did you mean 'web'"), "{expected} is not in {said}");
    let strict = meshctl(&["--output", "json", "check", "--strict", path]);
    assert_eq!(strict.status.code(), Some(1), "{strict:?}");
    let json: serde_json::Value = serde_json::from_slice(&strict.stdout).unwrap();
    assert_eq!((&json["accepted"], &json["warnings"][0]["line"]), (&3.into(), &line.into()), "{json}");
}

#[test]
fn errors_say_what_to_do() {
    let unreachable = meshctl(&["--controller", "http://127.0.0.1:1", "status"]);
    assert_eq!(unreachable.status.code(), Some(2));
    let text = String::from_utf8_lossy(&unreachable.stderr).into_owned();
    assert!(text.contains("cannot reach the controller at http://127.0.0.1:1"), "{text}");
    let missing = meshctl(&["check", "/nowhere/at/all"]);
    assert_eq!(missing.status.code(), Some(2), "{missing:?}");
}

#[tokio::test]
async fn the_log_level_is_changed_while_the_controller_runs() {
    let world = World::start(&[]).await;
    assert_eq!(ask(&world, &["log-level", "controller"]).await, "info\n");
    assert_eq!(
        ask(&world, &["log-level", "controller", "warn,mesh_controller::api=debug"]).await,
        "warn,mesh_controller::api=debug\n"
    );
    assert_eq!(ask(&world, &["log-level", "controller"]).await, "warn,mesh_controller::api=debug\n");
    world.stop().await;
}

/// Nothing of what the controller keeps secret is in the archive: no key, no token, in no encoding that it has.
#[tokio::test]
async fn a_bundle_has_what_helps_and_no_secret() {
    use std::io::Read;
    let world =
        World::start(&[("ns.yaml", namespace("shop")), ("w.yaml", workload("web", "node-a", "10.0.0.1"))])
            .await;
    let token = world.token("node-a", std::time::Duration::from_secs(60));
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("b.tar.gz");
    let said = ask(&world, &["--agent", "http://127.0.0.1:1", "bundle", file.to_str().unwrap()]).await;
    assert!(said.contains("written; missing.txt"), "{said}");
    let mut archive = tar::Archive::new(flate2::read::GzDecoder::new(std::fs::File::open(&file).unwrap()));
    let mut all = String::new();
    for entry in archive.entries().unwrap() {
        let mut entry = entry.unwrap();
        all += &format!("== {}\n", entry.path().unwrap().display());
        entry.read_to_string(&mut all).unwrap();
    }
    for part in [
        "controller/status.json",
        "spiffe://td/ns/shop/sa/web",
        "nodemesh_documents",
        "Linux version",
        "agent /metrics: cannot reach",
    ] {
        assert!(all.contains(part), "{part} is not in\n{all}");
    }
    let secrets = world.secrets();
    assert!(secrets.len() > 1, "the authority's keys are among them");
    for secret in secrets.iter().map(String::as_str).chain([
        "PRIVATE KEY",
        token.as_str(),
        token.split('.').nth(2).unwrap(),
    ]) {
        assert!(!all.contains(secret), "a secret is in the bundle");
    }
    world.stop().await;
}

#[test]
fn completions_and_help_name_every_command() {
    let script = meshctl(&["completion", "bash"]);
    let text = String::from_utf8(script.stdout).unwrap();
    for command in ["status", "certificates", "connections", "log-level", "bundle", "check", "why"] {
        assert!(text.contains(command), "{command} is not in the completion");
    }
}

fn controller(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_mesh-controller"));
    command.args(arguments);
    command
}

#[test]
fn a_token_is_one_line_and_pins_the_root() {
    let state = tempfile::tempdir().unwrap();
    let dir = state.path().join("state");
    let dir = dir.to_str().unwrap();
    let token = |node: &str| {
        let output =
            controller(&["token", "--state-dir", dir, "--node", node, "--ttl", "90s"]).output().unwrap();
        assert!(output.status.success(), "{output:?}");
        String::from_utf8(output.stdout).unwrap()
    };
    let (one, other) = (token("node-a"), token("node-b"));
    assert!(one.starts_with("nm1.node-a.") && one.lines().count() == 1, "{one}");
    let pinned = |token: &str| token.trim().rsplit('.').next().map(ToOwned::to_owned);
    assert_eq!(pinned(&one), pinned(&other));
    assert!(controller(&["rotate-root", "--state-dir", dir]).status().unwrap().success());
    assert_ne!(pinned(&one), pinned(&token("node-c")));
}

#[test]
fn the_controller_starts_says_where_it_listens_and_ends_clean_on_sigterm() {
    use std::io::{BufRead, BufReader};
    let (source, state) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let path = |dir: &tempfile::TempDir| dir.path().to_str().unwrap().to_owned();
    let mut child = controller(&["run", "--source", &path(&source), "--state-dir", &path(&state)])
        .args(["--listen", "127.0.0.1:0", "--admin-listen", "127.0.0.1:0", "--certificate-ttl", "90s"])
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(child.stderr.take().unwrap()).lines();
    let ready = lines.by_ref().map(Result::unwrap).find(|line| line.contains("controller is ready")).unwrap();
    assert!(ready.contains("127.0.0.1:"), "{ready}");
    let pid = nix::unistd::Pid::from_raw(child.id().try_into().unwrap());
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM).unwrap();
    lines.map(Result::unwrap).for_each(drop);
    assert!(child.wait().unwrap().success());
}

#[test]
fn what_keeps_it_from_starting_is_said_with_its_cure() {
    let state = tempfile::tempdir().unwrap();
    let run = |source: &Path| {
        let arguments =
            ["run", "--source", source.to_str().unwrap(), "--state-dir", state.path().to_str().unwrap()];
        let output = controller(&arguments)
            .args(["--listen", "127.0.0.1:0", "--admin-listen", "127.0.0.1:0"])
            .output()
            .unwrap();
        assert_eq!(output.status.code(), Some(1));
        String::from_utf8_lossy(&output.stderr).into_owned()
    };
    let text = run(Path::new("/nowhere/at/all"));
    assert!(text.contains("/nowhere/at/all") && text.contains("--source"), "{text}");
    std::fs::create_dir(state.path().join("ca")).unwrap();
    std::fs::write(state.path().join("ca/authority.json"), "{").unwrap();
    let text = run(state.path());
    assert!(text.contains("authority.json is damaged") && text.contains("backup"), "{text}");
}
