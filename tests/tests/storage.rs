//! Disks that are full, read-only or not ours to write: a state that says so, nothing in force lost, and everything saved
//! once there is room.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking, in its helpers too")]

use std::{
    fs,
    io::Write,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use mesh_tests::{
    Workload, WorkloadSpec, World, apps, metrics::Metrics, until, wait::holds, workload::TIMEOUT,
};
use serde_json::Value;

/// Until what could not be saved is tried again: every 10 s, and the machine's load.
const RETRIED: Duration = Duration::from_secs(30);

fn run(line: &str) {
    let output = Command::new("sh").arg("-ec").arg(line).output().unwrap();
    assert!(output.status.success(), "{line}: {output:?}");
}

/// A small disk in place of a directory whose owner does not run, with what was in it.
struct Disk {
    at: PathBuf,
}

impl Disk {
    fn instead_of(directory: &Path) -> Self {
        let at = directory.to_str().unwrap();
        run(&format!(
            "cp -a {at} {at}.copy; mount -t tmpfs -o size=1m,mode=0700 nodemesh-test {at}; cp -a {at}.copy/. {at}/; \
             rm -rf {at}.copy"
        ));
        Self { at: directory.to_owned() }
    }

    fn spoil(&self, how: Trouble) {
        match how {
            Trouble::Full => {
                let mut filler = fs::File::create(self.at.join("filler")).unwrap();
                while filler.write_all(&[0; 4096]).is_ok() {}
            }
            // Another mount of the same: the one below has files that are open for writing.
            Trouble::ReadOnly => {
                let at = self.at.display();
                run(&format!("mount --bind {at} {at}; mount -o remount,bind,ro {at}"));
            }
            Trouble::Forbidden => self.mode(0),
        }
    }

    fn cure(&self, how: Trouble) {
        match how {
            Trouble::Full => fs::remove_file(self.at.join("filler")).unwrap(),
            Trouble::ReadOnly => run(&format!("umount {}", self.at.display())),
            Trouble::Forbidden => self.mode(0o700),
        }
    }

    fn mode(&self, mode: u32) {
        fs::set_permissions(&self.at, fs::Permissions::from_mode(mode)).unwrap();
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.at).output();
    }
}

/// What is wrong with a disk.
#[derive(Debug, Clone, Copy)]
enum Trouble {
    Full,
    ReadOnly,
    Forbidden,
}

impl Trouble {
    /// Part of what is said of it: the system's words, or the cure.
    fn says(self) -> &'static str {
        match self {
            Self::Full => "No space left",
            Self::ReadOnly => "Read-only file system",
            Self::Forbidden => "Permission denied",
        }
    }
}

const ALL: [Trouble; 3] = [Trouble::Full, Trouble::ReadOnly, Trouble::Forbidden];

fn sum(metrics: anyhow::Result<Metrics>, name: &str, labels: &[(&str, &str)]) -> Result<f64, String> {
    Ok(metrics.map_err(|error| format!("{error:#}"))?.sum(name, labels))
}

#[track_caller]
fn exchange(from: &Workload, to: &Workload) {
    for address in to.both(8080) {
        assert_eq!(from.exchange(address, b"over the mesh").unwrap(), b"over the mesh");
    }
}

