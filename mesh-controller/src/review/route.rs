//! Routes that lead nowhere, that are for nobody, or whose rules never count.

use mesh_core::model::{
    Name,
    http::{BackendTarget, PathMatch, RequestMatch, RouteKind, RouteRule},
};

use super::{Review, near};
use crate::{
    model::{ObjectKey, Route, Service},
    routes::{Broken, NotAccepted, Outcome, Resolved, Why},
};

impl Review<'_> {
    pub(super) fn routes(&mut self, routes: &Resolved) {
        let model = self.model;
        for (name, outcome) in &routes.outcomes {
            let Some(route) = model.routes.get(name) else { continue };
            let key = ObjectKey { kind: route.kind.into(), name: route.name.clone() };
            self.references(&key, outcome);
            for (place, rule) in route.rules.iter().enumerate() {
                self.backends(&key, &format!("spec.rules[{place}]"), rule, &outcome.broken);
            }
            self.repeated_matches(&key, route);
        }
    }

    /// What a route refers to and does not reach.
    fn references(&mut self, key: &ObjectKey, outcome: &Outcome) {
        for (parent, error) in &outcome.parents {
            let Some(error) = error else { continue };
            let field = format!("spec.parentRefs[{}]", parent.index);
            let cure = match error {
                NotAccepted::NoService(service) => self.service_cure(service),
                NotAccepted::NoPort(parent) => self.port_cure(&parent.service),
                NotAccepted::NoAddress(_) | NotAccepted::Conflicted(..) | NotAccepted::TooMany { .. } => {
                    error.cure().unwrap_or_default().to_owned()
                }
            };
            self.warn(key, &field, format!("it is not in force there: {error}"), cure);
        }
        for (index, name) in &outcome.behind {
            let reason = format!("nothing comes to it: {name} is older, and for the same");
            let cure = "remove one of the two, or put the backends of both into one";
            self.warn(key, &format!("spec.parentRefs[{index}]"), reason, cure);
        }
        for broken in &outcome.broken {
            let cure = match &broken.why {
                Why::Kind => "refer to a Service: kind: Service, group: \"\"".to_owned(),
                Why::NotPermitted(service) => format!(
                    "write a ReferenceGrant in namespace {} from {}s of namespace {} to Service {}",
                    service.namespace, key.kind, key.name.namespace, service.name
                ),
                Why::NoService(service) => self.service_cure(service),
                Why::NoPort(service, _) => self.port_cure(service),
            };
            self.warn(key, &broken.field, broken.why.to_string(), cure);
        }
    }

    fn service_cure(&self, service: &Name) -> String {
        let of_namespace = |it: &&Service| it.name.namespace == service.namespace;
        let names = self.model.services.values().filter(of_namespace).map(|it| it.name.name.as_str());
        near(&service.name, names, "add the Service, or correct name and namespace")
    }

    fn port_cure(&self, service: &Name) -> String {
        let ports = self.model.services.get(service).into_iter().flat_map(|it| &it.ports);
        let ports: Vec<String> =
            ports.map(|it| format!("{} {}", it.port, it.name).trim().to_owned()).collect();
        format!("it has: {}", ports.join(", "))
    }

    /// Where the requests of a rule go, if anywhere.
    fn backends(&mut self, key: &ObjectKey, at: &str, rule: &RouteRule, broken: &[Broken]) {
        if rule.filters.redirect.is_some() {
            return;
        }
        let field = format!("{at}.backendRefs");
        if rule.backends.is_empty() {
            let cure = "write backendRefs, or a filter of type RequestRedirect";
            self.warn(key, at, "it leads nowhere: every request is answered with 500", cure);
        } else if rule.backends.iter().all(|backend| backend.weight == 0) {
            let reason = "no backend has any weight: every request is answered with 500";
            self.warn(key, &field, reason, "give one of them a weight");
        }
        for (place, backend) in rule.backends.iter().enumerate().filter(|(_, it)| it.weight > 0) {
            let BackendTarget::Service { service, port } = &backend.to else { continue };
            let field = format!("{field}[{place}]");
            if broken.iter().any(|it| it.field == field) {
                continue;
            }
            let services = self.common.services();
            let Ok(found) = services.binary_search_by(|it| it.name.cmp(service)) else { continue };
            let endpoints = services[found].ports.iter().find(|it| it.port == *port);
            if endpoints.is_some_and(|it| it.endpoints.is_empty()) {
                let reason = format!("port {port} of Service {service} has no endpoints");
                let cure = "see what is said of the Service, or give the backend the weight 0";
                self.warn(key, &field, reason, cure);
            }
        }
    }

    /// Rules whose every match stands in an earlier one, which comes first then.
    fn repeated_matches(&mut self, key: &ObjectKey, route: &Route) {
        let path = match route.kind {
            // Of connections there is one rule.
            RouteKind::Tls | RouteKind::Tcp => return,
            RouteKind::Http => PathMatch::default(),
            RouteKind::Grpc => PathMatch::Call { service: None, method: None },
        };
        let every = [RequestMatch { path, ..RequestMatch::default() }];
        let matches = |rule: &RouteRule| -> Vec<RequestMatch> {
            if rule.matches.is_empty() { every.to_vec() } else { rule.matches.clone() }
        };
        for (place, rule) in route.rules.iter().enumerate() {
            let earlier: Vec<Vec<RequestMatch>> = route.rules[..place].iter().map(matches).collect();
            let first_with = |it: &RequestMatch| earlier.iter().position(|matches| matches.contains(it));
            let Some(by) = matches(rule).iter().map(first_with).collect::<Option<Vec<usize>>>() else {
                continue;
            };
            let mut rules: Vec<String> = by.iter().map(|by| format!("spec.rules[{by}]")).collect();
            rules.dedup();
            self.warn(
                key,
                &format!("spec.rules[{place}].matches"),
                format!(
                    "no request falls under it: {} has the same matches and comes before it",
                    rules.join(", ")
                ),
                "remove it, or match something else",
            );
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{path::PathBuf, sync::Arc};

    use mesh_core::model::Mode;

    use crate::{
        review::review,
        source::ledger::{FileContent, Ledger},
    };

    const SHOP: &str = "
apiVersion: v1
kind: Namespace
metadata: {name: shop}
---
apiVersion: nodemesh.io/v1alpha1
kind: Workload
metadata: {name: web, namespace: shop, labels: {app: web}}
spec: {node: n, addresses: [10.0.0.1]}
---
apiVersion: v1
kind: Service
metadata: {name: web, namespace: shop}
spec: {clusterIP: 10.96.0.1, selector: {app: web}, ports: [{name: http, port: 80}]}
---
apiVersion: v1
kind: Service
metadata: {name: empty, namespace: shop}
spec: {clusterIP: 10.96.0.2, selector: {app: none}, ports: [{port: 80}]}
---
apiVersion: v1
kind: Service
metadata: {name: bank, namespace: bank}
spec: {clusterIP: 10.96.0.3, selector: {app: none}, ports: [{port: 80}]}
---
";

    /// A route that says this; expected: field, part of the reason, part of the cure.
    #[track_caller]
    fn check(spec: &str, expected: &[(&str, &str, &str)]) {
        let text = format!(
            "{SHOP}apiVersion: gateway.networking.k8s.io/v1\nkind: HTTPRoute\nmetadata: {{name: r, namespace: shop}}\n\
             spec: {{{spec}}}\n"
        );
        let files = [(PathBuf::from("a.yaml"), Arc::new(FileContent::parse(&text)))].into();
        let ledger = Ledger::default().next(&files);
        assert!(ledger.refused().is_empty(), "{:?}", ledger.refused());
        let found: Vec<_> = review(&ledger, Mode::default())
            .into_iter()
            .filter(|warning| warning.object == "HTTPRoute shop/r")
            .collect();
        assert_eq!(found.len(), expected.len(), "{found:#?}");
        for (warning, (field, reason, cure)) in found.iter().zip(expected) {
            assert_eq!(warning.field, *field, "{warning:?}");
            assert!(warning.reason.contains(reason) && warning.cure.contains(cure), "{warning:?}");
        }
    }

    fn for_web(rules: &str) -> String {
        format!("parentRefs: [{{group: '', kind: Service, name: web}}], rules: [{rules}]")
    }

    #[test]
    fn a_route_that_is_good_is_passed_over() {
        check(&for_web("{backendRefs: [{name: web, port: 80}]}"), &[]);
        check(&for_web("{filters: [{type: RequestRedirect, requestRedirect: {}}]}"), &[]);
    }

    #[test]
    fn parents_that_do_not_accept_it_are_told() {
        let with = |parent: &str| {
            format!(
                "parentRefs: [{{group: '', kind: Service, {parent}}}], rules: [{{backendRefs: [{{name: web, port: 80}}]}}]"
            )
        };
        check(&with("name: wev"), &[("spec.parentRefs[0]", "no Service shop/wev", "did you mean 'web'?")]);
        check(&with("name: web, port: 81"), &[("spec.parentRefs[0]", "no TCP port 81", "it has: 80 http")]);
    }

    #[test]
    fn references_that_lead_nowhere_are_told() {
        let at = "spec.rules[0].backendRefs[0]";
        let to = |backend: &str| for_web(&format!("{{backendRefs: [{{{backend}}}]}}"));
        check(&to("name: wev, port: 80"), &[(at, "no Service shop/wev", "did you mean 'web'?")]);
        check(&to("name: web, port: 81"), &[(at, "no TCP port 81", "it has: 80 http")]);
        check(
            &to("name: bank, namespace: bank, port: 80"),
            &[(
                at,
                "no ReferenceGrant",
                "in namespace bank from HTTPRoutes of namespace shop to Service bank",
            )],
        );
        check(&to("name: x, kind: Bucket, group: a.b"), &[(at, "only Services", "kind: Service")]);
        check(&to("name: empty, port: 80"), &[(at, "has no endpoints", "see what is said of the Service")]);
    }

    #[test]
    fn rules_that_lead_nowhere_or_never_count_are_told() {
        check(&for_web("{}"), &[("spec.rules[0]", "leads nowhere", "RequestRedirect")]);
        check(
            &for_web("{backendRefs: [{name: web, port: 80, weight: 0}]}"),
            &[("spec.rules[0].backendRefs", "any weight", "a weight")],
        );
        let web = "backendRefs: [{name: web, port: 80}]";
        let a = format!("{{matches: [{{path: {{value: /a}}}}], {web}}}");
        let b = format!("{{matches: [{{path: {{value: /b}}}}], {web}}}");
        let both = format!("{{matches: [{{path: {{value: /b/}}}}, {{path: {{value: /a}}}}], {web}}}");
        check(
            &for_web(&format!("{a}, {both}, {b}")),
            &[("spec.rules[2].matches", "spec.rules[1] has", "remove it")],
        );
        check(
            &for_web(&format!("{a}, {b}, {both}")),
            &[("spec.rules[2].matches", "spec.rules[1], spec.rules[0] has", "remove it")],
        );
        let slash = format!("{{matches: [{{path: {{value: /}}}}], {web}}}");
        check(
            &for_web(&format!("{{{web}}}, {slash}")),
            &[("spec.rules[1].matches", "spec.rules[0]", "remove it")],
        );
    }
}
