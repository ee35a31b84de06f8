//! The peers: a pair of sidecars each, in the client's and in the server's namespace, with mutual TLS 1.3 between them.
//!
//! The client's connections are redirected to its sidecar by iptables, as sidecar meshes do; the sidecars' own, by
//! their user, are not.

use std::{fs, path::Path};

use anyhow::{Context, Result};
use mesh_tests::{Workload, process::Program};
use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, DnType, ExtendedKeyUsagePurpose, IsCa, KeyPair,
    SanType,
};
use serde_json::{Value, json};

use super::{
    load::await_listener,
    systems::{HTTP, HTTP2, IPERF, Layer},
};
use crate::{
    run::{clean, read},
    setup,
};

/// The user of sidecars.
const USER: &str = "1337";
/// Each application port with the client's sidecar's and the server's sidecar's.
const PORTS: [(u16, u16, u16); 3] = [(HTTP, 15080, 16080), (HTTP2, 15081, 16081), (IPERF, 15201, 16201)];

/// Envoy's TCP proxy, or its HTTP connection manager.
pub(super) fn envoy(
    client: &Workload,
    server: &Workload,
    directory: &Path,
    layer: Layer,
) -> Result<(Vec<Program>, String)> {
    let program = setup::envoy();
    let pair = Pair::new(client, server, directory, layer)?;
    let mut running = vec![];
    for (side, number) in [(Side::Client, "101"), (Side::Server, "102")] {
        let file = directory.join(format!("envoy-{}.json", side.name()));
        fs::write(&file, serde_json::to_string_pretty(&pair.envoy(side))?)?;
        let arguments = ["-c", text(&file)?, "--concurrency", "2", "--base-id", number, "-l", "warn"];
        running.push(pair.start(side, text(&program)?, &arguments)?);
    }
    pair.capture()?;
    let version = read(clean(&program).arg("--version"))?;
    // `PATH  version: COMMIT/1.2.3/Clean/RELEASE/BoringSSL`
    let version = version.rsplit("version: ").next().and_then(|said| said.split('/').nth(1));
    Ok((running, version.unwrap_or("unknown").to_owned()))
}

/// HAProxy in TCP or in HTTP mode.
pub(super) fn haproxy(
    client: &Workload,
    server: &Workload,
    directory: &Path,
    layer: Layer,
) -> Result<(Vec<Program>, String)> {
    let pair = Pair::new(client, server, directory, layer)?;
    let running = pair.start_both("haproxy", &["-db", "-f"], |side| pair.haproxy(side))?;
    let version = read(clean("haproxy").arg("-v"))?;
    Ok((running, version.split(' ').nth(2).unwrap_or("unknown").to_owned()))
}

/// nginx's stream module, or nginx itself. It speaks no HTTP/2 to what is behind it, HTTP/1.1 instead.
pub(super) fn nginx(
    client: &Workload,
    server: &Workload,
    directory: &Path,
    layer: Layer,
) -> Result<(Vec<Program>, String)> {
    let pair = Pair::new(client, server, directory, layer)?;
    let running = pair.start_both("nginx", &["-c"], |side| pair.nginx(side))?;
    // It says so on its standard error.
    let said = clean("nginx").arg("-v").output().context("starting nginx")?;
    let version = String::from_utf8_lossy(&said.stderr).trim().rsplit('/').next().map(str::to_owned);
    Ok((running, version.unwrap_or_else(|| "unknown".into())))
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Side {
    Client,
    Server,
}

impl Side {
    fn name(self) -> &'static str {
        match self {
            Self::Client => "client",
            Self::Server => "server",
        }
    }
}

/// What sidecars take a port's connections for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Protocol {
    Bytes,
    Http1,
    Http2,
}

/// Two sidecars to be.
#[derive(Debug)]
struct Pair<'a> {
    client: &'a Workload,
    server: &'a Workload,
    directory: &'a Path,
    layer: Layer,
}

impl<'a> Pair<'a> {
    /// Writes their certificates; the directory becomes readable for their user.
    fn new(client: &'a Workload, server: &'a Workload, directory: &'a Path, layer: Layer) -> Result<Self> {
        let pair = Self { client, server, directory, layer };
        pair.certificates()?;
        let sidecars = read(clean("chown").args(["-R", USER, text(directory)?]));
        sidecars.context("giving the files to the sidecars' user")?;
        Ok(pair)
    }

