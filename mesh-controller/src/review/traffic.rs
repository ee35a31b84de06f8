//! TrafficPolicies that are for nothing, for what another one speaks of, or of requests that are not read.

use super::{Review, near};
use crate::{
    model::{Kind, ObjectKey, TrafficTarget},
    routes::{self, Unread},
    traffic::{self, NotInForce},
};

impl Review<'_> {
    pub(super) fn traffic(&mut self, traffic: &traffic::Resolved, routes: &routes::Resolved) {
        for (name, outcome) in &traffic.outcomes {
            let key = ObjectKey { kind: Kind::TrafficPolicy, name: name.clone() };
            for (index, (target, why)) in outcome.targets.iter().enumerate() {
                let Some(why) = why else { continue };
                let field = format!("spec.targetRefs[{index}]");
                let cure = self.traffic_cure(&key.name.namespace, target, why);
                self.warn(&key, &field, format!("{target}: {why}"), cure);
            }
            // Whoever speaks of a whole namespace knows that not all of it is read.
            let unread = routes.unread.get(name).into_iter().flatten();
            for unread in unread.filter(|it| !it.of_namespace) {
                let place = outcome.targets.iter().position(|(target, _)| self.is_for(target, unread));
                let field = format!("spec.targetRefs[{}]", place.unwrap_or_default());
                self.warn(&key, &field, unread.to_string(), unread.cure());
            }
        }
    }

    /// Whether a target is the port, or its Service.
    fn is_for(&self, target: &TrafficTarget, unread: &Unread) -> bool {
        let TrafficTarget::Service { name, port } = target else { return false };
        let ports = self.model.services.get(&unread.service).into_iter().flat_map(|it| &it.ports);
        let is_it = |of: &String| ports.clone().any(|it| it.port == unread.port && it.name == *of);
        *name == unread.service.name && port.as_ref().is_none_or(is_it)
    }

    fn traffic_cure(&self, namespace: &str, target: &TrafficTarget, why: &NotInForce) -> String {
        match (why, target) {
            (NotInForce::Conflicted { .. }, _) => "say it in one of the two alone".to_owned(),
            (NotInForce::NoSection, _) => "leave sectionName out, or correct it".to_owned(),
            (NotInForce::NoTarget, TrafficTarget::Route { kind, name, .. }) => {
                let routes = self.model.routes.keys();
                let names = routes.filter(|(of, it)| of == kind && it.namespace == namespace);
                near(name, names.map(|(_, it)| it.name.as_str()), "add the route, or correct the name")
            }
            (NotInForce::NoTarget, TrafficTarget::Service { name, .. }) => {
                let names = self.model.services.keys().filter(|it| it.namespace == namespace);
                near(name, names.map(|it| it.name.as_str()), "add the Service, or correct the name")
            }
            (NotInForce::NoTarget, TrafficTarget::Namespace) => String::new(),
        }
    }
}
