//! The status of a route: for each parent that is a Service, whether it is in force there, and whether what it refers to
//! is there (Gateway API, `RouteParentStatus`). The list of parents is one value to the API server, and other controllers'
//! entries are in it: it is written as it was read with ours in it, against the version that was read.

use k8s_openapi::jiff::Timestamp;
use kube::api::DynamicObject;
use mesh_core::model::Name;
use serde_json::{Value, json};

use super::verdict::{ACCEPTED, Verdict, conditions};
use crate::{
    model::ParentRef,
    routes::{NotAccepted, Outcome},
    source::{Refused, manifest::GATEWAY_GROUP},
};

/// Whose entries are ours.
pub(crate) const CONTROLLER: &str = "nodemesh.io/controller";
/// That all of what a route refers to is there, and may be referred to.
const RESOLVED_REFS: &str = "ResolvedRefs";

/// What a route says of its parents, and what its status does.
#[derive(Debug, Clone, PartialEq)]
pub(in crate::source::kube) struct Attached {
    /// `spec.parentRefs`.
    parents: Vec<Value>,
    /// `status.parents`.
    said: Vec<Value>,
}

impl Attached {
    pub(in crate::source::kube) fn of(object: &DynamicObject) -> Self {
        let list = |value: &Value| value.as_array().cloned().unwrap_or_default();
        Self {
            parents: list(&object.data["spec"]["parentRefs"]),
            said: list(&object.data["status"]["parents"]),
        }
    }

    /// What its status has to say of each of its parents that are Services, by their places.
    pub(super) fn verdicts(
        &self,
        problems: &[&Refused],
        outcome: Option<&Outcome>,
    ) -> Vec<(usize, Vec<Verdict>)> {
        if !problems.is_empty() {
            let is_service = |(_, parent): &(usize, &Value)| {
                let group = parent["group"].as_str().unwrap_or_default();
                parent["kind"] == "Service" && ["", GATEWAY_GROUP].contains(&group)
            };
            let services = self.parents.iter().enumerate().filter(is_service);
            let refused = Verdict::refused("UnsupportedValue", problems);
            return services.map(|(place, _)| (place, vec![refused.clone()])).collect();
        }
        let Some(outcome) = outcome else { return vec![] };
        let resolved = resolved(outcome);
        let verdicts = |index: usize, error: &Option<NotAccepted>| {
            let behind = outcome.behind.iter().find(|(at, _)| *at == index).map(|(_, name)| name);
            vec![accepted(error.as_ref(), behind), resolved.clone()]
        };
        let of = |(parent, error): &(ParentRef, _)| (parent.index, verdicts(parent.index, error));
        outcome.parents.iter().map(of).collect()
    }

    /// What `status.parents` has to be; nothing if it says all of this, and of us nothing else.
    pub(super) fn missing(
        &self,
        verdicts: &[(usize, Vec<Verdict>)],
        generation: i64,
        now: Timestamp,
    ) -> Option<Value> {
        let (ours, others): (Vec<&Value>, Vec<&Value>) =
            self.said.iter().partition(|it| it["controllerName"] == CONTROLLER);
        let mut told = ours.len() == verdicts.len();
        let mut entries: Vec<Value> = others.into_iter().cloned().collect();
        for (place, verdicts) in verdicts {
            let Some(parent) = self.parents.get(*place) else { continue };
            let said = ours.iter().find(|it| it["parentRef"] == *parent).map(|it| conditions(it));
            let said = said.unwrap_or_default();
            told &= said.len() == verdicts.len() && verdicts.iter().all(|it| it.is_told(&said, generation));
            let conditions: Vec<_> = verdicts.iter().map(|it| it.condition(&said, generation, now)).collect();
            entries
                .push(json!({"parentRef": parent, "controllerName": CONTROLLER, "conditions": conditions}));
        }
        (!told).then_some(Value::Array(entries))
    }
}

fn accepted(error: Option<&NotAccepted>, behind: Option<&Name>) -> Verdict {
    match error {
        None if let Some(name) = behind => {
            let message = format!("{name} is older and for the same, so that nothing comes to this one.");
            Verdict::new(ACCEPTED, true, "Accepted", &message)
        }
        None => Verdict::new(ACCEPTED, true, "Accepted", "It is in force."),
        Some(error) => {
            let cure = error.cure().map(|cure| format!(". Cure: {cure}.")).unwrap_or_default();
            Verdict::new(ACCEPTED, false, error.reason(), &format!("{error}{cure}"))
        }
    }
}

