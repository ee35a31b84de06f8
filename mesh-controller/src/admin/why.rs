//! One connection, decided by the very functions that the agents run, and told step by step.

use std::{
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use mesh_core::{
    intake,
    model::{Endpoint, Name, Workload, traffic::Traffic},
    policy::{self, Content, Decision, Reads, Request, Verdict, decide},
    refusal::{Reason, Step},
    route::{self, Reached, Route, Transport},
    view::{Snapshot, SnapshotError},
};

use super::{
    answer::{End, Why, WhyStep},
    request::Request as AskedFor,
    traffic,
};
use crate::project::{Common, Failing};

/// Why a question cannot be answered.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum WhyError {
    /// The source is not a workload's name.
    #[error("the source '{0}' is not a workload; write NAMESPACE/NAME, of: meshctl get workloads")]
    Source(String),
    /// The destination has no port.
    #[error(
        "the destination '{0}' is not ADDRESS:PORT, [ADDRESS]:PORT or NAMESPACE/NAME:PORT; write, say, \
         10.96.0.1:80 or shop/web:80"
    )]
    Destination(String),
    /// The destination's name is not known.
    #[error("there is no service and no workload '{0}'; see: meshctl get services, meshctl get workloads")]
    Unknown(String),
    /// It has no address.
    #[error("'{0}' has no address to connect to (a headless service?); ask for one of its workloads")]
    NoAddress(String),
    /// The request is none.
    #[error("'{0}' is no request and no header; write, say, --request 'GET /cart?id=1' -H 'version: one'")]
    Request(String),
    /// The view cannot be indexed.
    #[error("the view cannot be put in force: {0}")]
    Snapshot(#[from] SnapshotError),
}

/// Tells what happens to a connection of `source` to `destination`, and to a request over it.
pub fn explain(
    common: &Common,
    source: &str,
    destination: &str,
    request: Option<&AskedFor>,
) -> Result<Why, WhyError> {
    explain_asked(common, source, destination, request, None)
}

/// The same, and to a connection that asks for a server by its name in TLS.
pub fn explain_asked(
    common: &Common,
    source: &str,
    destination: &str,
    request: Option<&AskedFor>,
    server_name: Option<&str>,
) -> Result<Why, WhyError> {
    let unknown_source = || WhyError::Source(source.chars().take(300).collect());
    let name: Name = source.parse().map_err(|_| unknown_source())?;
    let workload = common.workloads().iter().find(|it| it.name == name).ok_or_else(unknown_source)?;
    let snapshot = Snapshot::new(&workload.node, "", &common.view_of_all())?;
    let asked = resolve(&snapshot, workload, destination)?;
    let mut story =
        Story { snapshot: &snapshot, source: workload, asked, request, server_name, common, steps: vec![] };
    let ends = story.tell();
    Ok(Why { source: name.to_string(), destination: asked.to_string(), steps: story.steps, ends })
}

/// The address that the application would connect to.
fn resolve(snapshot: &Snapshot, source: &Workload, text: &str) -> Result<SocketAddr, WhyError> {
    if let Ok(address) = text.parse() {
        return Ok(address);
    }
    let malformed = || WhyError::Destination(text.chars().take(300).collect());
    let (name, port) = text.rsplit_once(':').ok_or_else(malformed)?;
    let port: u16 = port.parse().ok().filter(|port| *port != 0).ok_or_else(malformed)?;
    let name: Name = name.parse().map_err(|_| malformed())?;
    // Clients use a service's name; a workload of the same name is reached by its address.
    let addresses = match (snapshot.service(&name), snapshot.workload(&name)) {
        (Some(service), _) => &service.addresses,
        (None, Some(workload)) => &workload.addresses,
        (None, None) => return Err(WhyError::Unknown(name.to_string())),
    };
    let speaks = |address: &&IpAddr| source.addresses.iter().any(|own| own.is_ipv4() == address.is_ipv4());
    let address = addresses.iter().find(speaks).or(addresses.first());
    Ok(SocketAddr::new(*address.ok_or_else(|| WhyError::NoAddress(name.to_string()))?, port))
}

