//! Finds a workload's network namespace and the two ends of its veth: a pod's by its uid, any other's by its address.
//!
//! The namespace has to have the address, whatever it was found by. The node's end is found by link index, and checked
//! to lead back to the pod's end in that namespace and no other.

use std::{
    collections::{HashMap, HashSet},
    io,
    net::{IpAddr, Ipv4Addr},
    os::fd::{AsFd, AsRawFd},
    path::PathBuf,
};

use futures_util::TryStreamExt;
use mesh_core::model::Workload;
use mesh_ebpf::abi::Mac;
use netlink_packet_route::{
    RouteNetlinkMessage,
    link::LinkAttribute,
    nsid::{NsidAttribute, NsidMessage},
};
use nix::ifaddrs::getifaddrs;

use super::sandbox::{self, Sandbox};
use crate::net::{
    netlink::Netlink,
    netns::{Namespace, namespaces},
};

/// What is said of a workload that has no address.
const UNSPECIFIED: IpAddr = IpAddr::V4(Ipv4Addr::UNSPECIFIED);

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
    /// No process of the pod runs on this node.
    #[error("no process of pod {0} runs on this node")]
    NoSandbox(String),
    /// Which of its processes is the pod's first cannot be told.
    #[error(
        "the first processes of pod {0} are in different network namespaces: which is the pod's cannot be told"
    )]
    AmbiguousSandbox(String),
    /// Its first process is where that of another pod is.
    #[error(
        "the first processes of pods {0} and {1} are in one network namespace: whose it is cannot be told"
    )]
    SharedSandbox(String, String),
    /// The pod is there, its address is not.
    #[error("the network namespace of pod {uid} does not have {address}")]
    NotInSandbox {
        /// The pod.
        uid: String,
        /// Its address.
        address: IpAddr,
    },
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

/// Which namespaces and interfaces have which address, and where pods are, at one moment.
#[derive(Debug, Default)]
pub struct Census {
    found: HashMap<IpAddr, Vec<Found>>,
    sandboxes: HashMap<String, Sandbox>,
    own: HashSet<IpAddr>,
}

#[derive(Debug)]
struct Found {
    path: PathBuf,
    inode: u64,
    interface: String,
}

