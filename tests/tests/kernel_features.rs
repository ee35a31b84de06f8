//! What the agent makes of the kernel that it finds: what it tells, and how it attaches where there is no TCX.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking, in its helpers too")]

use std::{path::PathBuf, process::Command};

use mesh_agent::{
    capture::{Attachment, Hook, Kernel, clsact::Filters},
    net::netns::Namespace,
};
use mesh_tests::{Workload, World, apps, attached, process};

/// Puts a filter beside ours that leaves the verdict to later ones: one instruction of classic BPF, `ret -1`.
const OF_ANOTHER: &str = "tc filter add dev eth0 ingress pref 7 bpf da bytecode '1,6 0 0 4294967295'";

/// A workload that is in no mesh, and programs with pins of their own that go to its interface as classic filters,
/// whatever the kernel.
struct Classic {
    world: World,
    web: Workload,
    namespace: Namespace,
    ifindex: u32,
    bpffs: PathBuf,
}

impl Classic {
    fn new(name: &str) -> Self {
        mesh_tests::world::mount_bpffs().unwrap();
        let world = World::builder()
            .node("a")
            .workload("shop/web", "a")
            .workload("shop/api", "a")
            .without_mesh()
            .build()
            .unwrap();
        let web = world.workload("web");
        let namespace = Namespace::open(&PathBuf::from("/run/netns").join(web.netns.name())).unwrap();
        let ifindex = web.shell("ip -o link show eth0").unwrap();
        let ifindex = ifindex.split(':').next().unwrap().trim().parse().unwrap();
        let bpffs = PathBuf::from(format!("/sys/fs/bpf/nodemesh-test-{name}-{}", std::process::id()));
        Self { world, web, namespace, ifindex, bpffs }
    }

    fn agent(&self) -> Kernel {
        Kernel::load_attaching(&self.bpffs, Attachment::Clsact).unwrap()
    }

    fn attach(&self, kernel: &mut Kernel, owner: &str) {
        for hook in [Hook::CaptureOutbound, Hook::CaptureInbound] {
            kernel.attach(owner, hook, &self.namespace, self.ifindex).unwrap();
        }
    }

    fn is_in_place(&self, kernel: &Kernel, owner: &str) -> bool {
        [Hook::CaptureOutbound, Hook::CaptureInbound]
            .iter()
            .all(|hook| kernel.is_in_place(owner, *hook, &self.namespace, self.ifindex))
    }

    fn filters(&self) -> usize {
        attached::programs(&self.web.netns, "eth0").unwrap().len()
    }

    fn has_qdisc(&self) -> bool {
        self.web.shell("tc qdisc show dev eth0").unwrap().contains("clsact")
    }
}

impl Drop for Classic {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.bpffs);
    }
}

#[test]
fn classic_filters_are_replaced_in_place_repaired_and_taken_away() {
    let it = Classic::new("replaced");
    let mut first = it.agent();
    assert!(!it.is_in_place(&first, "shop__web"));
    it.attach(&mut first, "shop__web");
    assert!(it.is_in_place(&first, "shop__web"));

    // The agent ends; its successor finds the filters by their records and takes their place.
    let mut next = it.agent();
    assert!(!it.is_in_place(&next, "shop__web"), "what is there is the first agent's");
    assert_eq!(next.owners().unwrap(), ["shop__web"]);
    it.attach(&mut next, "shop__web");
    assert!(it.is_in_place(&next, "shop__web") && !it.is_in_place(&first, "shop__web"));
    assert_eq!(it.filters(), 2, "replaced, not added");

    for program in attached::programs(&it.web.netns, "eth0").unwrap() {
        program.detach().unwrap();
        assert!(!it.is_in_place(&next, "shop__web"), "that it is gone is seen");
        it.attach(&mut next, "shop__web");
        assert!(it.is_in_place(&next, "shop__web"));
    }
    it.web.shell("tc qdisc del dev eth0 clsact").unwrap();
    it.attach(&mut next, "shop__web");
    assert!(it.is_in_place(&next, "shop__web"));
    for record in std::fs::read_dir(it.bpffs.join("filters")).unwrap().map(|record| record.unwrap().path()) {
        if !record.to_string_lossy().ends_with(":qdisc") {
            std::fs::remove_dir(record).unwrap();
        }
    }
    assert!(!it.is_in_place(&next, "shop__web"), "the next agent would not find it");
    it.attach(&mut next, "shop__web");
    assert!(it.is_in_place(&next, "shop__web"));

    // Another owner of the same place is the same filter, and the old one's end does not take it away.
    it.attach(&mut next, "shop__other");
    next.detach("shop__web").unwrap();
    assert!(it.is_in_place(&next, "shop__other"));
    assert_eq!(next.owners().unwrap(), ["shop__other"]);
    next.detach("shop__other").unwrap();
    assert_eq!((it.filters(), it.has_qdisc()), (0, false));
    assert!(next.owners().unwrap().is_empty());
}

#[test]
fn a_qdisc_and_filters_of_others_stay() {
    let it = Classic::new("others");
    it.web.shell("tc qdisc add dev eth0 clsact").unwrap();
    it.web.shell(OF_ANOTHER).unwrap();
    let mut kernel = it.agent();
    it.attach(&mut kernel, "shop__web");
    assert_eq!(it.filters(), 3);
    Filters::below(&it.bpffs).remove_all().unwrap();
    assert_eq!((it.filters(), it.has_qdisc()), (1, true));

    // One that we made stays for as long as somebody uses it.
    it.web.shell("tc qdisc del dev eth0 clsact").unwrap();
    it.attach(&mut kernel, "shop__web");
    it.web.shell(OF_ANOTHER).unwrap();
    kernel.detach("shop__web").unwrap();
    assert_eq!((it.filters(), it.has_qdisc()), (1, true));
}

#[test]
fn traffic_flows_while_classic_filters_are_replaced() {
    let it = Classic::new("traffic");
    let api = it.world.workload("api");
    let _app = api.serve(8080, apps::echo()).unwrap();
    let mut kernel = it.agent();
    for _ in 0..20 {
        it.attach(&mut kernel, "shop__web");
        assert_eq!(it.web.exchange(api.v4(8080), b"x").unwrap(), b"x");
    }
    kernel.detach("shop__web").unwrap();
}

#[test]
fn the_doctor_tells_what_the_kernel_has() {
    mesh_tests::world::mount_bpffs().unwrap();
    let output =
        Command::new(process::binaries().unwrap().join("mesh-agent")).arg("doctor").output().unwrap();
    let table = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success(), "{table}{}", String::from_utf8_lossy(&output.stderr));
    let line = |feature: &str| table.lines().find(|line| line.starts_with(feature)).unwrap_or_default();
    let here = |feature| line(feature).trim_start_matches(feature).split_whitespace().nth(1) == Some("yes");
    assert_eq!(here("TCX links"), attached::has_tcx(), "{table}");
    assert!(attached::has_tcx() || line("TCX links").contains("classic filters"), "{table}");
    assert!(here("BPF helpers") && here("BPF map types") && here("policy routing"), "{table}");
    assert!(table.contains("the kernel takes the programs"), "{table}");
}
