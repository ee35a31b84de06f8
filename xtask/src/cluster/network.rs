//! The wire between a cluster's machines, and the way there from the machine that all runs on.
//!
//! The wire is a bridge inside the control plane's namespace, not of this machine: what filters forwarded packets here
//! (Docker's rules do) sees nothing of the cluster.

use std::process::Command;

use anyhow::Result;
use mesh_tests::{
    cluster::names::{Machine, NODES, Names},
    netns::{NetNs, run},
};

/// The bridge in the control plane's namespace.
const WIRE: &str = "wire";

/// Makes namespaces, links, addresses and routes. Every machine and this one reach all pods and services.
pub(super) fn make(names: Names) -> Result<()> {
    let control = NetNs::create(&names.machine(Machine::Control), false)?;
    let address = names.of_machine(Machine::Control);
    control.ip(&format!(
        "link add {WIRE} type bridge\naddr add {address}/24 dev {WIRE}\nlink set {WIRE} up\n"
    ))?;
    for node in NODES {
        let name = names.machine(node);
        let inside = NetNs::create(&name, false)?;
        inside.sysctl("net/ipv4/ip_forward", "1")?;
        control.ip(&format!(
            "link add {node} type veth peer name eth0 netns {name}\nlink set {node} master {WIRE}\nlink set {node} up\n"
        ))?;
        // The rest of the world is behind the control plane, which forwards nothing.
        inside.ip(&format!(
            "addr add {}/24 dev eth0\nlink set eth0 up\nroute add default via {address}\n",
            names.of_machine(node)
        ))?;
        inside.ip(&routes(names, Some(node)))?;
    }
    control.ip(&routes(names, None))?;
    control.ip(&format!("route add {} via {}\n", names.services(), names.of_machine(NODES[0])))?;

    let here = names.prefix();
    run(
        Command::new("ip").args(["-batch", "-"]),
        Some(&format!(
            "link add {here} type veth peer name host netns {}\naddr add {}/24 dev {here}\nlink set {here} up\n",
            names.machine(Machine::Control),
            names.of_host(),
        )),
    )?;
    control.ip(&format!("link set host master {WIRE}\nlink set host up\n"))?;
    let services = format!("route add {} via {}\n", names.services(), names.of_machine(NODES[0]));
    run(Command::new("ip").args(["-batch", "-"]), Some(&(routes(names, None) + &services)))?;
    Ok(())
}

/// To the pods of all nodes but one's own.
fn routes(names: Names, own: Option<Machine>) -> String {
    let others = (0..).zip(NODES).filter(|(_, node)| Some(*node) != own);
    others
        .map(|(index, node)| format!("route add {} via {}\n", names.pods_of(index), names.of_machine(node)))
        .collect()
}
