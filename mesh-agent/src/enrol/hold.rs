//! Holds what leaves a new pod until it is captured, or known to be outside of the mesh.
//!
//! A veth is there before its pod runs anything, and a pod runs before the cluster's API says that it has an address. So
//! every new veth is held from its creation on, at the node's end. A packet that is dropped there is sent again by its
//! sender, and goes its right way then: a connection that was opened too early is late, not lost.
//!
//! Invariant: every hold has an end that the kernel knows, also when the agent does not live to say it. That of a strict
//! pod is put off for as long as the agent lives and has not captured it: what left it before would be refused by its guard,
//! or by nobody.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    io,
    time::{Duration, Instant},
};

use futures_util::{FutureExt, StreamExt, stream::BoxStream};
use mesh_core::{model::Mode, view::Snapshot};
use netlink_packet_route::{
    RouteNetlinkMessage,
    link::{InfoKind, LinkAttribute, LinkInfo, LinkMessage},
};
use rtnetlink::MulticastGroup;

use super::{
    discover::number_of,
    sandbox::{self, Sandbox},
};
use crate::{
    capture::{Hook, Kernel, Maps},
    metrics::{HoldOutcome, Metrics},
    net::{netlink::Netlink, netns::Namespace},
    run_dir::{RunDir, RunDirError},
};

/// A file of the run directory, there once new veths are held and there is a view to say what becomes of them. It goes with
/// the run directory's tmpfs when the machine does: a pod that mounts it is not started by a node that boots before its
/// agent holds it.
pub const MARK: &str = "new-pods-are-held";
/// What the names of our attachments begin with; a namespace of Kubernetes cannot have it before an underscore.
const OWNER: &str = "hold__";

/// The veths of new pods that are held.
pub struct Holds {
    limit: Duration,
    changes: BoxStream<'static, ()>,
    /// All veths that were looked at.
    known: HashSet<u32>,
    /// Those that are held, and since when.
    held: BTreeMap<u32, Instant>,
}

impl std::fmt::Debug for Holds {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Holds").field("limit", &self.limit).field("held", &self.held).finish_non_exhaustive()
    }
}

/// The node's end of a veth whose other end is in another namespace.
#[derive(Debug, Clone, Copy)]
struct Veth {
    index: u32,
    /// The number by which the node's namespace knows the other.
    peers_namespace: i32,
}

/// What a veth is held for.
struct Situation<'a> {
    /// The pods of this node by uid; those that are meant to be captured have a mode.
    pods: &'a HashMap<&'a str, Option<Mode>>,
    /// Where pods are, by the numbers of their namespaces.
    places: &'a HashMap<i32, String>,
    /// Veths of captured workloads.
    captured: &'a HashSet<u32>,
}

/// What becomes of a hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Decision {
    /// It ends.
    End(HoldOutcome),
    /// It goes on until its limit.
    Wait,
    /// It goes on, whatever its limit.
    PutOff,
}

impl Holds {
    /// Follows the node's links; those that are there already are not held. `limit`: how long a hold may last. Must be
    /// called inside a runtime.
    pub fn new(limit: Duration) -> io::Result<Self> {
        let (connection, _, changes) = rtnetlink::new_multicast_connection(&[MulticastGroup::Link])?;
        tokio::spawn(connection);
        let changes = changes.map(drop).boxed();
        let known = veths()?.into_iter().map(|veth| veth.index).collect();
        Ok(Self { limit, changes, known, held: BTreeMap::new() })
    }

    /// Done when something may have changed about the node's links; never without holds. Cancel-safe.
    pub(super) async fn changed(holds: Option<&mut Self>) {
        let Some(holds) = holds else { return std::future::pending().await };
        if holds.changes.next().await.is_none() {
            return std::future::pending().await;
        }
        // One look is enough for all that is known by now.
        while let Some(Some(())) = holds.changes.next().now_or_never() {}
    }

    /// Whether something is held.
    pub(super) fn any(&self) -> bool {
        !self.held.is_empty()
    }

    /// The names of what is attached.
    pub(super) fn owners(&self) -> impl Iterator<Item = String> {
        self.held.keys().copied().map(owner)
    }

    /// Says that what is new is held.
    pub(super) fn tell(&self, run_dir: &RunDir) -> Result<(), RunDirError> {
        run_dir.write(MARK, b"")
    }

    /// Holds what is new.
    pub(super) fn take(&mut self, kernel: &mut Kernel, maps: &mut Maps) -> anyhow::Result<()> {
        let there = veths()?;
        let of_node = Namespace::of_agent()?;
        for veth in &there {
            if !self.known.insert(veth.index) {
                continue;
            }
            self.held.insert(veth.index, Instant::now());
            maps.hold(veth.index, self.limit)?;
            kernel.attach(&owner(veth.index), Hook::HoldNew, &of_node, veth.index)?;
            tracing::debug!(ifindex = veth.index, "held");
        }
        self.known.retain(|index| there.iter().any(|veth| veth.index == *index));
        Ok(())
    }

