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

use super::{Families, Options};

/// The bridge in the control plane's namespace.
const WIRE: &str = "wire";

/// Makes namespaces, links, addresses and routes. Every machine and this one reach all pods and services.
pub(super) fn make(names: Names, options: Options) -> Result<()> {
    make_ipv4(names)?;
    if options.families == Families::Dual { add_ipv6(names) } else { Ok(()) }
}

fn make_ipv4(names: Names) -> Result<()> {
    let control = NetNs::create(&names.machine(Machine::Control), false)?;
    let address = names.of_machine(Machine::Control);
    control.ip(&format!(
        "link add {WIRE} type bridge\naddr add {address}/24 dev {WIRE}\nlink set {WIRE} up\n"
    ))?;
    for node in NODES {
        plug_in(names, node)?;
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

/// The same with IPv6, on the links that are there.
fn add_ipv6(names: Names) -> Result<()> {
    let control = NetNs::open(&names.machine(Machine::Control))?;
    let address = names.of_machine6(Machine::Control);
    let services = format!("route add {} via {}\n", names.services6(), names.of_machine6(NODES[0]));
    control.ip(&format!("addr add {address}/64 dev {WIRE} nodad\n{}{services}", routes6(names, None)))?;
    for node in NODES {
        plug_in6(names, node)?;
    }
    let here = format!("addr add {}/64 dev {} nodad\n", names.of_host6(), names.prefix());
    run(Command::new("ip").args(["-batch", "-"]), Some(&(here + &routes6(names, None) + &services)))?;
    Ok(())
}

/// A node's part of it.
fn plug_in6(names: Names, node: Machine) -> Result<()> {
    let inside = NetNs::open(&names.machine(node))?;
    inside.sysctl("net/ipv6/conf/all/forwarding", "1")?;
    inside.ip(&format!(
        "addr add {}/64 dev eth0 nodad\nroute add default via {}\n{}",
        names.of_machine6(node),
        names.of_machine6(Machine::Control),
        routes6(names, Some(node))
    ))
}

fn routes6(names: Names, own: Option<Machine>) -> String {
    let others = (0..).zip(NODES).filter(|(_, node)| Some(*node) != own);
    others
        .map(|(index, node)| format!("route add {} via {}\n", names.pods_of6(index), names.of_machine6(node)))
        .collect()
}

/// Makes the namespace and the link of a node that was switched off.
pub(super) fn plug_in_again(names: Names, node: Machine, options: Options) -> Result<()> {
    plug_in(names, node)?;
    if options.families == Families::Dual { plug_in6(names, node) } else { Ok(()) }
}

/// Makes a node's namespace, and its link to the wire.
fn plug_in(names: Names, node: Machine) -> Result<()> {
    let control = NetNs::open(&names.machine(Machine::Control))?;
    let name = names.machine(node);
    let inside = NetNs::create(&name, false)?;
    inside.sysctl("net/ipv4/ip_forward", "1")?;
    control.ip(&format!(
        "link add {node} type veth peer name eth0 netns {name}\nlink set {node} master {WIRE}\nlink set {node} up\n"
    ))?;
    // The rest of the world is behind the control plane, which forwards nothing.
    inside.ip(&format!(
        "addr add {}/24 dev eth0\nlink set eth0 up\nroute add default via {}\n",
        names.of_machine(node),
        names.of_machine(Machine::Control)
    ))?;
    inside.ip(&routes(names, Some(node)))
}

/// Takes a node's link off the wire, with all that is on its way.
pub(super) fn unplug(names: Names, node: Machine) -> Result<()> {
    NetNs::open(&names.machine(Machine::Control))?.ip(&format!("link delete {node}\n"))
}

/// To the pods of all nodes but one's own.
fn routes(names: Names, own: Option<Machine>) -> String {
    let others = (0..).zip(NODES).filter(|(_, node)| Some(*node) != own);
    others
        .map(|(index, node)| format!("route add {} via {}\n", names.pods_of(index), names.of_machine(node)))
        .collect()
}
