//! Views, their differences, and both on the wire.

use std::sync::Arc;

use mesh_core::{
    view::{Delta, NodeView, Resource, Snapshot},
    wire::{self, proto::ViewUpdate},
};
use proptest::{collection::vec, prelude::*};
use prost::Message;

use super::arbitrary;

proptest! {
    #[test]
    fn applying_the_difference_gives_the_next_view(mut view in arbitrary::view(), next in arbitrary::view()) {
        let delta = view.diff(&next);
        view.apply(delta);
        prop_assert_eq!(&view, &next);
        prop_assert!(view.diff(&next).is_empty());
    }

    #[test]
    fn a_view_differs_from_itself_in_nothing(view in arbitrary::view()) {
        // A copy, so that equal is not the same place in memory.
        let copy: NodeView = decoded(&encoded(&NodeView::default().diff(&view))).upserts.into_iter().collect();
        prop_assert!(view.diff(&copy).is_empty());
    }

    #[test]
    fn a_difference_names_only_what_changed(view in arbitrary::view(), next in arbitrary::view()) {
        let Delta { upserts, removes } = view.diff(&next);
        prop_assert!(upserts.iter().all(|it| next.resources().any(|other| other == it)));
        prop_assert!(upserts.iter().all(|it| !view.resources().any(|other| other == it)));
        prop_assert!(removes.iter().all(|key| view.resources().any(|it| it.key() == *key)));
        prop_assert!(removes.iter().all(|key| !next.resources().any(|it| it.key() == *key)));
    }

    #[test]
    fn every_view_crosses_the_wire_unchanged(view in arbitrary::view(), next in arbitrary::view()) {
        let delta = view.diff(&next);
        prop_assert_eq!(decoded(&encoded(&delta)), delta);
    }

    #[test]
    fn a_route_takes_as_many_bytes_of_an_update_as_is_said(route in arbitrary::route()) {
        let of = |upserts: Vec<Resource>| encoded(&Delta { upserts, removes: vec![] }).len();
        let (said, resource) = (wire::route_bytes(&route), Resource::Route(Arc::new(route)));
        let key = resource.key().to_string().len();
        let taken = of(vec![resource]) - of(vec![]);
        // Besides itself there are its key and the lengths of all three.
        prop_assert!((said + key..said + key + 16).contains(&taken), "{taken} are taken, {said} are said");
    }

    #[test]
    fn no_bytes_make_it_panic(bytes in vec(any::<u8>(), 0..200)) {
        if let Ok(update) = ViewUpdate::decode(bytes.as_slice()) {
            let _ = wire::delta(&update);
        }
    }

    #[test]
    fn a_damaged_update_is_refused_or_a_view(view in arbitrary::view(), at: prop::sample::Index, byte: u8) {
        let mut bytes = encoded(&NodeView::default().diff(&view));
        let at = at.index(bytes.len());
        bytes[at] = byte;
        if let Ok(delta) = ViewUpdate::decode(bytes.as_slice()).map_err(drop).and_then(|it| wire::delta(&it).map_err(drop)) {
            let mut damaged = NodeView::default();
            damaged.apply(delta);
            let _ = Snapshot::new("a", "1", &damaged);
        }
    }

    #[test]
    fn a_snapshot_finds_exactly_the_policies_that_select_a_workload(view in arbitrary::view()) {
        if let Ok(snapshot) = Snapshot::new("a", "1", &view) {
            for workload in snapshot.workloads() {
                let found: Vec<_> = snapshot.policies_of(workload).collect();
                let selecting: Vec<_> =
                    snapshot.policies().map(|it| &**it).filter(|it| it.selects(workload)).collect();
                prop_assert_eq!(found, selecting);
            }
        }
    }
}

fn encoded(delta: &Delta) -> Vec<u8> {
    wire::update("7".to_owned(), true, delta).encode_to_vec()
}

fn decoded(bytes: &[u8]) -> Delta {
    let update = ViewUpdate::decode(bytes).expect("what was encoded decodes");
    wire::delta(&update).expect("what was a view is one")
}