impl Census {
    /// Looks where these workloads are: among all processes if one of them is a pod, in all namespaces if one is not.
    pub fn take<'a>(wanted: impl Iterator<Item = &'a Workload>) -> io::Result<Self> {
        let mut census =
            Self { own: addresses()?.into_iter().map(|(address, _)| address).collect(), ..Self::default() };
        let (pods, others): (HashSet<&str>, HashSet<&str>) =
            wanted.map(|workload| workload.uid.as_str()).partition(|uid| !uid.is_empty());
        if !pods.is_empty() {
            census.sandboxes = sandbox::find(|uid| pods.contains(uid))?;
        }
        if !others.is_empty() {
            census.look_everywhere()?;
        }
        Ok(census)
    }

    fn look_everywhere(&mut self) -> io::Result<()> {
        for path in namespaces()? {
            let Ok(namespace) = Namespace::open(&path) else { continue };
            let Ok(Ok(list)) = namespace.enter(addresses) else { continue };
            let inode = namespace.inode();
            for (address, interface) in list {
                let all = self.found.entry(address).or_default();
                // An address can be on two interfaces of a namespace; the first one counts.
                if !all.iter().any(|found| found.inode == inode) {
                    all.push(Found { path: path.clone(), inode, interface });
                }
            }
        }
        Ok(())
    }

    /// The place of a workload; the first of its addresses that is found decides. `anothers`: whether a veth, by the
    /// index of the node's end, is known for another workload's. Who gave itself the address of another is not taken
    /// for that one.
    pub async fn place(
        &self,
        workload: &Workload,
        anothers: impl Fn(u32) -> bool,
    ) -> Result<Place, PlaceError> {
        if !workload.uid.is_empty() {
            return self.by_uid(&workload.uid, &workload.addresses).await;
        }
        let place = self.by_address(&workload.addresses, anothers).await?;
        match lacks(&place.namespace, &workload.addresses)? {
            Some(address) => Err(PlaceError::NoNamespace(address)),
            None => Ok(place),
        }
    }

    /// No veth is known for another's here: its other end is in the pod's own namespace.
    async fn by_uid(&self, uid: &str, wanted: &[IpAddr]) -> Result<Place, PlaceError> {
        if let Some(own) = wanted.iter().find(|address| self.own.contains(address)) {
            return Err(PlaceError::NodeNetwork(*own));
        }
        let pod = uid.to_owned();
        let namespace = match self.sandboxes.get(uid) {
            Some(Sandbox::In(namespace)) => namespace,
            None => return Err(PlaceError::NoSandbox(pod)),
            Some(Sandbox::Ambiguous) => return Err(PlaceError::AmbiguousSandbox(pod)),
            Some(Sandbox::Shared(other)) => return Err(PlaceError::SharedSandbox(pod, other.clone())),
        };
        let list = namespace.enter(addresses)??;
        let mut first = None;
        for wanted in wanted {
            match list.iter().find(|(address, _)| address == wanted) {
                Some(found) => first = first.or(Some(found)),
                None => return Err(PlaceError::NotInSandbox { uid: pod, address: *wanted }),
            }
        }
        let Some((address, interface)) = first else {
            return Err(PlaceError::NotInSandbox { uid: pod, address: UNSPECIFIED });
        };
        place(namespace.try_clone()?, interface, *address).await
    }

    async fn by_address(
        &self,
        wanted: &[IpAddr],
        anothers: impl Fn(u32) -> bool,
    ) -> Result<Place, PlaceError> {
        let Some((address, candidates)) =
            wanted.iter().find_map(|address| Some((*address, self.found.get(address)?)))
        else {
            let first = wanted.first().copied().unwrap_or(UNSPECIFIED);
            let own = wanted.iter().find(|address| self.own.contains(address));
            return Err(own.map_or(PlaceError::NoNamespace(first), |own| PlaceError::NodeNetwork(*own)));
        };
        let mut places = Vec::new();
        let mut problem = PlaceError::NoNamespace(address);
        for found in candidates {
            let namespace = Namespace::open(&found.path)?;
            match place(namespace, &found.interface, address).await {
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

/// Both ends of the veth, which have to lead to each other: an index alone can be had in any namespace.
async fn place(namespace: Namespace, interface: &str, address: IpAddr) -> Result<Place, PlaceError> {
    let not_veth = || PlaceError::NotVeth { address, interface: interface.to_owned() };
    let (pod_ifindex, node_ifindex, mac) = link(&namespace, interface).await?.ok_or_else(not_veth)?;
    let of_node = Namespace::of_agent()?;
    let back = link_by_index(&of_node, node_ifindex).await?.ok_or_else(not_veth)?;
    let leads_back = back.peer == Some(pod_ifindex)
        && back.peers_namespace.is_some()
        && back.peers_namespace == number_of(&namespace, &of_node)?;
    if leads_back { Ok(Place { namespace, pod_ifindex, node_ifindex, mac }) } else { Err(not_veth()) }
}

/// The number by which one namespace knows another (`NETNSA_NSID`), if it has one for it: links that lead there say it.
pub(super) fn number_of(namespace: &Namespace, known_to: &Namespace) -> io::Result<Option<i32>> {
    let mut question = NsidMessage::default();
    let descriptor = u32::try_from(namespace.as_fd().as_raw_fd()).map_err(io::Error::other)?;
    question.attributes.push(NsidAttribute::Fd(descriptor));
    let answers = Netlink::open(known_to)?.ask(RouteNetlinkMessage::GetNsId(question))?;
    let number = answers.into_iter().find_map(|answer| match answer {
        RouteNetlinkMessage::NewNsId(message) => message.attributes.into_iter().find_map(|it| match it {
            NsidAttribute::Id(number) => Some(number),
            _ => None,
        }),
        _ => None,
    });
    Ok(number.filter(|number| *number >= 0))
}

/// The first address that is on no interface of the namespace; an error is no answer.
pub fn lacks(namespace: &Namespace, wanted: &[IpAddr]) -> io::Result<Option<IpAddr>> {
    let there = namespace.enter(addresses)??;
    let is_there = |wanted: &IpAddr| there.iter().any(|(address, _)| address == wanted);
    Ok(wanted.iter().find(|address| !is_there(address)).copied())
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

/// Where a link leads.
#[derive(Debug)]
struct Back {
    peer: Option<u32>,
    /// The number of the namespace that the other end is in; none if it is in the same.
    peers_namespace: Option<i32>,
}

async fn link_by_index(namespace: &Namespace, index: u32) -> Result<Option<Back>, PlaceError> {
    let (connection, handle, _) = namespace.enter(rtnetlink::new_connection)??;
    let task = tokio::spawn(connection);
    let found = handle.link().get().match_index(index).execute().try_next().await;
    task.abort();
    match found {
        Ok(message) => Ok(message.map(|message| Back {
            peer: peer(&message.attributes),
            peers_namespace: message.attributes.iter().find_map(|attribute| match attribute {
                LinkAttribute::LinkNetNsId(number) => Some(*number),
                _ => None,
            }),
        })),
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
