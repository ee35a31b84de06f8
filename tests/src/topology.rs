//! Addresses and links: a wire with a bridge, nodes with an uplink to it, workloads behind their node in one of the
//! shapes that CNI plugins make.
//!
//! World 3: the wire is 172.30.3.0/24, node 1's workloads are 10.3.1.0/24 from .2 on, services 10.3.250.0/24; IPv6
//! beside each. Everything follows from the world's number, the node's place and the workload's place on its node.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use anyhow::Result;

use crate::netns::NetNs;

/// How a workload hangs on its node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Shape {
    /// A routed veth: a host route per workload on the node, a link-local gateway that the node answers for
    /// (Calico, and Cilium's default).
    Routed,
    /// A veth in a bridge of the node, whose frames pass iptables by br_netfilter (bridge, flannel, kubenet).
    Bridge,
}

/// Node's end of the gateway that routed workloads have: answered by proxy ARP, never an address of anyone.
const GATEWAY_V4: &str = "169.254.1.1";
/// The same for IPv6: every node's end of a veth has it.
const GATEWAY_V6: &str = "fe80::1";
/// First host number of workloads; below is the gateway.
const FIRST_HOST: u8 = 2;
/// The bridge of a node in [`Shape::Bridge`].
pub const NODE_BRIDGE: &str = "cbr0";
/// The bridge of the wire.
pub const WIRE_BRIDGE: &str = "br0";
/// Longest name of a network device, `IFNAMSIZ` less the NUL.
const DEVICE_NAME_MAX: usize = 15;
/// Third octet of virtual addresses.
const SERVICES: u8 = 250;
/// Last octet of the controller and of the wire itself on the wire.
const CONTROLLER: u8 = 254;
const OUTSIDE: u8 = 253;

/// The address plan of one world.
#[derive(Debug, Clone, Copy)]
pub struct Plan {
    /// The world's number.
    pub world: u8,
}

/// An address of each family.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pair {
    /// IPv4.
    pub v4: Ipv4Addr,
    /// IPv6.
    pub v6: Ipv6Addr,
}

impl Pair {
    /// Both, as text, IPv4 first.
    pub fn texts(&self) -> Vec<String> {
        vec![self.v4.to_string(), self.v6.to_string()]
    }

    /// Both, IPv4 first.
    pub fn both(&self) -> [IpAddr; 2] {
        [self.v4.into(), self.v6.into()]
    }
}

impl Plan {
    fn on_wire(self, host: u8) -> Pair {
        Pair {
            v4: Ipv4Addr::new(172, 30, self.world, host),
            v6: Ipv6Addr::new(0xfd6f, u16::from(self.world), 0, 0, 0, 0, 0, u16::from(host)),
        }
    }

    fn in_range(self, range: u8, host: u8) -> Pair {
        Pair {
            v4: Ipv4Addr::new(10, self.world, range, host),
            v6: Ipv6Addr::new(0xfd6e, u16::from(self.world), u16::from(range), 0, 0, 0, 0, u16::from(host)),
        }
    }

    /// The controller.
    pub fn controller(self) -> Pair {
        self.on_wire(CONTROLLER)
    }

    /// The wire itself: the nodes' default gateway, and a client from outside of all nodes.
    pub fn outside(self) -> Pair {
        self.on_wire(OUTSIDE)
    }

    /// A node, by its place from 1.
    pub fn node(self, node: u8) -> Pair {
        self.on_wire(node)
    }

    /// A workload, by its node and its place there from 0.
    pub fn workload(self, node: u8, place: u8) -> Pair {
        self.in_range(node, FIRST_HOST + place)
    }

    /// A service, by its place from 0.
    pub fn service(self, place: u8) -> Pair {
        self.in_range(SERVICES, FIRST_HOST + place)
    }

    fn workloads_of(self, node: u8) -> [String; 2] {
        let base = self.in_range(node, 0);
        [format!("{}/24", base.v4), format!("{}/64", base.v6)]
    }

    fn node_gateway(self, node: u8) -> Pair {
        self.in_range(node, 1)
    }
}

/// What a node's end of a workload's veth is called.
pub fn device(workload: &str, address: Pair) -> String {
    let name = format!("pod-{workload}");
    if name.len() <= DEVICE_NAME_MAX { name } else { format!("pod-{}", address.v4.octets()[3]) }
}

/// The wire: one bridge, with an address of its own and routes to every node's workloads.
pub fn lay_wire(wire: &NetNs, plan: Plan) -> Result<()> {
    for key in ["net/ipv4/ip_forward", "net/ipv6/conf/all/forwarding"] {
        wire.sysctl(key, "1")?;
    }
    let own = plan.outside();
    wire.ip(&format!(
        "link add name {WIRE_BRIDGE} type bridge\nlink set dev {WIRE_BRIDGE} up\n\
         addr add {}/24 dev {WIRE_BRIDGE}\naddr add {}/64 dev {WIRE_BRIDGE} nodad\n",
        own.v4, own.v6
    ))
}