    /// Lets go of what needs to be held no longer.
    pub(super) fn resolve(
        &mut self,
        view: Option<&Snapshot>,
        captured: &HashSet<u32>,
        kernel: &mut Kernel,
        maps: &mut Maps,
        metrics: &Metrics,
    ) -> anyhow::Result<()> {
        let there: HashMap<u32, Veth> = veths()?.into_iter().map(|veth| (veth.index, veth)).collect();
        let places = places()?;
        let pods: HashMap<&str, Option<Mode>> = view
            .into_iter()
            .flat_map(Snapshot::workloads)
            .filter(|workload| !workload.uid.is_empty())
            .map(|workload| (workload.uid.as_str(), workload.enrolled.then_some(workload.mode)))
            .collect();
        let situation = Situation { pods: &pods, places: &places, captured };
        let mut ended = Vec::new();
        for (index, since) in &self.held {
            let late = since.elapsed() >= self.limit;
            match situation.decide(there.get(index).copied(), late) {
                Decision::End(outcome) => ended.push((*index, outcome)),
                Decision::Wait => {}
                Decision::PutOff => maps.hold(*index, self.limit)?,
            }
        }
        for (index, outcome) in ended {
            let held_ms = self.held.remove(&index).map(|since| since.elapsed().as_millis());
            if outcome == HoldOutcome::Limit {
                let seconds = self.limit.as_secs();
                tracing::warn!(
                    ifindex = index,
                    "not known to be captured or outside after {seconds} s: no longer held"
                );
            }
            tracing::debug!(ifindex = index, held_ms, ?outcome, "no longer held");
            metrics.held(outcome);
            kernel.detach(&owner(index))?;
            maps.unhold(index);
        }
        Ok(())
    }
}

impl Situation<'_> {
    fn decide(&self, veth: Option<Veth>, late: bool) -> Decision {
        let Some(veth) = veth else { return Decision::End(HoldOutcome::Gone) };
        if self.captured.contains(&veth.index) {
            return Decision::End(HoldOutcome::Captured);
        }
        let meant = self.places.get(&veth.peers_namespace).and_then(|uid| self.pods.get(uid.as_str()));
        match meant {
            Some(None) => Decision::End(HoldOutcome::Outside),
            Some(Some(Mode::Strict)) => Decision::PutOff,
            _ if late => Decision::End(HoldOutcome::Limit),
            _ => Decision::Wait,
        }
    }
}

fn owner(index: u32) -> String {
    format!("{OWNER}{index}")
}

/// The uids of the pods that run here, by the numbers of their namespaces.
fn places() -> io::Result<HashMap<i32, String>> {
    let of_node = Namespace::of_agent()?;
    let mut places = HashMap::new();
    for (uid, sandbox) in sandbox::find(|_| true)? {
        if let Sandbox::In(namespace) = sandbox
            && let Some(number) = number_of(&namespace, &of_node)?
        {
            places.insert(number, uid);
        }
    }
    Ok(places)
}

/// The node's ends of all veths.
fn veths() -> io::Result<Vec<Veth>> {
    let links =
        Netlink::open(&Namespace::of_agent()?)?.dump(RouteNetlinkMessage::GetLink(LinkMessage::default()))?;
    Ok(links
        .into_iter()
        .filter_map(|answer| match answer {
            RouteNetlinkMessage::NewLink(link) => veth(&link),
            _ => None,
        })
        .collect())
}

fn veth(link: &LinkMessage) -> Option<Veth> {
    let is_veth = link.attributes.iter().any(|attribute| {
        matches!(attribute, LinkAttribute::LinkInfo(infos) if infos.contains(&LinkInfo::Kind(InfoKind::Veth)))
    });
    let peers_namespace = link.attributes.iter().find_map(|attribute| match attribute {
        LinkAttribute::LinkNetNsId(number) => Some(*number),
        _ => None,
    })?;
    is_veth.then_some(Veth { index: link.header.index, peers_namespace })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(veth: Option<Veth>, late: bool, expected: Decision) {
        let pods = HashMap::from([
            ("strict", Some(Mode::Strict)),
            ("permissive", Some(Mode::Permissive)),
            ("outside", None),
        ]);
        let places = ["strict", "permissive", "outside", "new"].map(str::to_owned);
        let places = (1..).zip(places).collect();
        let captured = HashSet::from([7]);
        let situation = Situation { pods: &pods, places: &places, captured: &captured };
        assert_eq!(situation.decide(veth, late), expected);
    }

    #[test]
    fn a_hold_lasts_until_it_is_known_where_the_pod_belongs_and_beyond_its_limit_for_strict_ones_alone() {
        let of = |index, peers_namespace| Some(Veth { index, peers_namespace });
        check(of(7, 1), false, Decision::End(HoldOutcome::Captured));
        check(of(8, 1), false, Decision::PutOff);
        check(of(8, 2), false, Decision::Wait);
        check(of(8, 3), false, Decision::End(HoldOutcome::Outside));
        check(of(8, 4), false, Decision::Wait);
        check(of(8, 5), false, Decision::Wait);
        check(of(8, 1), true, Decision::PutOff);
        check(of(8, 2), true, Decision::End(HoldOutcome::Limit));
        check(of(8, 5), true, Decision::End(HoldOutcome::Limit));
        check(None, false, Decision::End(HoldOutcome::Gone));
    }
}
