//! One answer out of those of all controllers: each knows the agents that are connected to it. Pure.

use std::collections::{BTreeMap, BTreeSet};

use super::answer::{AgentRow, Certificates, HeldCertificate};

/// A node's row is that of the controller which its agent is connected to, or else was last.
pub(super) fn agents(all: impl IntoIterator<Item = Vec<AgentRow>>) -> Vec<AgentRow> {
    let mut best: BTreeMap<String, AgentRow> = BTreeMap::new();
    for row in all.into_iter().flatten() {
        let rank = |row: &AgentRow| (row.connected, row.since.clone());
        if best.get(&row.node).is_none_or(|before| rank(before) < rank(&row)) {
            best.insert(row.node.clone(), row);
        }
    }
    best.into_values().collect()
}

/// What a node holds is what the controller says that hears its agent now. A node is silent if none does.
pub(super) fn certificates(own: Certificates, others: Vec<Certificates>) -> Certificates {
    let mut roots = own.roots.clone();
    let all: Vec<Certificates> = std::iter::once(own).chain(others).collect();
    let mut held: BTreeMap<String, Vec<HeldCertificate>> = BTreeMap::new();
    let mut heard: BTreeSet<String> = BTreeSet::new();
    for answer in &all {
        let mut of_nodes: BTreeMap<String, Vec<HeldCertificate>> = BTreeMap::new();
        for it in &answer.certificates {
            of_nodes.entry(it.node.clone()).or_default().push(it.clone());
        }
        for (node, certificates) in of_nodes {
            // A node that is heard has one of its own at least.
            let is_heard = !answer.silent.contains(&node);
            if is_heard || !heard.contains(&node) {
                held.insert(node.clone(), certificates);
            }
            if is_heard {
                heard.insert(node);
            }
        }
    }
    let certificates: Vec<HeldCertificate> = held.into_values().flatten().collect();
    for root in &mut roots {
        let leads = |it: &&HeldCertificate| it.root.as_ref() == Some(&root.sha256);
        root.certificates = certificates.iter().filter(leads).count();
    }
    let silent: BTreeSet<String> = all.into_iter().flat_map(|answer| answer.silent).collect();
    Certificates { roots, certificates, silent: silent.difference(&heard).cloned().collect() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::admin::answer::Root;

    fn row(node: &str, connected: bool, since: &str) -> AgentRow {
        AgentRow { connected, since: Some(since.to_owned()), ..AgentRow::absent(node) }
    }

    #[test]
    fn an_agents_row_is_that_of_the_controller_which_it_is_connected_to() {
        let own = vec![row("a", true, "1"), row("b", false, "9"), AgentRow::absent("c")];
        let other =
            vec![row("a", false, "5"), row("b", true, "2"), row("c", false, "3"), row("d", true, "4")];
        let rows = agents([own, other]);
        let said: Vec<_> =
            rows.iter().map(|it| (it.node.as_str(), it.connected, it.since.as_deref())).collect();
        assert_eq!(
            said,
            [("a", true, Some("1")), ("b", true, Some("2")), ("c", false, Some("3")), ("d", true, Some("4"))]
        );
    }

    fn answer(held: &[(&str, &str)], silent: &[&str]) -> Certificates {
        let root = |sha256: &str| Root {
            sha256: sha256.into(),
            subject: String::new(),
            since: String::new(),
            not_after: String::new(),
            signs: sha256 == "new",
            certificates: 0,
        };
        let one = |(node, root): &(&str, &str)| HeldCertificate {
            identity: format!("of {node}"),
            node: (*node).into(),
            expires: None,
            root: Some((*root).into()),
            error: None,
        };
        Certificates {
            roots: vec![root("new"), root("old")],
            certificates: held.iter().map(one).collect(),
            silent: silent.iter().map(|node| (*node).to_owned()).collect(),
        }
    }

    #[test]
    fn what_a_node_holds_is_what_the_controller_says_that_hears_it() {
        // `b` went from us to the other one, and got a new certificate there; `c` is away; nobody ever heard `d`.
        let own = answer(&[("a", "new"), ("b", "old"), ("c", "old")], &["b", "c", "d"]);
        let other = answer(&[("a", "old"), ("b", "new")], &["a", "c", "d"]);
        let whole = certificates(own.clone(), vec![other]);
        let held: Vec<_> =
            whole.certificates.iter().map(|it| (it.node.as_str(), it.root.as_deref().unwrap())).collect();
        assert_eq!(held, [("a", "new"), ("b", "new"), ("c", "old")]);
        assert_eq!(whole.silent, ["c", "d"]);
        let counts: Vec<_> = whole.roots.iter().map(|it| (it.sha256.as_str(), it.certificates)).collect();
        assert_eq!(counts, [("new", 2), ("old", 1)]);
        assert_eq!(certificates(own, vec![]).silent, ["b", "c", "d"], "the other one does not answer");
    }
}