    /// P-256, as the mesh's own.
    fn certificates(&self) -> Result<()> {
        let mut ca = CertificateParams::default();
        // A leaf with its issuer's name would be taken for a root.
        ca.distinguished_name.push(DnType::CommonName, "root");
        ca.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let ca = CertifiedIssuer::self_signed(ca, KeyPair::generate()?)?;
        fs::write(self.file("ca.crt"), ca.pem())?;
        for side in [Side::Client, Side::Server] {
            let name = side.name();
            let mut leaf = CertificateParams::default();
            leaf.distinguished_name.push(DnType::CommonName, name);
            leaf.subject_alt_names = vec![
                SanType::URI(format!("spiffe://cluster.local/ns/bench/sa/{name}").try_into()?),
                SanType::DnsName(name.try_into()?),
            ];
            leaf.extended_key_usages =
                vec![ExtendedKeyUsagePurpose::ClientAuth, ExtendedKeyUsagePurpose::ServerAuth];
            let key = KeyPair::generate()?;
            let signed = leaf.signed_by(&key, &ca)?.pem();
            fs::write(self.file(&format!("{name}.crt")), &signed)?;
            fs::write(self.file(&format!("{name}.key")), key.serialize_pem())?;
            fs::write(self.file(&format!("{name}.pem")), signed + &key.serialize_pem())?;
        }
        Ok(())
    }

    fn file(&self, name: &str) -> String {
        self.directory.join(name).display().to_string()
    }

    fn workload(&self, side: Side) -> &Workload {
        match side {
            Side::Client => self.client,
            Side::Server => self.server,
        }
    }

    fn start(&self, side: Side, program: &str, arguments: &[&str]) -> Result<Program> {
        let mut command = self.workload(side).command("setpriv");
        command.args(["--reuid", USER, "--regid", USER, "--clear-groups", program]).args(arguments);
        let log = self.directory.join(format!("sidecar-{}.log", side.name()));
        let program = Program::start(program, &mut command, &log)?;
        for (_, outbound, inbound) in PORTS {
            let port = if side == Side::Client { outbound } else { inbound };
            await_listener(self.workload(side), port)
                .with_context(|| format!("the sidecar says:\n{}", mesh_tests::process::tail(&log)))?;
        }
        Ok(program)
    }

    /// Both sidecars of a program that takes a file of settings as its last argument, with the client's connections.
    fn start_both(
        &self,
        program: &str,
        arguments: &[&str],
        settings: impl Fn(Side) -> String,
    ) -> Result<Vec<Program>> {
        let mut running = vec![];
        for side in [Side::Client, Side::Server] {
            let file = self.directory.join(format!("{program}-{}.conf", side.name()));
            fs::write(&file, settings(side))?;
            running.push(self.start(side, program, &[arguments, &[text(&file)?]].concat())?);
        }
        self.capture()?;
        Ok(running)
    }

    /// Redirects the client's connections to its sidecar.
    fn capture(&self) -> Result<()> {
        let rule = "iptables -w -t nat -A OUTPUT -p tcp";
        self.client.shell(&format!("{rule} -m owner --uid-owner {USER} -j RETURN"))?;
        for (application, outbound, _) in PORTS {
            let to = self.server.address.v4;
            self.client
                .shell(&format!("{rule} -d {to} --dport {application} -j REDIRECT --to-ports {outbound}"))?;
        }
        Ok(())
    }

    /// What is read of an application port.
    fn protocol(&self, application: u16) -> Protocol {
        match (self.layer, application) {
            (Layer::Requests, HTTP) => Protocol::Http1,
            (Layer::Requests, HTTP2) => Protocol::Http2,
            _ => Protocol::Bytes,
        }
    }

