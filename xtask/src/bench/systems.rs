//! The systems that are compared: the same world under each, and what runs on top of it.

use std::{fmt, net::SocketAddr, process::Stdio};

use anyhow::{Context, Result};
use mesh_tests::{Workload, World, process::Program, wait};

use super::{load, peers};

/// Where the server pod serves small HTTP/1.1 answers.
pub(super) const HTTP: u16 = 8080;
/// Where it serves iperf3.
pub(super) const IPERF: u16 = 5201;
/// Where it takes everything and reads nothing.
pub(super) const SINK: u16 = 9000;

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
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::NoMesh => "no mesh",
            Self::Nodemesh => "nodemesh",
            Self::Envoy => "envoy",
            Self::Haproxy => "haproxy",
            Self::Nginx => "nginx",
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
    pub(super) fn start(kind: Kind) -> Result<Self> {
        let world =
            World::builder().node("a").node("b").workload("bench/client", "a").workload("bench/server", "b");
        let world = if kind == Kind::Nodemesh { world } else { world.without_mesh() }.build()?;
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
            Kind::Nodemesh => (vec![], env!("CARGO_PKG_VERSION").to_owned()),
            Kind::Envoy => peers::envoy(&client, &server, &directory)?,
            Kind::Haproxy => peers::haproxy(&client, &server, &directory)?,
            Kind::Nginx => peers::nginx(&client, &server, &directory)?,
        };
        let system =
            Self { kind, client, server, version, sidecars, _applications: applications, _sink: sink, world };
        for port in [HTTP, IPERF] {
            wait::try_until(load::STARTED, || {
                system.client.connect(system.server.v4(port)).map_err(|e| e.to_string())
            })
            .map_err(anyhow::Error::msg)
            .with_context(|| format!("{kind}: port {port} does not answer"))?;
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

    /// Where the HTTP server is.
    pub(super) fn http(&self) -> SocketAddr {
        self.server.v4(HTTP)
    }

    /// The processes whose cost is the system's, children included.
    pub(super) fn processes(&self) -> Vec<u32> {
        let agents = self.world.nodes().iter().filter(|_| self.kind == Kind::Nodemesh);
        let agents = agents.filter_map(|node| self.world.agent(&node.name).pid());
        super::cost::with_children(agents.chain(self.sidecars.iter().map(Program::pid)))
    }

    fn one_request(&self) -> Result<()> {
        let mut curl = self.client.command("curl");
        curl.args(["-sSf", "-m", "5", "-o", "/dev/null"]).arg(format!("http://{}/", self.http()));
        let status = curl.stdin(Stdio::null()).status().context("starting curl")?;
        anyhow::ensure!(status.success(), "{}: the first request failed: {status}", self.kind);
        Ok(())
    }
}