#[test]
fn an_agent_without_a_disk_goes_on_says_so_and_saves_when_it_can() {
    let world = World::shop().build().unwrap();
    let (web, db) = (world.workload("web"), world.workload("db"));
    let _app = db.serve(8080, apps::echo()).unwrap();
    let agent = world.agent("a");
    agent.kill().unwrap();
    let disk = Disk::instead_of(agent.run_dir());
    agent.start().unwrap();
    agent.await_ready().unwrap();
    exchange(&web, &db);
    let version = || agent.state().unwrap()["view_version"].clone();
    let unsaved = |file| sum(agent.metrics(), "nodemesh_state_unsaved", &[("file", file)]);
    for (trouble, number) in ALL.into_iter().zip(0..) {
        let before = version();
        disk.spoil(trouble);
        // A change of the view: another workload, on the other node.
        let spec = WorkloadSpec::new(&format!("shop/new{number}"), "b");
        let new = world.add_workload(&spec).unwrap();
        let _server = new.serve(8080, apps::echo()).unwrap();
        until("it is known to be unsaved", RETRIED, || {
            let unsaved = unsaved("view")?;
            holds(unsaved == 1.0, || format!("{trouble:?}: {unsaved}"))
        });
        world.await_tunnel(&web, &new).unwrap();
        exchange(&web, &new);
        exchange(&web, &db);
        assert_ne!(version(), before, "{trouble:?}: what came meanwhile is in force");
        let problems = agent.state().unwrap()["problems"].to_string();
        assert!(problems.contains("not saved") && problems.contains(trouble.says()), "{problems}");
        until("the controller's status says it", TIMEOUT, || {
            let status = world.meshctl(&["status"]).map_err(|error| format!("{error:#}"))?.stdout;
            holds(status.contains("PROBLEM on a: the view is in force and not saved"), || status)
        });
        disk.cure(trouble);
        until("it is saved", RETRIED, || {
            let unsaved = unsaved("view")?;
            holds(unsaved == 0.0, || format!("{trouble:?}: {unsaved}"))
        });
        assert_eq!(agent.state().unwrap()["problems"].to_string(), "[]", "{trouble:?}");
    }
    // What was saved afterwards is what the next agent has, without a controller.
    let newest = version();
    world.controller().kill().unwrap();
    agent.kill().unwrap();
    agent.start().unwrap();
    agent.await_ready().unwrap();
    assert_eq!(version(), newest);
    agent.await_enrolled(2, TIMEOUT).unwrap();
    exchange(&web, &db);
    agent.kill().unwrap();
}

#[test]
fn a_controller_without_a_disk_goes_on_says_so_and_saves_when_it_can() {
    let world = World::shop().build().unwrap();
    let db = world.workload("db");
    let controller = world.controller();
    controller.kill().unwrap();
    let disk = Disk::instead_of(controller.state());
    controller.start().unwrap();
    let unsaved = |part| sum(controller.metrics(), "nodemesh_controller_state_unsaved", &[("part", part)]);
    let roots = sum(controller.metrics(), "nodemesh_root_expiry_seconds", &[]).unwrap();
    assert!(roots > 2e9, "the root's end is counted: {roots}");
    for (trouble, number) in ALL.into_iter().zip(0..) {
        disk.spoil(trouble);
        // Something to save: the agent's word about a workload; something to sign: its certificate.
        let new = world.add_workload(&WorkloadSpec::new(&format!("shop/new{number}"), "a")).unwrap();
        until("the word is known to be unsaved", RETRIED, || {
            let unsaved = unsaved("reports")?;
            holds(unsaved == 1.0, || format!("{trouble:?}: {unsaved}"))
        });
        world.await_tunnel(&new, &db).unwrap();
        let status = world.meshctl(&["status"]).unwrap().stdout;
        assert!(status.contains("PROBLEM what agents said") && status.contains(trouble.says()), "{status}");
        disk.cure(trouble);
        until("everything is saved", RETRIED, || {
            let unsaved = sum(controller.metrics(), "nodemesh_controller_state_unsaved", &[])?;
            holds(unsaved == 0.0, || format!("{trouble:?}: {unsaved}"))
        });
    }

    // The authority's file is damaged while it runs: it goes on signing with what it has.
    let file = controller.state().join("ca/authority.json");
    let good = fs::read(&file).unwrap();
    fs::write(&file, &good[..good.len() / 2]).unwrap();
    until("the damage is known", TIMEOUT, || {
        let unusable = unsaved("authority")?;
        holds(unusable == 1.0, || unusable.to_string())
    });
    let new = world.add_workload(&WorkloadSpec::new("shop/late", "a")).unwrap();
    world.await_tunnel(&new, &db).unwrap();
    let status: Value =
        serde_json::from_str(&world.meshctl(&["--output", "json", "status"]).unwrap().stdout).unwrap();
    assert!(status["problems"].to_string().contains("restore it from a backup"), "{status}");
    fs::write(&file, good).unwrap();
    until("it is whole again", TIMEOUT, || {
        let unusable = unsaved("authority")?;
        holds(unusable == 0.0, || unusable.to_string())
    });

    // A start from what was saved while it could be: nothing that agents said is lost.
    controller.kill().unwrap();
    controller.start().unwrap();
    world.await_tunnel(&new, &db).unwrap();
    controller.kill().unwrap();
}