    fn haproxy(&self, side: Side) -> String {
        let mut text = "global
 nbthread 2
 maxconn 9000
 ssl-default-bind-options ssl-min-ver TLSv1.3
 ssl-default-server-options ssl-min-ver TLSv1.3
defaults
 backlog 8192
 timeout connect 5s
 timeout client 3600s
 timeout server 3600s
"
        .to_owned();
        let ca = self.file("ca.crt");
        for (application, outbound, inbound) in PORTS {
            let (plain, hidden) = match self.protocol(application) {
                Protocol::Bytes => ("", ""),
                Protocol::Http1 => ("", " alpn http/1.1"),
                Protocol::Http2 => (" proto h2", " alpn h2"),
            };
            let (bind, server) = match side {
                Side::Client => (
                    format!(":{outbound}{plain}"),
                    format!(
                        "{}:{inbound} ssl crt {} ca-file {ca} verify required verifyhost server{hidden}",
                        self.server.address.v4,
                        self.file("client.pem")
                    ),
                ),
                Side::Server => (
                    format!(
                        ":{inbound} ssl crt {} ca-file {ca} verify required{hidden}",
                        self.file("server.pem")
                    ),
                    format!("127.0.0.1:{application}{plain}"),
                ),
            };
            let mode = match self.protocol(application) {
                Protocol::Bytes => " mode tcp\n",
                Protocol::Http1 | Protocol::Http2 => " mode http\n http-reuse always\n",
            };
            text += &format!(
                "frontend f{application}\n{mode} bind {bind}\n default_backend b{application}\n\
                 backend b{application}\n{mode} server s {server}\n"
            );
        }
        text
    }

    fn nginx(&self, side: Side) -> String {
        let name = side.name();
        let [ca, certificate, key] =
            ["ca.crt", &format!("{name}.crt"), &format!("{name}.key")].map(|file| self.file(file));
        let to_server = format!(
            "proxy_ssl_protocols TLSv1.3; proxy_ssl_certificate {certificate}; proxy_ssl_certificate_key {key};
  proxy_ssl_trusted_certificate {ca}; proxy_ssl_verify on; proxy_ssl_name server; proxy_ssl_session_reuse on;"
        );
        let of_client = format!(
            "ssl_protocols TLSv1.3; ssl_certificate {certificate}; ssl_certificate_key {key};
  ssl_client_certificate {ca}; ssl_verify_client on; ssl_session_cache shared:SESSIONS:10m;"
        );
        let (mut streams, mut requests) = (String::new(), String::new());
        for (application, outbound, inbound) in PORTS {
            let server = self.server.address.v4;
            let protocol = self.protocol(application);
            if protocol == Protocol::Bytes {
                let of_client = of_client.replace("SESSIONS", "streams");
                streams += &match side {
                    Side::Client => format!(
                        " server {{ listen {outbound} backlog=8192; proxy_pass {server}:{inbound}; proxy_ssl on; {to_server} }}\n"
                    ),
                    Side::Server => format!(
                        " server {{ listen {inbound} ssl backlog=8192; proxy_pass 127.0.0.1:{application}; {of_client} }}\n"
                    ),
                };
                continue;
            }
            let of_client = of_client.replace("SESSIONS", "requests");
            let version = if protocol == Protocol::Http2 { " http2" } else { "" };
            // What it sends on is HTTP/1.1 in any case.
            let (to, listen, pass) = match side {
                Side::Client => (
                    format!("{server}:{inbound}"),
                    format!("{outbound}{version} backlog=8192;"),
                    format!("https://b{application}; {to_server}"),
                ),
                Side::Server => (
                    format!("127.0.0.1:{HTTP}"),
                    format!("{inbound} ssl backlog=8192; {of_client}"),
                    format!("http://b{application};"),
                ),
            };
            requests += &format!(
                " upstream b{application} {{ server {to}; keepalive 256; keepalive_requests 1000000000; }}
 server {{ listen {listen} location / {{ proxy_pass {pass} }} }}\n"
            );
        }
        format!(
            "load_module /usr/lib/nginx/modules/ngx_stream_module.so;
worker_processes 2; daemon off; pid {}; error_log {};
events {{ worker_connections 9000; }}
stream {{
 tcp_nodelay on; proxy_timeout 3600s;
{streams}}}
http {{
 access_log off; tcp_nodelay on; keepalive_requests 1000000000; http2_max_requests 1000000000;
 proxy_http_version 1.1; proxy_set_header Connection \"\";
{requests}}}
",
            self.file(&format!("sidecar-{name}.pid")),
            self.file(&format!("sidecar-{name}.err"))
        )
    }

