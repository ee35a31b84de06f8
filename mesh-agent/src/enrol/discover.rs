//! Finds a workload's network namespace and the two ends of its veth, by its address.
//!
//! The node's end is found by link index, and checked to lead back to the pod's end.

use std::{
    collections::{HashMap, HashSet},
    io,
    net::IpAddr,
    path::PathBuf,
};

use futures_util::TryStreamExt;
use mesh_ebpf::abi::Mac;
use netlink_packet_route::link::LinkAttribute;
use nix::ifaddrs::getifaddrs;

use crate::net::netns::{Namespace, namespaces};

/// Why a workload's place was not found.
#[derive(Debug, thiserror::Error)]
pub enum PlaceError {
    /// No namespace has the address.
    #[error("no network namespace of this node has the address {0}")]
    NoNamespace(IpAddr),
    /// More than one namespace has the address: one of them is not the workload.
    #[error(
        "more than one network namespace of this node has the address {0}, and one of them claims another's"
    )]
    Ambiguous(IpAddr),
    /// The address is the node's own (`hostNetwork`).
    #[error("{0} is the node's own address: workloads on the node's network cannot be enrolled")]
    NodeNetwork(IpAddr),
    /// The interface has no other end in the node's namespace.
    #[error(
        "interface {interface} with {address} has no other end in the node's network namespace: it is not a veth"
    )]
    NotVeth {
        /// The address.
        address: IpAddr,
        /// The pod's interface.
        interface: String,
    },
    /// A look at namespaces or links failed.
    #[error(transparent)]
    Io(#[from] io::Error),
    /// Netlink failed.
    #[error(transparent)]
    Netlink(#[from] rtnetlink::Error),
}

/// Where a workload is.
#[derive(Debug)]
pub struct Place {
    /// Its namespace.
    pub namespace: Namespace,
    /// The pod's end of the veth, an index in the pod's namespace.
    pub pod_ifindex: u32,
    /// The node's end, an index in the agent's namespace.
    pub node_ifindex: u32,
    /// The hardware address of the pod's end.
    pub mac: Mac,
}

/// Which namespaces and interfaces have which address, at one moment.
#[derive(Debug, Default)]
pub struct Census {
    found: HashMap<IpAddr, Vec<Found>>,
    own: HashSet<IpAddr>,
}

#[derive(Debug)]
struct Found {
    path: PathBuf,
    inode: u64,
    interface: String,
}

impl Census {
    /// Looks at all namespaces.
    pub fn take() -> io::Result<Self> {
        let mut census =
            Self { own: addresses()?.into_iter().map(|(address, _)| address).collect(), ..Self::default() };
        for path in namespaces()? {
            let Ok(namespace) = Namespace::open(&path) else { continue };
            let Ok(Ok(list)) = namespace.enter(addresses) else { continue };
            let inode = namespace.inode();
            for (address, interface) in list {
                let all = census.found.entry(address).or_default();
                // An address can be on two interfaces of a namespace; the first one counts.
                if !all.iter().any(|found| found.inode == inode) {
                    all.push(Found { path: path.clone(), inode, interface });
                }
            }
        }
        Ok(census)
    }

    /// The place of the workload with these addresses; the first one that is found decides. `anothers`: whether a veth,
    /// by the index of the node's end, is known for another workload's. Who gave itself the address of another is not
    /// taken for that one.
    pub async fn place(
        &self,
        wanted: &[IpAddr],
        anothers: impl Fn(u32) -> bool,
    ) -> Result<Place, PlaceError> {
        let Some((address, candidates)) =
            wanted.iter().find_map(|address| Some((*address, self.found.get(address)?)))
        else {
            let first = wanted.first().copied().unwrap_or(IpAddr::V4(std::net::Ipv4Addr::UNSPECIFIED));
            let own = wanted.iter().find(|address| self.own.contains(address));
            return Err(own.map_or(PlaceError::NoNamespace(first), |own| PlaceError::NodeNetwork(*own)));
        };
        let mut places = Vec::new();
        let mut problem = PlaceError::NoNamespace(address);
        for found in candidates {
            match found.place(address).await {
                Ok(place) if anothers(place.node_ifindex) => {}
                Ok(place) => places.push(place),
                Err(error) => problem = error,
            }
        }
        match (places.pop(), places.is_empty()) {
            (Some(place), true) => Ok(place),
            (Some(_), false) => Err(PlaceError::Ambiguous(address)),
            (None, _) => Err(problem),
        }
    }
}

impl Found {
    /// Both ends of the veth, which have to lead to each other.
    async fn place(&self, address: IpAddr) -> Result<Place, PlaceError> {
        let namespace = Namespace::open(&self.path)?;
        let not_veth = || PlaceError::NotVeth { address, interface: self.interface.clone() };
        let (pod_ifindex, node_ifindex, mac) =
            link(&namespace, &self.interface).await?.ok_or_else(not_veth)?;
        let back = link_by_index(&Namespace::of_agent()?, node_ifindex).await?;
        if back.is_none_or(|(_, peer)| peer != Some(pod_ifindex)) {
            return Err(not_veth());
        }
        Ok(Place { namespace, pod_ifindex, node_ifindex, mac })
    }
}

/// Whether an address is still on an interface of the namespace; an error is no answer.
pub fn still_has(namespace: &Namespace, address: IpAddr) -> io::Result<bool> {
    Ok(namespace.enter(addresses)??.iter().any(|(found, _)| *found == address))
}

/// Addresses of the calling thread's namespace with their interfaces, loopback and link-local ones apart.
fn addresses() -> io::Result<Vec<(IpAddr, String)>> {
    let list = getifaddrs()?.filter_map(|entry| {
        let address = entry.address?;
        let ip: IpAddr = match (address.as_sockaddr_in(), address.as_sockaddr_in6()) {
            (Some(v4), _) => v4.ip().into(),
            (None, Some(v6)) => v6.ip().into(),
            (None, None) => return None,
        };
        let link_local = matches!(ip, IpAddr::V6(v6) if v6.is_unicast_link_local());
        (!ip.is_loopback() && !link_local).then_some((ip, entry.interface_name))
    });
    Ok(list.collect())
}

/// Index of an interface and of its other end, and its hardware address; `None` if it has none or is not there.
async fn link(namespace: &Namespace, name: &str) -> Result<Option<(u32, u32, Mac)>, PlaceError> {
    let (connection, handle, _) = namespace.enter(rtnetlink::new_connection)??;
    let task = tokio::spawn(connection);
    let found = handle.link().get().match_name(name.to_owned()).execute().try_next().await;
    task.abort();
    Ok(found?.and_then(|message| {
        Some((message.header.index, peer(&message.attributes)?, hardware_address(&message.attributes)?))
    }))
}

async fn link_by_index(namespace: &Namespace, index: u32) -> Result<Option<(u32, Option<u32>)>, PlaceError> {
    let (connection, handle, _) = namespace.enter(rtnetlink::new_connection)??;
    let task = tokio::spawn(connection);
    let found = handle.link().get().match_index(index).execute().try_next().await;
    task.abort();
    match found {
        Ok(message) => Ok(message.map(|message| (message.header.index, peer(&message.attributes)))),
        Err(rtnetlink::Error::NetlinkError(error)) if error.raw_code() == -nix::libc::ENODEV => Ok(None),
        Err(error) => Err(error.into()),
    }
}

fn peer(attributes: &[LinkAttribute]) -> Option<u32> {
    attributes.iter().find_map(|attribute| match attribute {
        LinkAttribute::Link(index) => Some(*index),
        _ => None,
    })
}

fn hardware_address(attributes: &[LinkAttribute]) -> Option<Mac> {
    attributes.iter().find_map(|attribute| match attribute {
        LinkAttribute::Address(address) => address.as_slice().try_into().ok(),
        _ => None,
    })
}