/// The reason is the first's, the message has all.
fn resolved(outcome: &Outcome) -> Verdict {
    let Some(first) = outcome.broken.first() else {
        return Verdict::new(RESOLVED_REFS, true, RESOLVED_REFS, "All references lead to Services.");
    };
    let lines: Vec<String> = outcome.broken.iter().map(|it| format!("{}: {}.", it.field, it.why)).collect();
    let message = format!(
        "{} Its share of the requests is answered with 500, of connections refused.",
        lines.join(" ")
    );
    Verdict::new(RESOLVED_REFS, false, first.why.reason(), &message)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::routes::{Broken, Why};

    fn parent(index: usize, name: &str) -> ParentRef {
        ParentRef { index, service: Name::new("shop", name), port: None, section: None }
    }

    fn attached(said: Value) -> Attached {
        let service = |name: &str| json!({"group": "", "kind": "Service", "name": name});
        let gateway = json!({"group": "gateway.networking.k8s.io", "kind": "Gateway", "name": "g"});
        let object: DynamicObject = serde_json::from_value(json!({
            "metadata": {"name": "r", "namespace": "shop"},
            "spec": {"parentRefs": [gateway, service("a"), service("b")]},
            "status": {"parents": said},
        }))
        .unwrap();
        Attached::of(&object)
    }

    fn outcome() -> Outcome {
        let missing = NotAccepted::NoService(Name::new("shop", "b"));
        let broken = |name: &str| Broken {
            field: "spec.rules[0].backendRefs[0]".into(),
            why: Why::NoService(Name::new("shop", name)),
        };
        Outcome {
            parents: vec![(parent(1, "a"), None), (parent(2, "b"), Some(missing))],
            broken: vec![broken("x"), broken("y")],
            behind: vec![],
        }
    }

    fn said(parents: &Value) -> Vec<String> {
        let words = |entry: &Value| {
            let of =
                |it: &Value| format!("{}={} {}", it["type"], it["status"], it["reason"]).replace('"', "");
            let conditions: Vec<String> = entry["conditions"].as_array().unwrap().iter().map(of).collect();
            format!("{} {}", entry["parentRef"]["name"].as_str().unwrap(), conditions.join(", "))
        };
        parents.as_array().unwrap().iter().map(words).collect()
    }

    #[test]
    fn each_parent_that_is_a_service_has_an_entry_and_others_keep_theirs() {
        let theirs = json!({
            "controllerName": "example.net/gateways",
            "parentRef": {"name": "g"},
            "conditions": [{"type": "Accepted", "status": "True", "reason": "Accepted"}],
        });
        let attached_with = attached(json!([theirs]));
        let verdicts = attached_with.verdicts(&[], Some(&outcome()));
        let written = attached_with.missing(&verdicts, 1, Timestamp::now()).unwrap();
        assert_eq!(
            said(&written),
            [
                "g Accepted=True Accepted",
                "a Accepted=True Accepted, ResolvedRefs=False BackendNotFound",
                "b Accepted=False NoMatchingParent, ResolvedRefs=False BackendNotFound",
            ]
        );
        assert_eq!(written[0], theirs);
        let message = written[1]["conditions"][1]["message"].as_str().unwrap();
        assert!(message.contains("shop/x") && message.contains("shop/y"), "{message}");

        let again = attached(written.clone());
        assert_eq!(again.missing(&verdicts, 1, Timestamp::now()), None, "it is said already");
        assert!(again.missing(&verdicts, 2, Timestamp::now()).is_some(), "of another generation");
        let fewer = again.missing(&verdicts[..1], 1, Timestamp::now()).unwrap();
        assert_eq!(said(&fewer).len(), 2, "what is no parent any more has no entry");
        let none = again.missing(&again.verdicts(&[], None), 1, Timestamp::now()).unwrap();
        assert_eq!(none, json!([theirs]), "a route of others has none of ours");
        assert_eq!(attached(none).missing(&[], 1, Timestamp::now()), None);
    }

    #[test]
    fn a_route_that_is_accepted_behind_another_says_so() {
        let behind = Outcome { behind: vec![(2, Name::new("shop", "older"))], ..outcome() };
        let behind =
            Outcome { parents: behind.parents.into_iter().map(|(it, _)| (it, None)).collect(), ..behind };
        let attached = attached(json!([]));
        let verdicts = attached.verdicts(&[], Some(&behind));
        let written = attached.missing(&verdicts, 1, Timestamp::now()).unwrap();
        let accepted = [0, 1].map(|at| {
            let condition = &written[at]["conditions"][0];
            assert_eq!((&condition["status"], &condition["reason"]), (&json!("True"), &json!("Accepted")));
            condition["message"].as_str().unwrap().to_owned()
        });
        assert_eq!(accepted[0], "It is in force.");
        assert!(accepted[1].starts_with("shop/older is older and for the same"), "{accepted:?}");
    }

    #[test]
    fn a_route_that_is_refused_is_accepted_by_none_of_its_services() {
        let refused = Refused {
            file: "kubernetes/httproutes/shop/r".into(),
            line: 1,
            object: Some("HTTPRoute shop/r".into()),
            field: "spec.rules[0].filters[0].type".into(),
            reason: "a filter of type ExtensionRef is not supported in HTTPRoutes".into(),
            cure: "use one of: RequestHeaderModifier".into(),
            last_good_in_force: true,
        };
        let attached = attached(json!([]));
        let verdicts = attached.verdicts(&[&refused], Some(&outcome()));
        let written = attached.missing(&verdicts, 1, Timestamp::now()).unwrap();
        assert_eq!(
            said(&written),
            ["a Accepted=False UnsupportedValue", "b Accepted=False UnsupportedValue"]
        );
        let message = written[0]["conditions"][0]["message"].as_str().unwrap();
        assert!(message.contains("ExtensionRef") && message.contains("last good version"), "{message}");
    }
}
