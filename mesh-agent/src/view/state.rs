//! The view that this node holds, and what an update makes of it: everything or nothing. Pure.

use std::sync::Arc;

use mesh_core::{
    identity::TrustDomain,
    version::{Succession, Version},
    view::{Delta, NodeView, Snapshot, SnapshotError},
    wire::{self, WireError, proto},
};
use rustls::RootCertStore;

/// The most roots that a trust domain can have at a time; a rotation has two.
const MAX_ROOTS: usize = 16;

/// Why an update cannot be put in force.
#[derive(Debug, thiserror::Error)]
pub enum UpdateError {
    /// Difference to a view that we do not have.
    #[error("the first update of an agent without a view must be complete")]
    NotComplete,
    /// No controller that is in order counts down.
    #[error("its version is older than {0}, which this node has of the same start of the controller")]
    Backward(String),
    /// A resource does not convert.
    #[error(transparent)]
    Wire(#[from] WireError),
    /// The whole makes no sense.
    #[error(transparent)]
    Snapshot(#[from] SnapshotError),
    /// The node's certificate is of another trust domain.
    #[error("the view is of trust domain {found}, this node is in {node}: join again")]
    TrustDomain {
        /// The view's.
        found: TrustDomain,
        /// The node's.
        node: TrustDomain,
    },
    /// Without roots no certificate could be checked.
    #[error("the view has {0} roots, at least 1 and at most {MAX_ROOTS} can be")]
    RootCount(usize),
    /// A root is not a certificate.
    #[error("the view's root number {number} is not a certificate: {error}")]
    Root {
        /// Its place, from 1.
        number: usize,
        /// What is wrong with it.
        error: rustls::Error,
    },
}

/// What an update made.
#[derive(Debug)]
pub struct Applied {
    /// The view, now in force.
    pub snapshot: Arc<Snapshot>,
    /// The roots are not what they were.
    pub roots_changed: bool,
    /// The controller that sent it was restored from an older state than the one whose view was in force before.
    pub restored: bool,
}

/// The view that this node holds.
#[derive(Debug)]
pub struct ViewState {
    node: String,
    trust_domain: TrustDomain,
    version: String,
    view: NodeView,
    roots: Vec<Vec<u8>>,
}

impl ViewState {
    /// No view yet.
    pub fn new(node: &str, trust_domain: TrustDomain) -> Self {
        let (version, view, roots) = (String::new(), NodeView::default(), Vec::new());
        Self { node: node.to_owned(), trust_domain, version, view, roots }
    }

    /// The version of the view held; empty when there is none.
    pub fn version(&self) -> &str {
        &self.version
    }

    /// The view held as one complete update.
    pub fn to_update(&self) -> proto::ViewUpdate {
        let whole = Delta { upserts: self.view.resources().cloned().collect(), removes: Vec::new() };
        wire::update(self.version.clone(), true, &whole)
    }

    /// Puts an update in force; after an error everything is as it was.
    pub fn apply(&mut self, update: &proto::ViewUpdate) -> Result<Applied, UpdateError> {
        if !update.complete && self.version.is_empty() {
            return Err(UpdateError::NotComplete);
        }
        let succession = self.succession(&update.version);
        if succession == Succession::Backward {
            return Err(UpdateError::Backward(self.version.clone()));
        }
        let mut view = if update.complete { NodeView::default() } else { self.view.clone() };
        view.apply(wire::delta(update)?);
        let snapshot = Snapshot::new(&self.node, &update.version, &view)?;
        self.check(&snapshot)?;
        let roots_changed = self.roots != snapshot.mesh().roots;
        if roots_changed {
            self.roots.clone_from(&snapshot.mesh().roots);
        }
        self.version.clone_from(&update.version);
        self.view = view;
        let restored = succession == Succession::Restored;
        Ok(Applied { snapshot: Arc::new(snapshot), roots_changed, restored })
    }

    /// What is not a version of ours tells nothing.
    fn succession(&self, next: &str) -> Succession {
        match (next.parse::<Version>(), self.version.parse()) {
            (Ok(next), Ok(held)) => next.after(&held),
            _ => Succession::Onward,
        }
    }

    fn check(&self, snapshot: &Snapshot) -> Result<(), UpdateError> {
        let mesh = snapshot.mesh();
        if mesh.trust_domain != self.trust_domain {
            let (found, node) = (mesh.trust_domain.clone(), self.trust_domain.clone());
            return Err(UpdateError::TrustDomain { found, node });
        }
        if mesh.roots.is_empty() || mesh.roots.len() > MAX_ROOTS {
            return Err(UpdateError::RootCount(mesh.roots.len()));
        }
        for (number, root) in (1..).zip(&mesh.roots) {
            let mut store = RootCertStore::empty();
            store.add(root.clone().into()).map_err(|error| UpdateError::Root { number, error })?;
        }
        Ok(())
    }
}

#[cfg(test)]
pub(super) mod tests {
    use std::collections::BTreeMap;

    use mesh_core::{
        model::{Mode, Name, Workload},
        view::{Mesh, Resource},
    };

    use super::*;

    pub(in super::super) fn trust_domain() -> TrustDomain {
        TrustDomain::parse("td").unwrap()
    }

    fn root() -> Vec<u8> {
        let key = rcgen::KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256).unwrap();
        rcgen::CertificateParams::default().self_signed(&key).unwrap().der().to_vec()
    }

    pub(in super::super) fn mesh(roots: Vec<Vec<u8>>) -> Resource {
        Resource::Mesh(Arc::new(Mesh { trust_domain: trust_domain(), roots }))
    }

    fn workload(name: &str) -> Resource {
        Resource::Workload(Arc::new(Workload {
            name: Name::new("shop", name),
            uid: String::new(),
            node: "n1".into(),
            service_account: name.into(),
            addresses: vec!["10.0.0.1".parse().unwrap()],
            labels: BTreeMap::new(),
            enrolled: true,
            captured: false,
            mode: Mode::Permissive,
            checks: vec![],
        }))
    }

    pub(in super::super) fn update(
        version: &str,
        complete: bool,
        upserts: Vec<Resource>,
        removes: &[&str],
    ) -> proto::ViewUpdate {
        let removes = removes.iter().map(|key| key.parse().unwrap()).collect();
        wire::update(version.into(), complete, &Delta { upserts, removes })
    }

    fn names(applied: &Applied) -> Vec<String> {
        applied.snapshot.workloads().map(|workload| workload.name.name.clone()).collect()
    }

    #[test]
    fn a_complete_update_replaces_and_a_difference_adds_and_removes() {
        let mut state = ViewState::new("n1", trust_domain());
        let root = root();
        let first =
            state.apply(&update("1", true, vec![mesh(vec![root.clone()]), workload("a")], &[])).unwrap();
        assert_eq!((names(&first), first.roots_changed), (vec!["a".into()], true));
        let second = state.apply(&update("2", false, vec![workload("b")], &["workload/shop/a"])).unwrap();
        assert_eq!((names(&second), second.roots_changed), (vec!["b".into()], false));
        assert_eq!(second.snapshot.version(), "2");
        let third = state.apply(&update("3", true, vec![mesh(vec![root])], &[])).unwrap();
        assert_eq!((names(&third), third.roots_changed), (vec![], false));
    }

    #[test]
    fn a_bad_update_changes_nothing() {
        let mut state = ViewState::new("n1", trust_domain());
        state.apply(&update("1", true, vec![mesh(vec![root()]), workload("a")], &[])).unwrap();
        let held = state.to_update();
        let other = Resource::Mesh(Arc::new(Mesh {
            trust_domain: TrustDomain::parse("other").unwrap(),
            roots: vec![root()],
        }));
        let unreadable = proto::ViewUpdate {
            version: "2".into(),
            upserts: vec![proto::Resource { key: "workload/shop/b".into(), body: None }],
            ..Default::default()
        };
        for bad in [
            unreadable,
            update("2", false, vec![workload("b")], &["mesh"]),
            update("2", true, vec![workload("b")], &[]),
            update("2", false, vec![workload("b"), mesh(vec![])], &[]),
            update("2", false, vec![workload("b"), mesh(vec![vec![1]])], &[]),
            update("2", false, vec![workload("b"), mesh(vec![root(); 17])], &[]),
            update("2", false, vec![workload("b"), other], &[]),
        ] {
            state.apply(&bad).unwrap_err();
            assert_eq!(state.to_update(), held);
        }
    }

    #[test]
    fn an_epochs_older_view_is_refused_and_a_restored_controllers_is_taken_and_told() {
        let mut state = ViewState::new("n1", trust_domain());
        let root = root();
        let mut apply =
            |version: &str| state.apply(&update(version, true, vec![mesh(vec![root.clone()])], &[]));
        assert!(!apply("2.a-5").unwrap().restored);
        let error = apply("2.a-4").unwrap_err();
        assert!(matches!(error, UpdateError::Backward(_)), "{error}");
        assert!(!apply("2.a-6").unwrap().restored);
        assert!(apply("1.b-1").unwrap().restored);
        assert!(!apply("3.c-1").unwrap().restored);
    }

    #[test]
    fn a_difference_to_nothing_is_refused() {
        let mut state = ViewState::new("n1", trust_domain());
        let error = state.apply(&update("1", false, vec![mesh(vec![root()])], &[])).unwrap_err();
        assert!(matches!(error, UpdateError::NotComplete));
    }

    #[test]
    fn the_view_held_makes_the_same_view_elsewhere() {
        let mut state = ViewState::new("n1", trust_domain());
        state.apply(&update("1", true, vec![mesh(vec![root()]), workload("a")], &[])).unwrap();
        let mut other = ViewState::new("n1", trust_domain());
        other.apply(&state.to_update()).unwrap();
        assert_eq!(other.to_update(), state.to_update());
        assert_eq!(other.version(), "1");
    }
}