    fn envoy(&self, side: Side) -> Value {
        let name = side.name();
        let tls = |context: &str, more: Value| {
            let mut config = json!({
                "@type": format!("type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.{context}"),
                "common_tls_context": {
                    "tls_params": { "tls_minimum_protocol_version": "TLSv1_3", "tls_maximum_protocol_version": "TLSv1_3" },
                    "tls_certificates": [{
                        "certificate_chain": { "filename": self.file(&format!("{name}.crt")) },
                        "private_key": { "filename": self.file(&format!("{name}.key")) },
                    }],
                    "validation_context": { "trusted_ca": { "filename": self.file("ca.crt") } },
                },
            });
            if let (Some(config), Value::Object(more)) = (config.as_object_mut(), more) {
                config.extend(more);
            }
            json!({ "name": "envoy.transport_sockets.tls", "typed_config": config })
        };
        let mut listeners = vec![];
        let mut clusters = vec![];
        for (application, outbound, inbound) in PORTS {
            let (port, to) = match side {
                Side::Client => (outbound, (self.server.address.v4.to_string(), inbound)),
                Side::Server => (inbound, ("127.0.0.1".to_owned(), application)),
            };
            let cluster = format!("c{application}");
            let protocol = self.protocol(application);
            let filter = match protocol {
                Protocol::Bytes => json!({
                    "name": "envoy.filters.network.tcp_proxy",
                    "typed_config": {
                        "@type": "type.googleapis.com/envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy",
                        "stat_prefix": cluster, "cluster": cluster,
                    },
                }),
                Protocol::Http1 | Protocol::Http2 => requests_of(&cluster),
            };
            let mut chain = json!({ "filters": [filter] });
            let limit = 100_000;
            let mut upstream = json!({
                "name": cluster, "type": "STATIC", "connect_timeout": "5s",
                "circuit_breakers": { "thresholds": [{
                    "max_connections": limit, "max_pending_requests": limit, "max_requests": limit }] },
                "load_assignment": { "cluster_name": cluster, "endpoints": [{ "lb_endpoints": [{ "endpoint": {
                    "address": { "socket_address": { "address": to.0, "port_value": to.1 } } } }] }] },
            });
            if protocol == Protocol::Http2 {
                upstream["typed_extension_protocol_options"] = json!({
                    "envoy.extensions.upstreams.http.v3.HttpProtocolOptions": {
                        "@type": "type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions",
                        "explicit_http_config": { "http2_protocol_options": {} },
                    },
                });
            }
            match side {
                Side::Client => upstream["transport_socket"] = tls("UpstreamTlsContext", json!({})),
                Side::Server => {
                    chain["transport_socket"] =
                        tls("DownstreamTlsContext", json!({ "require_client_certificate": true }));
                }
            }
            listeners.push(json!({
                "name": format!("l{application}"), "tcp_backlog_size": 8192, "filter_chains": [chain],
                "address": { "socket_address": { "address": "0.0.0.0", "port_value": port } },
            }));
            clusters.push(upstream);
        }
        json!({ "static_resources": { "listeners": listeners, "clusters": clusters } })
    }
}

/// Envoy's filter that reads requests and sends all to one cluster.
fn requests_of(cluster: &str) -> Value {
    json!({
        "name": "envoy.filters.network.http_connection_manager",
        "typed_config": {
            "@type": "type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager",
            "stat_prefix": cluster, "codec_type": "AUTO",
            "route_config": { "virtual_hosts": [{
                "name": cluster, "domains": ["*"],
                "routes": [{ "match": { "prefix": "/" }, "route": { "cluster": cluster, "timeout": "0s" } }],
            }] },
            "http_filters": [{
                "name": "envoy.filters.http.router",
                "typed_config": { "@type": "type.googleapis.com/envoy.extensions.filters.http.router.v3.Router" },
            }],
        },
    })
}

fn text(path: &Path) -> Result<&str> {
    path.to_str().context("a path in UTF-8")
}