/// Hangs a namespace on the wire by a device `uplink`, with the wire as default gateway.
pub fn hang(wire: &NetNs, ns: &NetNs, port: &str, address: Pair, plan: Plan) -> Result<()> {
    wire.ip(&format!(
        "link add name {port} type veth peer name uplink netns {}\nlink set dev {port} master {WIRE_BRIDGE} up\n",
        ns.name()
    ))?;
    let gateway = plan.outside();
    ns.ip(&format!(
        "addr add {}/24 dev uplink\naddr add {}/64 dev uplink nodad\nlink set uplink up\n\
         route add default via {}\nroute add default via {}\n",
        address.v4, address.v6, gateway.v4, gateway.v6
    ))
}

/// Makes a node forward, and its shape's gateway.
pub fn lay_node(ns: &NetNs, plan: Plan, node: u8, shape: Shape) -> Result<()> {
    for key in ["net/ipv4/ip_forward", "net/ipv6/conf/all/forwarding"] {
        ns.sysctl(key, "1")?;
    }
    // What kube-proxy does on every node: loads conntrack, and drops what it finds out of window.
    ns.shell("iptables -A FORWARD -m conntrack --ctstate INVALID -j DROP")?;
    match shape {
        Shape::Routed => Ok(()),
        Shape::Bridge => {
            for key in ["net/bridge/bridge-nf-call-iptables", "net/bridge/bridge-nf-call-ip6tables"] {
                ns.sysctl(key, "1")?;
            }
            let gateway = plan.node_gateway(node);
            ns.ip(&format!(
                "link add name {NODE_BRIDGE} type bridge\nlink set dev {NODE_BRIDGE} up\n\
                 addr add {}/24 dev {NODE_BRIDGE}\naddr add {}/64 dev {NODE_BRIDGE} nodad\n",
                gateway.v4, gateway.v6
            ))
        }
    }
}

/// Tells a namespace on the wire the way to a node's workloads.
pub fn route_to_node(ns: &NetNs, plan: Plan, node: u8) -> Result<()> {
    let [v4, v6] = plan.workloads_of(node);
    let via = plan.node(node);
    ns.ip(&format!("route add {v4} via {}\nroute add {v6} via {}\n", via.v4, via.v6))
}

/// Hangs a workload on its node; its end is always `eth0`.
pub fn hang_workload(
    node_ns: &NetNs,
    ns: &NetNs,
    device: &str,
    shape: Shape,
    address: Pair,
    gateway: Pair,
) -> Result<()> {
    let Pair { v4, v6 } = address;
    let add = format!("link add name {device} type veth peer name eth0 netns {}\n", ns.name());
    match shape {
        Shape::Routed => {
            node_ns.ip(&format!(
                "{add}link set dev {device} up\naddr add {GATEWAY_V6}/64 dev {device} nodad\n\
                 route add {v4}/32 dev {device}\nroute add {v6}/128 dev {device}\n"
            ))?;
            node_ns.sysctl(&format!("net/ipv4/conf/{device}/proxy_arp"), "1")?;
            // The kernel delays proxied ARP answers at random, by up to 0.8 s, unless told not to.
            node_ns.sysctl(&format!("net/ipv4/neigh/{device}/proxy_delay"), "0")?;
            ns.ip(&format!(
                "addr add {v4}/32 dev eth0\naddr add {v6}/128 dev eth0 nodad\nlink set eth0 up\n\
                 route add {GATEWAY_V4} dev eth0 scope link\nroute add default via {GATEWAY_V4} dev eth0\n\
                 route add default via {GATEWAY_V6} dev eth0\n"
            ))
        }
        Shape::Bridge => {
            node_ns.ip(&format!("{add}link set dev {device} master {NODE_BRIDGE} up\n"))?;
            ns.ip(&format!(
                "addr add {v4}/24 dev eth0\naddr add {v6}/64 dev eth0 nodad\nlink set eth0 up\n\
                 route add default via {}\nroute add default via {}\n",
                gateway.v4, gateway.v6
            ))
        }
    }
}

/// The gateway of a node's workloads in [`Shape::Bridge`].
pub fn gateway(plan: Plan, node: u8) -> Pair {
    plan.node_gateway(node)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_follow_from_the_numbers() {
        let plan = Plan { world: 3 };
        assert_eq!(plan.workload(1, 0).texts(), ["10.3.1.2", "fd6e:3:1::2"]);
        assert_eq!(plan.workloads_of(2), ["10.3.2.0/24", "fd6e:3:2::/64"]);
        assert_eq!(plan.service(0).texts(), ["10.3.250.2", "fd6e:3:fa::2"]);
    }

    #[test]
    fn a_device_name_fits_the_kernel() {
        let address = Plan { world: 0 }.workload(1, 0);
        assert_eq!(device("web", address), "pod-web");
        assert_eq!(device("a-very-long-workload", address), "pod-2");
    }
}
