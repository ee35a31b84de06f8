//! The systems that are compared: the same world under each, and what runs on top of it.

use std::{fmt, net::SocketAddr, process::Stdio};

use anyhow::{Context, Result};
use mesh_tests::{Workload, World, process::Program, wait};

use super::{load, peers};

/// Where the server pod serves small HTTP/1.1 answers.
pub(super) const HTTP: u16 = 8080;
/// Where it serves the same by HTTP/2, with prior knowledge.
pub(super) const HTTP2: u16 = 8081;
/// Where it serves iperf3.
pub(super) const IPERF: u16 = 5201;
/// Where it takes everything and reads nothing.
pub(super) const SINK: u16 = 9000;

/// Routes that read all requests; those of HTTP/1.1 say so.
const ROUTES: &str = "
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {namespace: bench, name: http}
spec:
  parentRefs: [{group: '', kind: Service, name: http}]
  rules:
  - filters: [{type: ResponseHeaderModifier, responseHeaderModifier: {set: [{name: x-by, value: route}]}}]
    backendRefs: [{name: http, port: 8080}]
---
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {namespace: bench, name: http2}
spec:
  parentRefs: [{group: '', kind: Service, name: http2}]
  rules: [{backendRefs: [{name: http2, port: 8081}]}]
";
/// What they say.
const BY_A_ROUTE: &str = "x-by: route";
/// Where the former is, and where a change's number comes in.
const ROUTES_FILE: &str = "routes.yaml";
const ROUTE_SAYS: &str = "{name: x-by, value: route}";
/// Most rules of a route (Gateway API, `HTTPRoute.spec.rules`).
const RULES_OF_A_ROUTE: usize = 16;

/// Routes of the same service for paths that nobody asks for, with so many rules together.
fn other_routes(rules: usize) -> String {
    let route = |first: usize| {
        let mut text = format!(
            "---
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {{namespace: bench, name: other-{first}}}
spec:
  parentRefs: [{{group: '', kind: Service, name: http}}]
  rules:
"
        );
        for rule in first..rules.min(first + RULES_OF_A_ROUTE) {
            text += &format!(
                "  - {{matches: [{{path: {{type: PathPrefix, value: /other/{rule}}}}}], backendRefs: [{{name: http, port: {HTTP}}}]}}\n"
            );
        }
        text
    };
    (0..rules).step_by(RULES_OF_A_ROUTE).map(route).collect()
}

/// Which system.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, clap::ValueEnum)]
pub(crate) enum Kind {
    /// The world alone.
    NoMesh,
    /// Two agents.
    Nodemesh,
    /// Two sidecars of Envoy, TCP proxy.
    Envoy,
    /// Two sidecars of HAProxy, TCP mode.
    Haproxy,
    /// Two sidecars of nginx, stream module.
    Nginx,
    /// Two agents, and a route for the service: the client's agent reads requests.
    NodemeshHttp,
    /// Two sidecars of Envoy that read requests.
    EnvoyHttp,
    /// Two of HAProxy.
    HaproxyHttp,
    /// Two of nginx.
    NginxHttp,
}

/// What is between client and server looks at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Layer {
    /// Connections: bytes pass as they are.
    Connections,
    /// Requests.
    Requests,
}

impl Layer {
    /// What is compared, besides no mesh.
    pub(super) fn systems(self) -> &'static [Kind] {
        match self {
            Self::Connections => &[Kind::Nodemesh, Kind::Envoy, Kind::Haproxy, Kind::Nginx],
            Self::Requests => {
                &[Kind::Nodemesh, Kind::NodemeshHttp, Kind::EnvoyHttp, Kind::HaproxyHttp, Kind::NginxHttp]
            }
        }
    }

    /// Whose figures the goals are for.
    pub(super) fn judged(self) -> Kind {
        match self {
            Self::Connections => Kind::Nodemesh,
            Self::Requests => Kind::NodemeshHttp,
        }
    }
}

impl Kind {
    /// Whether it is the mesh.
    pub(super) fn is_mesh(self) -> bool {
        matches!(self, Self::Nodemesh | Self::NodemeshHttp)
    }

    /// Whether it needs Envoy.
    pub(super) fn is_envoy(self) -> bool {
        matches!(self, Self::Envoy | Self::EnvoyHttp)
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::NoMesh => "no mesh",
            Self::Nodemesh => "nodemesh",
            Self::Envoy => "envoy",
            Self::Haproxy => "haproxy",
            Self::Nginx => "nginx",
            Self::NodemeshHttp => "nodemesh http",
            Self::EnvoyHttp => "envoy http",
            Self::HaproxyHttp => "haproxy http",
            Self::NginxHttp => "nginx http",
        })
    }
}

/// A system that runs.
#[derive(Debug)]
pub(super) struct System {
    pub(super) kind: Kind,
    pub(super) client: Workload,
    pub(super) server: Workload,
    /// Its version, for the report.
    pub(super) version: String,
    sidecars: Vec<Program>,
    // Applications end before their world.
    _applications: Vec<Program>,
    _sink: load::Sink,
    world: World,
}

