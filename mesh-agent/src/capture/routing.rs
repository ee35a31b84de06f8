//! What capture needs inside a pod's namespace besides programs: `lo`, a rule and a route that deliver captured packets
//! locally, and three settings.
//!
//! `bpf_sk_assign` picks the socket, it does not make the destination local: without the rule the kernel would forward.

use std::{fs, io, net::IpAddr};

use futures_util::TryStreamExt;
use mesh_ebpf::abi::{CAPTURED_MARK, MARK_MASK};
use netlink_packet_route::{
    AddressFamily,
    link::LinkFlags,
    route::{RouteAttribute, RouteMessage, RouteScope, RouteType},
    rule::{RuleAction, RuleAttribute, RuleMessage},
};
use rtnetlink::{Handle, IpVersion, LinkUnspec, RouteMessageBuilder};
use serde::{Deserialize, Serialize};

use crate::net::{netns::Namespace, socket::Family};

/// Routing table of captured packets.
const TABLE: u32 = 1501;
/// Priority of the rule; before the main table's 32766, after nothing that a pod usually has.
const PRIORITY: u32 = 100;
/// The index of `lo`.
pub(super) const LO: u32 = 1;

const ACCEPT_LOCAL: &str = "/proc/sys/net/ipv4/conf/lo/accept_local";
const RP_FILTER: &str = "/proc/sys/net/ipv4/conf/lo/rp_filter";
const SYNCOOKIES: &str = "/proc/sys/net/ipv4/tcp_syncookies";

/// Values of the namespace's settings before enrolment, to be put back.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Settings {
    accept_local: u8,
    rp_filter: u8,
    tcp_syncookies: u8,
}

/// What captured packets need: the pod's own address is their source although they come in by `lo`. And no SYN cookies:
/// the ACK of one belongs to no socket, finds the application's listener, and could open a connection there.
const NEEDED: Settings = Settings { accept_local: 1, rp_filter: 2, tcp_syncookies: 0 };

impl Settings {
    fn read() -> io::Result<Self> {
        let value = |path| {
            let text = fs::read_to_string(path)?;
            text.trim().parse::<u8>().map_err(|_| io::Error::other(format!("{path} holds '{}'", text.trim())))
        };
        Ok(Self {
            accept_local: value(ACCEPT_LOCAL)?,
            rp_filter: value(RP_FILTER)?,
            tcp_syncookies: value(SYNCOOKIES)?,
        })
    }

    fn write(self) -> io::Result<()> {
        fs::write(ACCEPT_LOCAL, self.accept_local.to_string())?;
        fs::write(RP_FILTER, self.rp_filter.to_string())?;
        fs::write(SYNCOOKIES, self.tcp_syncookies.to_string())
    }

    /// What is set in a namespace now.
    pub fn of(namespace: &Namespace) -> io::Result<Self> {
        namespace.enter(Self::read)?
    }

    /// Puts these settings in force in a namespace.
    pub fn restore(self, namespace: &Namespace) -> io::Result<()> {
        namespace.enter(|| self.write())?
    }
}

/// A netlink connection into a pod's namespace.
#[derive(Debug, Clone)]
pub struct Routing {
    handle: Handle,
}

impl Routing {
    /// Opens it. Must be called inside a runtime.
    pub fn open(namespace: &Namespace) -> io::Result<Self> {
        let (connection, handle, _) = namespace.enter(rtnetlink::new_connection)??;
        tokio::spawn(connection);
        Ok(Self { handle })
    }