pub(super) struct Story<'a> {
    pub(super) snapshot: &'a Snapshot,
    pub(super) source: &'a Arc<Workload>,
    pub(super) asked: SocketAddr,
    pub(super) request: Option<&'a AskedFor>,
    common: &'a Common,
    /// The name that it asks for in TLS.
    pub(super) server_name: Option<&'a str>,
    steps: Vec<WhyStep>,
}

impl Story<'_> {
    fn tell(&mut self) -> Vec<End> {
        self.identify();
        if let Some((service, table)) = self.routed() {
            return self.requests(&service, &table);
        }
        if let Some((service, table)) = self.connections() {
            return self.connection(&service, &table);
        }
        let route = match route::outbound(self.snapshot, self.source, self.asked) {
            Ok(route) => route,
            Err(reason) => {
                self.step(Step::Route, format!("{}: {}", self.asked, reason.says()));
                return vec![refused(self.asked.to_string(), "", reason)];
            }
        };
        match route {
            Route::Outside(address) => {
                self.step(Step::Route, format!("{address} is not of the mesh: passed on as it is"));
                vec![allowed(
                    address.to_string(),
                    Transport::Plaintext,
                    "nobody in the mesh decides about it",
                )]
            }
            Route::Workload(workload, address) => {
                self.step(
                    Step::Route,
                    format!("{address} is workload {} on node {}", workload.name, workload.node),
                );
                vec![self.end(&workload, address)]
            }
            Route::Service { service, endpoints, .. } => {
                let count = endpoints.len();
                self.step(
                    Step::Route,
                    format!("{} is service {} with {count} ready endpoint(s)", self.asked, service.name),
                );
                let port = service.port(self.asked.port());
                port.iter().for_each(|port| self.sent(&port.traffic));
                self.unhealthy(&service.name, self.asked.port());
                self.endpoints(&endpoints)
            }
        }
    }

    /// What policies say of how it is sent.
    pub(super) fn sent(&mut self, traffic: &Traffic) {
        for says in traffic::words(traffic) {
            self.step(Step::Connect, format!("as a TrafficPolicy says: {says}"));
        }
    }

    /// What gets nothing, by its checks, or would get nothing if others were healthy.
    pub(super) fn unhealthy(&mut self, service: &Name, port: u16) {
        for Failing { endpoint, reason, asked } in self.common.failing(service, port) {
            let at = SocketAddr::new(endpoint.address, endpoint.port);
            let who = endpoint.workload.as_ref().map_or_else(|| at.to_string(), |it| format!("{it} at {at}"));
            let so = if *asked { "asked all the same, as too few are healthy" } else { "gets nothing" };
            self.step(Step::Balance, format!("{who} is unhealthy and {so}: {reason}"));
        }
    }

    /// How the connections to each endpoint end.
    pub(super) fn endpoints(&mut self, endpoints: &[Endpoint]) -> Vec<End> {
        let reach = |endpoint: &Endpoint| {
            let reached = route::reached(self.snapshot, endpoint)?;
            Some((reached, SocketAddr::new(endpoint.address, endpoint.port)))
        };
        let reached: Vec<_> = endpoints.iter().filter_map(reach).collect();
        let end = |(reached, address)| match reached {
            Reached::Workload(workload) => self.end(&workload, address),
            Reached::Outside => {
                let says = "the endpoint is no workload: nobody in the mesh decides about it";
                allowed(address.to_string(), Transport::Plaintext, says)
            }
        };
        reached.into_iter().map(end).collect()
    }

    fn identify(&mut self) {
        let identity = self.snapshot.identity(&self.source.name).map(ToString::to_string).unwrap_or_default();
        let says = match (self.source.enrolled, self.source.captured) {
            (true, true) => format!("{} is captured and speaks as {identity}", self.source.name),
            (true, false) => format!(
                "{} is enrolled as {identity}, but not captured yet: it speaks plaintext, as nobody",
                self.source.name
            ),
            (false, _) => format!("{} is not enrolled: it speaks plaintext, as nobody", self.source.name),
        };
        self.step(Step::Identify, says);
    }

    /// How the connection to one workload ends.
    fn end(&mut self, destination: &Workload, address: SocketAddr) -> End {
        let to = format!("{} at {address}", destination.name);
        if !destination.enrolled {
            self.step(Step::Connect, format!("{to} is not enrolled: plaintext"));
            return allowed(to, Transport::Plaintext, "the destination is not enrolled: no agent decides");
        }
        let transport = match self.transport(destination) {
            Ok(transport) => transport,
            Err(reason) => {
                self.step(Step::Connect, format!("{to}: {}", reason.says()));
                return End { mode: Some(destination.mode), ..refused(to, "", reason) };
            }
        };
        self.step(Step::Connect, format!("{to}: {}", word(transport)));
        let identity = self.snapshot.identity(&self.source.name).map(Arc::as_ref);
        let own = self.source.addresses.iter().find(|own| own.is_ipv4() == address.is_ipv4());
        let policies = self.snapshot.policies_of(destination);
        let request = Request {
            source: identity.filter(|_| transport == Transport::Tunnel),
            // Without an address of the family there is no such connection; what it would be is still told.
            source_address: own.or(self.source.addresses.first()).copied().unwrap_or(address.ip()),
            port: address.port(),
            content: Content::Requests,
        };
        // The connection is decided first; then whose the request is, and last what it asks.
        let connects = decide(destination.mode, policies.clone(), &request).verdict.allows();
        let of_user = match self.user(destination, address.port(), connects) {
            Ok(of_user) => of_user,
            Err(reason) => {
                return End { mode: Some(destination.mode), ..refused(to, word(transport), reason) };
            }
        };
        let asked = of_user.request.as_ref();
        let reading = asked.map(|it| it.reading().of_user(of_user.claims.as_ref()));
        let limited = self.snapshot.port_intake(&destination.name, address.port());
        let of_limits = if intake::is_read(limited) { Reads::Enforce } else { Reads::No };
        let reads = of_user.reads.max(of_limits).max(policy::reads(policies.clone(), address.port()));
        let content = match (reads, &reading) {
            (Reads::No, _) => Content::Bytes,
            (_, Some(reading)) => Content::Request(reading),
            (_, None) => Content::Requests,
        };
        let request = Request { content, ..request };
        let Decision { verdict, would_refuse } = decide(destination.mode, policies.clone(), &request);
        let would_refuse = of_user.would_refuse.filter(|_| verdict.allows()).or(would_refuse);
        let count = policies.count();
        let authorized =
            format!("{count} policy(ies) select {}, mode {}", destination.name, destination.mode);
        self.step(Step::Authorize, authorized);
        if matches!(content, Content::Requests) {
            let says =
                "requests to this port are read: each is decided for itself, and what is none is refused";
            self.step(Step::Authorize, says.to_owned());
        }
        if let Some(would) = &would_refuse {
            self.step(Step::Authorize, format!("audited policy {would} would refuse it, were it enforced"));
        }
        let too_large = limited.filter(|_| verdict.allows()).and_then(|limited| self.taken(limited));
        if let Some(reason) = too_large {
            return End { mode: Some(destination.mode), ..refused(to, word(transport), reason) };
        }
        let (end, rule) = match verdict {
            Verdict::AllowedByDefault => {
                let says = "no allow policy selects the destination and no deny rule matches";
                (allowed(to, transport, says), None)
            }
            Verdict::Allowed(rule) => (allowed(to, transport, "an allow rule matches"), Some(rule)),
            Verdict::ByRequest => {
                let says = "each request is decided for itself: name one with --request 'GET /path'";
                (End { verdict: "by request".into(), ..allowed(to, transport, says) }, None)
            }
            Verdict::Refused { reason, rule } => (refused(to, word(transport), reason), rule),
        };
        End {
            rule: rule.map(|rule| rule.to_string()),
            mode: Some(destination.mode),
            would_refuse: would_refuse.map(|would| would.to_string()),
            ..end
        }
    }

    /// A source that is not captured speaks plaintext whatever the destination could.
    fn transport(&self, destination: &Workload) -> Result<Transport, Reason> {
        if self.source.captured { route::transport(destination) } else { Ok(Transport::Plaintext) }
    }

    pub(super) fn step(&mut self, step: Step, says: String) {
        let step = match step {
            Step::Identify => "identify",
            Step::Route => "route",
            Step::Authorize => "authorize",
            Step::Balance => "balance",
            Step::Connect => "connect",
            Step::Relay => "relay",
        };
        self.steps.push(WhyStep { step: step.to_owned(), says });
    }
}

