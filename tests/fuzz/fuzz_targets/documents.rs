//! Manifests, as somebody may write them.
//!
//! Claims: every document is accepted or refused with a line that exists, a reason and a cure; reading twice gives the
//! same; and what is accepted is never too much for an agent: the views that it makes cross the wire unchanged and can
//! be put in force on every node.
#![no_main]

use std::{collections::BTreeMap, path::PathBuf, sync::Arc};

use libfuzzer_sys::fuzz_target;
use mesh_controller::{
    health::Heard,
    project::Common,
    source::ledger::{FileContent, Ledger},
};
use mesh_core::{
    identity::TrustDomain,
    view::{Mesh, NodeView, Snapshot},
    wire,
};

fuzz_target!(|input: &[u8]| {
    // What is not text is refused before it comes here.
    let Ok(text) = std::str::from_utf8(input) else { return };
    let content = FileContent::parse(text);
    assert_eq!(content, FileContent::parse(text), "the same text means the same");
    let files = BTreeMap::from([(PathBuf::from("a.yaml"), Arc::new(content))]);
    let ledger = Ledger::default().next(&files);
    // A carriage return alone ends a line, too (YAML 1.2.2 §5.4).
    let lines = text.split(['\n', '\r']).count();
    for refused in ledger.refused() {
        assert!((1..=lines).contains(&refused.line), "line {} of {lines}: {refused}", refused.line);
        assert!(!refused.reason.is_empty() && !refused.cure.is_empty(), "{refused:?}");
        assert!(!refused.last_good_in_force || ledger.documents_accepted() > 0, "{refused:?}");
    }
    assert_eq!(ledger.next(&files), ledger, "looking again changes nothing");

    let model = ledger.model();
    let trust_domain = TrustDomain::parse("td").expect("a trust domain");
    let mesh = Arc::new(Mesh { trust_domain, roots: vec![vec![1]] });
    let common = Common::new(&model, mesh, &Heard::default(), mesh_core::model::Mode::Permissive);
    for node in model.nodes() {
        let view = common.view(node);
        let delta = NodeView::default().diff(&view);
        let sent = wire::update("1".into(), true, &delta);
        assert_eq!(wire::delta(&sent).as_ref(), Ok(&delta), "an agent reads what the controller sends");
        assert!(Snapshot::new(node, "1", &view).is_ok(), "and can put it in force");
    }
});