impl System {
    /// Starts its world, the applications, and what is between them; returns once a request gets through.
    pub(super) fn start(kind: Kind, rules: usize) -> Result<Self> {
        let world =
            World::builder().node("a").node("b").workload("bench/client", "a").workload("bench/server", "b");
        let world = match kind {
            Kind::Nodemesh => world,
            Kind::NodemeshHttp => world.service("bench/http", "server", HTTP, HTTP).service(
                "bench/http2",
                "server",
                HTTP2,
                HTTP2,
            ),
            _ => world.without_mesh(),
        }
        .build()?;
        if kind == Kind::NodemeshHttp {
            world.yaml.write(ROUTES_FILE, ROUTES)?;
            if rules > 0 {
                world.yaml.write("other-routes.yaml", &other_routes(rules))?;
            }
        }
        let (client, server) = (world.workload("client"), world.workload("server"));
        for workload in [&client, &server] {
            // New connections at tens of thousands a second use up the ports of one client otherwise.
            workload.netns.sysctl("net/ipv4/tcp_tw_reuse", "1")?;
            workload.netns.sysctl("net/core/somaxconn", "8192")?;
        }
        let directory = world.directory().to_owned();
        let applications = load::applications(&server, &directory)?;
        let sink = load::Sink::start(&server)?;
        let (sidecars, version) = match kind {
            Kind::NoMesh => (vec![], String::new()),
            Kind::Nodemesh | Kind::NodemeshHttp => (vec![], env!("CARGO_PKG_VERSION").to_owned()),
            Kind::Envoy => peers::envoy(&client, &server, &directory, Layer::Connections)?,
            Kind::EnvoyHttp => peers::envoy(&client, &server, &directory, Layer::Requests)?,
            Kind::Haproxy => peers::haproxy(&client, &server, &directory, Layer::Connections)?,
            Kind::HaproxyHttp => peers::haproxy(&client, &server, &directory, Layer::Requests)?,
            Kind::Nginx => peers::nginx(&client, &server, &directory, Layer::Connections)?,
            Kind::NginxHttp => peers::nginx(&client, &server, &directory, Layer::Requests)?,
        };
        let system =
            Self { kind, client, server, version, sidecars, _applications: applications, _sink: sink, world };
        for port in [system.http(), system.http2(), system.server.v4(IPERF)] {
            wait::try_until(load::STARTED, || system.client.connect(port).map_err(|e| e.to_string()))
                .map_err(anyhow::Error::msg)
                .with_context(|| format!("{kind}: {port} does not answer"))?;
        }
        // A sidecar that listens may still be about to read its certificates.
        wait::try_until(load::STARTED, || system.one_request().map_err(|e| format!("{e:#}"))).map_err(
            |last| {
                let logs = ["client", "server"].map(|side| directory.join(format!("sidecar-{side}.log")));
                anyhow::anyhow!("{last}\n{}", logs.map(|log| mesh_tests::process::tail(&log)).join("\n"))
            },
        )?;
        Ok(system)
    }

    /// Where the HTTP server is, to its client.
    pub(super) fn http(&self) -> SocketAddr {
        self.at("bench/http", HTTP)
    }

    /// And that of HTTP/2.
    pub(super) fn http2(&self) -> SocketAddr {
        self.at("bench/http2", HTTP2)
    }

    /// Routes are a service's: with them the client asks for that.
    fn at(&self, service: &str, port: u16) -> SocketAddr {
        if self.kind == Kind::NodemeshHttp {
            (self.world.service(service).v4, port).into()
        } else {
            self.server.v4(port)
        }
    }

    /// The processes whose cost is the system's, children included.
    pub(super) fn processes(&self) -> Vec<u32> {
        let agents = self.world.nodes().iter().filter(|_| self.kind.is_mesh());
        let agents = agents.filter_map(|node| self.world.agent(&node.name).pid());
        super::cost::with_children(agents.chain(self.sidecars.iter().map(Program::pid)))
    }

    /// Ends it: agents as an operator ends them.
    pub(super) fn end(self) -> Result<()> {
        for node in self.world.nodes() {
            self.world.agent(&node.name).stop()?;
        }
        Ok(())
    }

    /// Changes the rule that all requests of HTTP/1.1 fall under: answers have the change's number from then on. Without one it
    /// is as it was at first.
    pub(super) fn change_rule(&self, change: Option<u32>) -> Result<()> {
        let numbered = change.map(|it| format!("{ROUTE_SAYS}, {{name: x-change, value: '{it}'}}"));
        let text = numbered.map_or(ROUTES.to_owned(), |says| ROUTES.replace(ROUTE_SAYS, &says));
        self.world.yaml.write(ROUTES_FILE, &text)
    }

    /// Returns once this change of the rule is in force.
    pub(super) fn await_change(&self, change: u32) -> Result<()> {
        let numbered = format!("x-change: {change}\r\n");
        wait::try_until(load::STARTED, || {
            let head = self.head().map_err(|error| format!("{error:#}"))?;
            wait::holds(head.contains(&numbered), || format!("change {change} is not in force: {head}"))
        })
        .map_err(anyhow::Error::msg)
    }

    fn one_request(&self) -> Result<()> {
        let head = self.head()?;
        let is_routed = self.kind != Kind::NodemeshHttp || head.contains(BY_A_ROUTE);
        anyhow::ensure!(is_routed, "the route is not in force yet: {head}");
        Ok(())
    }

    /// The head of an answer, in small letters.
    fn head(&self) -> Result<String> {
        let mut curl = self.client.command("curl");
        curl.args(["-sSf", "-m", "5", "-o", "/dev/null", "-D", "-"]).arg(format!("http://{}/", self.http()));
        let said = curl.stdin(Stdio::null()).stderr(Stdio::inherit()).output().context("starting curl")?;
        anyhow::ensure!(said.status.success(), "{}: a request failed: {}", self.kind, said.status);
        Ok(String::from_utf8_lossy(&said.stdout).to_lowercase())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_changed_rule_has_a_place_for_its_number() {
        assert_eq!(ROUTES.matches(ROUTE_SAYS).count(), 1);
    }
}
