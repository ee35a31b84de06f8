//! What an agent is told, and what it finds in its cache: updates of its view.
//!
//! The input is one update, or two behind each other with a length before the first. Claims: what converts is written
//! and read back the same; applying a difference gives the next view; an update is put in force whole or changes
//! nothing; a view that is in force survives its own cache; every captured address belongs to somebody or to nobody.
#![no_main]

use libfuzzer_sys::fuzz_target;
use mesh_core::{
    identity::TrustDomain,
    view::{Delta, NodeView, Snapshot},
    wire::{self, proto},
};
use prost::Message;

// The agent's own file, as with the preface: the agent has no public name for what holds its view.
#[allow(dead_code, unreachable_pub)]
#[path = "../../../mesh-agent/src/view/state.rs"]
mod state_file;

fuzz_target!(|input: &[u8]| {
    let (first, second) = halves(input);
    let (Some(first), Some(second)) = (decode(first), decode(second)) else { return };
    let views = [&first, &second].map(|update| wire::delta(update).ok().map(crosses_unchanged));
    if let [Some(first), Some(second)] = views {
        let (a, b) = (view(first), view(second));
        let mut next = a.clone();
        next.apply(a.diff(&b));
        assert_eq!(next, b, "the difference makes the next view");
        for view in [a, b] {
            indexed(&view);
        }
    }
    all_or_nothing(&first, &second);
});

/// Cuts the input at the length in its first two bytes.
fn halves(input: &[u8]) -> (&[u8], &[u8]) {
    let Some((len, rest)) = input.split_first_chunk::<2>() else { return (input, &[]) };
    rest.split_at(usize::from(u16::from_le_bytes(*len)).min(rest.len()))
}

fn decode(bytes: &[u8]) -> Option<proto::ViewUpdate> {
    proto::ViewUpdate::decode(bytes).ok()
}

fn crosses_unchanged(delta: Delta) -> Delta {
    for resource in &delta.upserts {
        let key = resource.key();
        assert_eq!(key.to_string().parse().as_ref(), Ok(&key), "what was added can be removed by its name");
    }
    let sent = wire::update("v".into(), false, &delta).encode_to_vec();
    let got = proto::ViewUpdate::decode(sent.as_slice()).expect("what we wrote");
    assert_eq!(wire::delta(&got).as_ref(), Ok(&delta));
    delta
}

fn view(delta: Delta) -> NodeView {
    let mut view = NodeView::default();
    view.apply(delta);
    view
}

fn indexed(view: &NodeView) {
    let Ok(snapshot) = Snapshot::new("node", "v", view) else { return };
    for workload in snapshot.workloads() {
        let identity = snapshot.identity(&workload.name).expect("every workload has its identity");
        assert_eq!(identity.trust_domain(), &snapshot.mesh().trust_domain);
        for address in &workload.addresses {
            let at = snapshot.workload_at(*address).map(|owner| &owner.name);
            let ambiguous = snapshot.ambiguous().contains(address);
            assert_eq!(at, (!ambiguous).then_some(&workload.name), "an address has one owner, or none");
        }
    }
    for address in snapshot.ambiguous() {
        assert!(snapshot.owner(*address).is_none());
        assert!(snapshot.captured_addresses().any(|captured| captured == *address), "and is still captured");
    }
}

/// Two updates, one after the other, as an agent takes them.
fn all_or_nothing(first: &proto::ViewUpdate, second: &proto::ViewUpdate) {
    let trust_domain = || TrustDomain::parse("td").expect("a trust domain");
    let mut state = state_file::ViewState::new("node", trust_domain());
    for update in [first, second] {
        let before = state.to_update();
        match state.apply(update) {
            Err(_) => assert_eq!(state.to_update(), before, "what is not put in force changes nothing"),
            Ok(applied) => {
                assert_eq!(applied.snapshot.version(), update.version);
                let cached = state.to_update();
                let mut restarted = state_file::ViewState::new("node", trust_domain());
                // A version of no text is "none": an agent that has it would take nothing but complete updates.
                let again = restarted.apply(&cached).map(drop).map_err(|error| error.to_string());
                assert_eq!(again, Ok(()), "a view in force comes back from the cache");
                assert_eq!(restarted.to_update(), cached);
            }
        }
    }
}