    /// Puts in place what is missing; returns the names of what was.
    pub async fn ensure(
        &self,
        namespace: &Namespace,
        families: &[Family],
    ) -> anyhow::Result<Vec<&'static str>> {
        let mut repaired = Vec::new();
        // First: the route is lost with it.
        if !self.is_lo_up().await? {
            let up = LinkUnspec::new_with_index(LO).up().build();
            self.handle.link().set(up).execute().await?;
            repaired.push("lo");
        }
        for family in families {
            if !self.has_rule(*family).await? {
                self.add_rule(*family).await?;
                repaired.push("rule");
            }
            if !self.has_route(*family).await? {
                self.handle.route().add(route(*family)).execute().await?;
                repaired.push("route");
            }
        }
        if Settings::of(namespace)? != NEEDED {
            NEEDED.restore(namespace)?;
            repaired.push("sysctl");
        }
        Ok(repaired)
    }

    /// Removes rule and route of both families.
    pub async fn remove(&self) -> anyhow::Result<()> {
        for family in [Family::V4, Family::V6] {
            for rule in self.rules(family).await? {
                self.handle.rule().del(rule).execute().await?;
            }
            while self.has_route(family).await? {
                self.handle.route().del(route(family)).execute().await?;
            }
        }
        Ok(())
    }

    async fn rules(&self, family: Family) -> anyhow::Result<Vec<RuleMessage>> {
        let version = if family == Family::V4 { IpVersion::V4 } else { IpVersion::V6 };
        let rules = self.handle.rule().get(version).execute();
        Ok(rules.try_filter(|rule| std::future::ready(is_ours(rule))).try_collect().await?)
    }

    async fn has_rule(&self, family: Family) -> anyhow::Result<bool> {
        Ok(!self.rules(family).await?.is_empty())
    }

    async fn is_lo_up(&self) -> anyhow::Result<bool> {
        let found = self.handle.link().get().match_index(LO).execute().try_next().await?;
        Ok(found.is_some_and(|lo| lo.header.flags.contains(LinkFlags::Up)))
    }

    async fn add_rule(&self, family: Family) -> anyhow::Result<()> {
        let mut add = self.handle.rule().add();
        let rule = add.message_mut();
        rule.header.family = address_family(family);
        rule.header.action = RuleAction::ToTable;
        rule.attributes.extend([
            RuleAttribute::Priority(PRIORITY),
            RuleAttribute::FwMark(CAPTURED_MARK),
            RuleAttribute::FwMask(MARK_MASK),
            RuleAttribute::Table(TABLE),
        ]);
        Ok(add.execute().await?)
    }

    async fn has_route(&self, family: Family) -> anyhow::Result<bool> {
        let mut query = RouteMessage::default();
        query.header.address_family = address_family(family);
        let mut routes = std::pin::pin!(self.handle.route().get(query).execute());
        let mut found = false;
        // Read to the end: a dump left half read would mix with the next.
        while let Some(route) = routes.try_next().await? {
            let table = route.attributes.contains(&RouteAttribute::Table(TABLE));
            found |= table && route.header.kind == RouteType::Local;
        }
        Ok(found)
    }
}

fn address_family(family: Family) -> AddressFamily {
    match family {
        Family::V4 => AddressFamily::Inet,
        Family::V6 => AddressFamily::Inet6,
    }
}

fn is_ours(rule: &RuleMessage) -> bool {
    let has = |wanted: RuleAttribute| rule.attributes.contains(&wanted);
    has(RuleAttribute::FwMark(CAPTURED_MARK)) && has(RuleAttribute::Table(TABLE))
}

fn route(family: Family) -> RouteMessage {
    let any: IpAddr = match family {
        Family::V4 => std::net::Ipv4Addr::UNSPECIFIED.into(),
        Family::V6 => std::net::Ipv6Addr::UNSPECIFIED.into(),
    };
    let mut message = match any {
        IpAddr::V4(any) => RouteMessageBuilder::<std::net::Ipv4Addr>::new()
            .destination_prefix(any, 0)
            .output_interface(LO)
            .build(),
        IpAddr::V6(any) => RouteMessageBuilder::<std::net::Ipv6Addr>::new()
            .destination_prefix(any, 0)
            .output_interface(LO)
            .build(),
    };
    message.header.kind = RouteType::Local;
    message.header.scope = if family == Family::V4 { RouteScope::Host } else { RouteScope::Universe };
    message.header.table = netlink_packet_route::route::RouteHeader::RT_TABLE_UNSPEC;
    message.attributes.push(RouteAttribute::Table(TABLE));
    message
}