fn word(transport: Transport) -> &'static str {
    match transport {
        Transport::Tunnel => "tunnel",
        Transport::Plaintext => "plaintext",
    }
}

fn allowed(to: String, transport: Transport, says: &str) -> End {
    End {
        to,
        verdict: "allowed".into(),
        transport: word(transport).into(),
        rule: None,
        mode: None,
        would_refuse: None,
        reason: None,
        says: says.into(),
        cure: String::new(),
    }
}

pub(super) fn refused(to: String, transport: &str, reason: Reason) -> End {
    End {
        to,
        verdict: "refused".into(),
        transport: transport.into(),
        rule: None,
        mode: None,
        would_refuse: None,
        reason: Some(reason.label().into()),
        says: reason.says().into(),
        cure: reason.cure().into(),
    }
}

#[cfg(test)]
mod tests {
    use mesh_core::{identity::TrustDomain, model::Mode, view::Mesh};

    use super::*;
    use crate::{
        health::Heard,
        source::ledger::{FileContent, Ledger},
    };

    const MANIFESTS: &str = "
apiVersion: v1
kind: Namespace
metadata: {name: shop, labels: {nodemesh.io/enroll: 'true', nodemesh.io/mode: strict}}
---
apiVersion: nodemesh.io/v1alpha1
kind: Workload
metadata: {name: web, namespace: shop, labels: {app: web}}
spec: {node: a, addresses: [10.0.0.1, 'fd00::1'], serviceAccount: web}
---
apiVersion: nodemesh.io/v1alpha1
kind: Workload
metadata: {name: db, namespace: shop, labels: {app: db}}
spec: {node: b, addresses: [10.0.0.2, 'fd00::2'], serviceAccount: db}
---
apiVersion: nodemesh.io/v1alpha1
kind: Workload
metadata: {name: late, namespace: shop, labels: {app: late}}
spec: {node: b, addresses: [10.0.0.3]}
---
apiVersion: nodemesh.io/v1alpha1
kind: Workload
metadata: {name: legacy}
spec: {node: b, addresses: [10.0.0.4]}
---
apiVersion: v1
kind: Service
metadata: {name: db, namespace: shop}
spec: {clusterIP: 10.96.0.1, selector: {app: db}, ports: [{port: 5432, targetPort: 15432}]}
---
apiVersion: v1
kind: Service
metadata: {name: headless, namespace: shop}
spec: {clusterIP: None, selector: {app: db}, ports: [{port: 5432}]}
---
apiVersion: nodemesh.io/v1alpha1
kind: AuthorizationPolicy
metadata: {name: db-clients, namespace: shop}
spec:
  selector: {matchLabels: {app: db}}
  action: Allow
  rules: [{from: [{identities: [spiffe://td/ns/shop/sa/web]}], to: [{ports: [15432]}]}]
---
apiVersion: nodemesh.io/v1alpha1
kind: AuthorizationPolicy
metadata: {name: trial, namespace: shop}
spec:
  action: Deny
  enforcement: Audit
  rules: [{to: [{ports: [81]}]}, {from: [{notNamespaces: [other]}], to: [{notPorts: [80, 15432]}]}]
";

    fn common() -> Common {
        common_of(MANIFESTS)
    }

    fn common_of(manifests: &str) -> Common {
        let files = [("f".into(), Arc::new(FileContent::parse(manifests)))].into();
        let ledger = Ledger::default().next(&files);
        assert!(ledger.refused().is_empty(), "{:?}", ledger.refused());
        let captured = ["shop/web", "shop/db"].map(|name| name.parse().unwrap()).into();
        let heard = Heard { captured, ..Heard::default() };
        let mesh = Mesh { trust_domain: TrustDomain::parse("td").unwrap(), roots: vec![] };
        Common::new(&ledger.model(), Arc::new(mesh), &heard, Mode::default())
    }

    #[track_caller]
    fn check(source: &str, destination: &str, expected: &str) {
        let got = match explain(&common(), source, destination, None) {
            Ok(why) => {
                let end = &why.ends[0];
                let detail = end.reason.clone().or(end.rule.clone()).unwrap_or_default();
                format!("{} {} {detail}", end.verdict, end.transport)
            }
            Err(error) => error.to_string(),
        };
        assert!(got.contains(expected), "{source} to {destination}: {got}");
    }

    #[test]
    fn connections_are_decided_as_the_agents_do() {
        check("shop/web", "shop/db:5432", "allowed tunnel shop/db-clients[0]");
        check("shop/web", "10.96.0.1:5432", "allowed tunnel shop/db-clients[0]");
        check("shop/web", "10.96.0.1:80", "refused  no_such_service_port");
        check("shop/web", "10.0.0.2:22", "refused tunnel policy_not_allowed");
        check("shop/web", "[fd00::2]:15432", "allowed tunnel shop/db-clients[0]");
        check("shop/db", "shop/web:80", "allowed tunnel ");
        check("shop/web", "shop/late:80", "refused  destination_not_captured");
        check("shop/web", "default/legacy:80", "allowed plaintext");
        check("shop/web", "192.0.2.1:443", "allowed plaintext");
        check("default/legacy", "shop/db:5432", "refused plaintext plaintext_to_strict");
        check("shop/late", "shop/db:5432", "refused plaintext plaintext_to_strict");
    }

    #[test]
    fn requests_are_routed_as_the_agents_do() {
        let routes = "---
apiVersion: v1
kind: Service
metadata: {name: front, namespace: shop}
spec: {clusterIP: 10.96.0.2, ports: [{port: 80}]}
---
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {name: r, namespace: shop}
spec:
  parentRefs: [{group: '', kind: Service, name: front}]
  rules:
  - matches: [{path: {value: /db}, headers: [{name: version, value: one}]}]
    backendRefs: [{name: db, port: 5432}, {name: db, port: 1, weight: 0}]
  - {name: gone, matches: [{path: {value: /gone}}], backendRefs: [{name: none, port: 1}]}
  - {matches: [{path: {value: /old}}], filters: [{type: RequestRedirect, requestRedirect: {statusCode: 301}}]}
  - {matches: [{path: {value: /nowhere}}]}
";
        let common = common_of(&format!("{MANIFESTS}{routes}"));
        for (line, headers, verdict, rule, says) in [
            (
                "GET /db/1?a=b",
                "Version: one",
                "allowed",
                "spec.rules[0]: shop/db:5432",
                "an allow rule matches",
            ),
            ("GET /db/1", "", "refused", "", Reason::NoRule.says()),
            ("GET /gone", "", "refused", "spec.rules[1] 'gone': nowhere", Reason::NoBackend.says()),
            ("POST /old", "", "answered", "spec.rules[2]: redirect 301", "redirected with 301"),
            ("GET /nowhere", "", "refused", "spec.rules[3]: nowhere", Reason::NoBackend.says()),
        ] {
            let request = AskedFor::parse(line, headers).unwrap();
            let why = explain(&common, "shop/web", "shop/front:80", Some(&request)).unwrap();
            let end = &why.ends[0];
            assert_eq!(end.verdict, verdict, "{line}: {why:?}");
            assert!(end.says.starts_with(says), "{line}: {why:?}");
            let told = why.steps.iter().find(|step| step.says.contains("spec.rules"));
            assert!(told.map_or("", |step| &step.says).contains(rule), "{line}: {why:?}");
        }
        let why = explain(&common, "shop/web", "shop/front:80", None).unwrap();
        assert_eq!(why.ends[0].verdict, "routed");
        assert!(AskedFor::parse("/db", "").is_err() && AskedFor::parse("GET /db", "version").is_err());
    }

    #[test]
    fn connections_are_routed_as_the_agents_do() {
        let routes = "---
apiVersion: v1
kind: Service
metadata: {name: front, namespace: shop}
spec: {clusterIP: 10.96.0.2, ports: [{port: 5432}, {port: 443}]}
---
apiVersion: gateway.networking.k8s.io/v1
kind: TCPRoute
metadata: {name: t, namespace: shop}
spec:
  parentRefs: [{group: '', kind: Service, name: front, port: 5432}]
  rules: [{backendRefs: [{name: db, port: 5432, weight: 9}, {name: none, port: 1}]}]
---
apiVersion: gateway.networking.k8s.io/v1
kind: TLSRoute
metadata: {name: s, namespace: shop}
spec:
  parentRefs: [{group: '', kind: Service, name: front, port: 443}]
  hostnames: ['*.db.example']
  rules: [{backendRefs: [{name: db, port: 5432}]}]
";
        let common = common_of(&format!("{MANIFESTS}{routes}"));
        let why = |port: u16, name: Option<&str>| {
            explain_asked(&common, "shop/web", &format!("shop/front:{port}"), None, name).unwrap()
        };
        let of_tcp = why(5432, None);
        let ends: Vec<&str> = of_tcp.ends.iter().map(|end| end.verdict.as_str()).collect();
        assert_eq!(ends, ["allowed", "refused"], "{of_tcp:?}");
        assert_eq!(of_tcp.ends[0].rule.as_deref(), Some("shop/db-clients[0]"));
        assert_eq!(of_tcp.ends[1].reason.as_deref(), Some(Reason::NoBackend.label()));
        let told = |why: &Why, says: &str| why.steps.iter().any(|step| step.says.contains(says));
        assert!(told(&of_tcp, "TCPRoute shop/t: shop/db:5432 weight 9, nowhere weight 1"), "{of_tcp:?}");

        assert_eq!(why(443, None).ends[0].verdict, "routed");
        let named = why(443, Some("A.db.example"));
        assert!(
            named.ends[0].verdict == "allowed" && told(&named, "TLSRoute shop/s: shop/db:5432"),
            "{named:?}"
        );
        let other = why(443, Some("db.example"));
        assert_eq!(other.ends[0].reason.as_deref(), Some(Reason::NoServerName.label()), "{other:?}");
    }

    #[test]
    fn requests_are_authorized_as_the_agents_do() {
        let policies = "---
apiVersion: nodemesh.io/v1alpha1
kind: AuthorizationPolicy
metadata: {name: readers, namespace: shop}
spec:
  selector: {matchLabels: {app: web}}
  action: Allow
  rules: [{to: [{ports: [80], methods: [GET], notPaths: [/admin*]}]}]
";
        let common = common_of(&format!("{MANIFESTS}{policies}"));
        for (line, verdict, reason) in [
            ("GET /cart", "allowed", None),
            ("GET /ADMIN", "refused", Some("policy_not_allowed")),
            ("PUT /cart", "refused", Some("policy_not_allowed")),
        ] {
            let request = AskedFor::parse(line, "host: web").unwrap();
            let why = explain(&common, "shop/db", "shop/web:80", Some(&request)).unwrap();
            let end = &why.ends[0];
            assert_eq!((end.verdict.as_str(), end.reason.as_deref()), (verdict, reason), "{line}: {why:?}");
        }
        let why = explain(&common, "shop/db", "shop/web:80", None).unwrap();
        assert_eq!(why.ends[0].verdict, "by request", "{why:?}");
        assert!(why.steps.iter().any(|step| step.says.contains("what is none is refused")), "{why:?}");
    }

    #[test]
    fn whose_a_request_is_is_verified_as_the_agents_do() {
        let keys = include_str!("../../../mesh-core/src/authentication/vectors/jwks.json").replace('\n', "");
        // Until the year 2096.
        let tokens = include_str!("../../../mesh-core/src/authentication/vectors/tokens.txt");
        let token = tokens.lines().next().unwrap();
        let policies = format!(
            "---
apiVersion: nodemesh.io/v1alpha1
kind: AuthenticationPolicy
metadata: {{name: users, namespace: shop}}
spec:
  selector: {{matchLabels: {{app: web}}}}
  ports: [80]
  issuers: [{{issuer: 'https://id.example', audiences: [shop], jwks: {{inline: '{keys}'}}}}]
---
apiVersion: nodemesh.io/v1alpha1
kind: AuthorizationPolicy
metadata: {{name: ann, namespace: shop}}
spec:
  selector: {{matchLabels: {{app: web}}}}
  action: Deny
  rules: [{{to: [{{ports: [80], paths: [/admin], claims: [{{name: sub, values: [ann]}}]}}]}}]
"
        );
        let common = common_of(&format!("{MANIFESTS}{policies}"));
        let bearing = format!("host: web\nauthorization: Bearer {token}");
        let forged = format!("{bearing}x");
        for (line, headers, verdict, reason) in [
            ("GET /cart", bearing.as_str(), "allowed", None),
            ("GET /admin", &bearing, "refused", Some("policy_deny")),
            ("GET /cart", &forged, "refused", Some("token_malformed")),
            ("GET /cart", "host: web", "refused", Some("token_missing")),
        ] {
            let request = AskedFor::parse(line, headers).unwrap();
            let why = explain(&common, "shop/db", "shop/web:80", Some(&request)).unwrap();
            let end = &why.ends[0];
            assert_eq!((end.verdict.as_str(), end.reason.as_deref()), (verdict, reason), "{line}: {why:?}");
            assert!(
                why.steps.iter().any(|step| step.says.contains("AuthenticationPolicy shop/users")),
                "{why:?}"
            );
            assert!(!format!("{why:?}").contains(token), "and the token is not told");
        }
        let why = explain(&common, "shop/db", "shop/web:80", None).unwrap();
        assert!(why.steps.iter().any(|step| step.says.contains("their tokens verified")), "{why:?}");
    }

    #[test]
    fn what_a_destination_takes_is_told_as_its_agent_has_it() {
        let policies = "---
apiVersion: v1
kind: Service
metadata: {name: web, namespace: shop}
spec: {clusterIP: 10.96.0.3, selector: {app: web}, ports: [{port: 80, targetPort: 8080}]}
---
apiVersion: nodemesh.io/v1alpha1
kind: TrafficPolicy
metadata: {name: few, namespace: shop}
spec:
  targetRefs: [{kind: Service, name: web}]
  rateLimits: [{requests: 5}, {requests: 9, by: Identity, match: {paths: [/login]}}]
  sizeLimits: {bodyBytes: 10}
";
        let common = common_of(&format!("{MANIFESTS}{policies}"));
        let asked = |line: &str, headers: &str| {
            let request = AskedFor::parse(line, headers).unwrap();
            explain(&common, "shop/db", "shop/web:80", Some(&request)).unwrap()
        };
        let tells = |why: &Why, says: &str| why.steps.iter().any(|step| step.says.contains(says));
        let cart = asked("POST /cart", "host: web\ncontent-length: 10");
        assert_eq!(cart.ends[0].verdict, "allowed", "{cart:?}");
        assert!(tells(&cart, "bodies of requests of at most 10 bytes"), "{cart:?}");
        assert!(tells(&cart, "at most 9 requests in 1s from each identity, with path /login"), "{cart:?}");
        assert!(tells(&cart, "shop/few spec.rateLimits[0] counts it"), "{cart:?}");
        assert!(!tells(&cart, "spec.rateLimits[1] counts it"), "{cart:?}");
        assert!(tells(&asked("GET /login", "host: web"), "spec.rateLimits[1] counts it"));
        let large = asked("POST /cart", "host: web\ncontent-length: 11");
        assert_eq!(large.ends[0].reason.as_deref(), Some("limit_body"), "{large:?}");
        let why = explain(&common, "shop/db", "shop/web:80", None).unwrap();
        assert!(tells(&why, "what is none is refused"), "{why:?}");
    }

    #[test]
    fn what_an_audited_policy_would_refuse_is_told() {
        let why = explain(&common(), "shop/db", "shop/web:82", None).unwrap();
        let end = &why.ends[0];
        assert_eq!((end.verdict.as_str(), end.mode), ("allowed", Some(Mode::Strict)));
        assert_eq!(end.would_refuse.as_deref(), Some("shop/trial[1] (policy_deny)"));
        assert!(why.steps.iter().any(|step| step.says.contains("were it enforced")), "{why:?}");
        assert_eq!(explain(&common(), "shop/db", "shop/web:80", None).unwrap().ends[0].would_refuse, None);
    }

    #[test]
    fn questions_without_an_answer_say_what_to_write() {
        check("web", "10.0.0.1:80", "NAMESPACE/NAME");
        check("shop/none", "10.0.0.1:80", "meshctl get workloads");
        check("shop/web", "10.0.0.1", "ADDRESS:PORT");
        check("shop/web", "shop/db:0", "ADDRESS:PORT");
        check("shop/web", "shop/none:1", "no service and no workload");
        check("shop/web", "shop/headless:5432", "headless");
    }
}
