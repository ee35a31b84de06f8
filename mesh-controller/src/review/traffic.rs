//! TrafficPolicies that are for nothing, or for what another one speaks of.

use super::{Review, near};
use crate::{
    model::{Kind, ObjectKey, TrafficTarget},
    traffic::{NotInForce, resolve},
};

impl Review<'_> {
    pub(super) fn traffic(&mut self) {
        for (name, outcome) in resolve(self.model).outcomes {
            let key = ObjectKey { kind: Kind::TrafficPolicy, name };
            for (index, (target, why)) in outcome.targets.iter().enumerate() {
                let Some(why) = why else { continue };
                let field = format!("spec.targetRefs[{index}]");
                let cure = self.traffic_cure(&key.name.namespace, target, why);
                self.warn(&key, &field, format!("{target}: {why}"), cure);
            }
        }
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
