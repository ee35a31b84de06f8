//! The systemd units, as systemd reads them.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking, in its helpers too")]

use std::{fs, path::Path, process::Command};

use mesh_agent::privileges::NEEDED;

/// A unit's text, and what `systemd-analyze verify` says of it. Its program is another's, as this machine may not have it.
fn verified(name: &str) -> (String, String) {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/systemd").join(name);
    let text = fs::read_to_string(source).unwrap();
    let directory = std::env::temp_dir().join(format!("nodemesh-units-{}-{name}", std::process::id()));
    fs::create_dir_all(&directory).unwrap();
    let line = |line: &str| {
        if line.starts_with("ExecStart=") { "ExecStart=/bin/true" } else { line }.to_owned() + "\n"
    };
    fs::write(directory.join(name), text.lines().map(line).collect::<String>()).unwrap();
    let output = Command::new("systemd-analyze").arg("verify").arg(directory.join(name)).output();
    fs::remove_dir_all(&directory).unwrap();
    let output = output.expect("systemd-analyze is there: cargo xtask setup installs it");
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{said}");
    (text, said)
}

#[test]
fn systemd_takes_the_units_without_a_complaint() {
    for name in ["nodemesh-agent.service", "nodemesh-agent@.service", "nodemesh-controller.service"] {
        let (_, said) = verified(name);
        assert!(!said.contains(name), "{said}");
    }
}

#[test]
fn the_units_give_no_more_than_the_programs_keep() {
    let (agent, _) = verified("nodemesh-agent.service");
    let line = agent.lines().find_map(|line| line.strip_prefix("CapabilityBoundingSet=")).unwrap();
    let mut given: Vec<&str> = line.split(' ').filter(|it| *it != "CAP_SETPCAP").collect();
    given.sort_unstable();
    let mut kept: Vec<String> = NEEDED.iter().map(|(capability, _)| capability.to_string()).collect();
    kept.sort_unstable();
    assert_eq!(given, kept, "CAP_SETPCAP is what dropping takes; the rest is what stays");
    let (controller, _) = verified("nodemesh-controller.service");
    assert!(controller.lines().any(|line| line == "CapabilityBoundingSet="), "the controller needs none");
}

/// Two agents that replace each other share what is handed over, and nothing else.
#[test]
fn a_pair_of_agents_is_the_single_unit_in_two_control_groups() {
    let [single, pair] = ["nodemesh-agent.service", "nodemesh-agent@.service"].map(|name| verified(name).0);
    let settings = |text: &str| -> Vec<String> {
        let wanted = |line: &&str| {
            !line.is_empty() && !line.starts_with(['#', '[']) && !line.starts_with("Description=")
        };
        text.lines().filter(wanted).map(str::to_owned).collect()
    };
    let (single, mut pair) = (settings(&single), settings(&pair));
    // A template's instances would be in a slice of their own, and not where the agent is told that it is.
    pair.retain(|line| line != "Slice=system.slice");
    assert_eq!(single, pair);
    for line in [
        "Environment=NODEMESH_AGENT_CGROUP=system.slice/%n/agent",
        "RuntimeDirectory=nodemesh",
        "RuntimeDirectoryPreserve=yes",
    ] {
        assert!(pair.iter().any(|it| it == line), "{line} is what a take-over rests on");
    }
}
