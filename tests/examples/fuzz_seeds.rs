//! Writes the seeds: one small input for each thing that a target should know of from the start, made by the encoders
//! that the mesh itself uses. `cargo xtask fuzz --seeds`; the result is in the repository.
//!
//! Seeds have names; what the fuzzer finds besides has hashes for names and stays out of the repository.

use std::{fs, path::Path, sync::Arc};

use bytes::BytesMut;
use mesh_controller::{
    health::Heard,
    project::Common,
    source::ledger::{FileContent, Ledger},
};
use mesh_core::{
    frame::{ALPN, Control, Header, Kind, Open, VERSION},
    identity::TrustDomain,
    refusal::Reason,
    view::{Mesh, NodeView},
    wire,
};
use prost::Message;
use rustls::{ClientConfig, ClientConnection, RootCertStore, crypto::ring, version};

fn main() -> std::io::Result<()> {
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus");
    let write = |target: &str, name: &str, bytes: &[u8]| {
        fs::create_dir_all(corpus.join(target))?;
        let path = corpus.join(target).join(name);
        // What is there stays: certificates and ClientHellos are random, and would change for no reason.
        if path.exists() { Ok(()) } else { fs::write(path, bytes) }
    };
    for (name, bytes) in frames() {
        write("frames", name, &bytes)?;
    }
    for (name, bytes) in prefaces() {
        write("preface", name, &bytes)?;
    }
    for (name, text) in DOCUMENTS {
        write("documents", name, text.as_bytes())?;
    }
    for (name, bytes) in views() {
        write("views", name, &bytes)?;
    }
    for (name, bytes) in packets() {
        write("packets", name, &bytes)?;
    }
    Ok(())
}

fn frames() -> Vec<(&'static str, Vec<u8>)> {
    let encode = |step: u8, controls: &[Control], data: &[u8]| {
        let mut out = BytesMut::from(&[step][..]);
        for control in controls {
            control.encode(&mut out);
            out.extend_from_slice(&Header { kind: Kind::Data, len: data.len() }.encode());
            out.extend_from_slice(data);
        }
        out.to_vec()
    };
    let v4 = Control::Open(Open { source: ([10, 1, 0, 11], 40_000).into(), port: 8080 });
    let v6 = Control::Open(Open { source: "[fd01::11]:40000".parse().expect("an address"), port: 8080 });
    vec![
        ("settings_open_v4", encode(255, &[Control::Settings(VERSION), v4.clone()], b"")),
        ("open_v6_in_single_bytes", encode(0, &[v6], b"hello")),
        ("lease", encode(6, &[v4, Control::Accept, Control::Fin, Control::Ready], b"abc")),
        ("refuse_and_reset", encode(2, &[Control::Refuse(Some(Reason::PolicyDeny)), Control::Reset], b"")),
        ("refuse_for_a_new_reason", b"\x07\x03\x00\x00\x05hello".to_vec()),
        ("data_too_long", b"\x07\x04\xff\xff\xff".to_vec()),
        ("unknown_type", b"\x07\x63\x00\x00\x00".to_vec()),
        ("fin_with_payload", b"\x07\x05\x00\x00\x01x".to_vec()),
    ]
}

fn prefaces() -> Vec<(&'static str, Vec<u8>)> {
    let hello = |alpn: &[&[u8]], versions: &[&'static rustls::SupportedProtocolVersion]| {
        let mut config = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
            .with_protocol_versions(versions)
            .expect("the provider has these versions")
            .with_root_certificates(RootCertStore::empty())
            .with_no_client_auth();
        config.alpn_protocols = alpn.iter().map(|name| name.to_vec()).collect();
        let name = "example.org".try_into().expect("a name");
        let mut session = ClientConnection::new(Arc::new(config), name).expect("a session");
        let mut bytes = vec![];
        session.write_tls(&mut bytes).expect("a Vec takes everything");
        bytes
    };
    let own = hello(&[ALPN], &[&version::TLS13]);
    let mut in_two_records = own[..5].to_vec();
    in_two_records[3..5].copy_from_slice(&16_u16.to_be_bytes());
    in_two_records.extend_from_slice(&own[5..21]);
    in_two_records.extend_from_slice(&own[..3]);
    in_two_records
        .extend_from_slice(&u16::try_from(own.len() - 21).expect("a record's length").to_be_bytes());
    in_two_records.extend_from_slice(&own[21..]);
    vec![
        ("own_half", own[..own.len() / 2].to_vec()),
        ("own_in_two_records", in_two_records),
        ("own_and_more", [own.as_slice(), b"more"].concat()),
        ("own", own),
        ("own_among_others", hello(&[b"h2", ALPN], &[&version::TLS12, &version::TLS13])),
        ("tls12", hello(&[ALPN], &[&version::TLS12])),
        ("of_an_application", hello(&[b"h2", b"http/1.1"], &[&version::TLS13])),
        ("without_alpn", hello(&[], &[&version::TLS13])),
        ("http", b"GET / HTTP/1.1\r\nhost: web\r\n\r\n".to_vec()),
        ("alert", b"\x15\x03\x03\x00\x02\x02\x28".to_vec()),
        ("oversized_record", b"\x16\x03\x01\xff\xff\x01\xff\xff\xff".to_vec()),
    ]
}

const DOCUMENTS: [(&str, &str); 12] = [
    (
        "namespace",
        "apiVersion: v1\nkind: Namespace\nmetadata:\n  name: shop\n  labels: {nodemesh.io/enroll: 'true'}\n",
    ),
    (
        "workload",
        "apiVersion: nodemesh.io/v1alpha1\nkind: Workload\nmetadata: {name: web, namespace: shop, labels: {app: web}}\nspec: {node: a, addresses: [10.1.0.11, 'fd01::11'], serviceAccount: web}\n",
    ),
    (
        "service",
        "apiVersion: v1\nkind: Service\nmetadata: {name: web, namespace: shop}\nspec:\n  clusterIPs: [10.96.0.1]\n  selector: {app: web}\n  ports:\n  - {name: http, port: 80, targetPort: 8080}\n",
    ),
    (
        "policy",
        "apiVersion: nodemesh.io/v1alpha1\nkind: AuthorizationPolicy\nmetadata: {name: web, namespace: shop}\nspec:\n  selector: {matchLabels: {app: web}}\n  action: Allow\n  rules:\n  - from:\n    - identities: ['spiffe://td/ns/shop/sa/web']\n      namespaces: [shop]\n      addressBlocks: [10.0.0.0/8]\n    ports: [80]\n",
    ),
    (
        "policy_on_requests",
        "apiVersion: nodemesh.io/v1alpha1\nkind: AuthorizationPolicy\nmetadata: {name: asks, namespace: shop}\nspec:\n  selector: {matchLabels: {app: web}}\n  action: Deny\n  rules:\n  - to:\n    - {ports: [8080], methods: [POST], paths: [/admin*], hosts: ['*.example'], notHeaders: [{name: x-a, values: [b*]}]}\n",
    ),
    (
        "route",
        "apiVersion: gateway.networking.k8s.io/v1\nkind: HTTPRoute\nmetadata: {name: web, namespace: shop}\nspec:\n  parentRefs: [{group: '', kind: Service, name: web}]\n  rules:\n  - name: a\n    matches: [{path: {type: RegularExpression, value: '/a+'}, headers: [{name: x-a, value: '1'}], method: GET}]\n    filters: [{type: URLRewrite, urlRewrite: {hostname: b.example, path: {type: ReplaceFullPath, replaceFullPath: /b}}}]\n    backendRefs: [{name: web, port: 80, weight: 3}]\n    timeouts: {request: 1s}\n    retry: {codes: [503]}\n    sessionPersistence: {type: Header, sessionName: s}\n",
    ),
    (
        "routes_of_connections",
        "apiVersion: gateway.networking.k8s.io/v1\nkind: TLSRoute\nmetadata: {name: web, namespace: shop}\nspec:\n  parentRefs: [{group: '', kind: Service, name: web, port: 80}]\n  hostnames: [a.example, '*.b.example']\n  rules: [{name: a, backendRefs: [{name: web, port: 80, weight: 3}]}]\n---\napiVersion: gateway.networking.k8s.io/v1\nkind: TCPRoute\nmetadata: {name: web, namespace: other}\nspec:\n  parentRefs: [{group: '', kind: Service, name: web, namespace: shop}]\n  rules: [{backendRefs: [{name: web, namespace: shop, port: 80}]}]\n",
    ),
    (
        "traffic",
        "apiVersion: nodemesh.io/v1alpha1\nkind: TrafficPolicy\nmetadata: {name: web, namespace: shop}\nspec:\n  targetRefs: [{kind: Service, name: web}]\n  balancing: {algorithm: Hash, hashBy: {type: Header, name: x-a}, slowStart: 30s}\n  timeouts: {request: 1s}\n  retries: {codes: [503], grpcCodes: [14], methods: Every}\n  limits: {connections: 9, requests: 5, pending: 1}\n  ejection: {failures: 3, retryAfter: 9s}\n  faults: [{percent: 1.5, headers: [{name: x-a, value: b}], delay: 1s}, {abort: {grpcStatus: 14}}]\n  hedge: {after: 1s, calls: [a.B/C], budget: {percent: 5}}\n",
    ),
    (
        "two_with_markers",
        "---\napiVersion: v1\nkind: Namespace\nmetadata: {name: a}\n...\n# between\n---\nkind: Namespace\nmetadata: {name: a}\napiVersion: v1\n",
    ),
    ("anchors", "a: &a [1, 2]\nb: *a\nc: {<<: *a}\n"),
    ("unfinished", "apiVersion: v1\nkind: Namespace\nmetadata: {name: [\n"),
    (
        "scalars",
        "kind: !!str Namespace\nmetadata: {name: 0x1f, labels: {a: true, b: 1e3, c: ~}}\nspec: |\n  text\n   more\n",
    ),
];

/// Made from the manifests, as the controller makes them.
fn views() -> Vec<(&'static str, Vec<u8>)> {
    let key = rcgen::KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256).expect("a key");
    let root = rcgen::CertificateParams::default().self_signed(&key).expect("a root").der().to_vec();
    let view = |documents: &[&str]| {
        let parse = |text: &str| Arc::new(FileContent::parse(text));
        let files =
            documents.iter().enumerate().map(|(i, text)| (i.to_string().into(), parse(text))).collect();
        let trust_domain = TrustDomain::parse("td").expect("a trust domain");
        let mesh = Arc::new(Mesh { trust_domain, roots: vec![root.clone()] });
        Common::new(
            &Ledger::default().next(&files).model(),
            mesh,
            &Heard::default(),
            mesh_core::model::Mode::Permissive,
        )
        .view("a")
    };
    let update = |version: &str, from: Option<&NodeView>, to: &NodeView| {
        let delta = from.unwrap_or(&NodeView::default()).diff(to);
        wire::update(version.into(), from.is_none(), &delta).encode_to_vec()
    };
    let both = |first: &[u8], second: &[u8]| {
        let len = u16::try_from(first.len()).expect("small").to_le_bytes();
        [&len[..], first, second].concat()
    };
    let all = DOCUMENTS[..7].iter().map(|(_, text)| *text).collect::<Vec<_>>();
    let other = all[1].replace("web", "other");
    let (whole, less) = (view(&all), view(&all[..2]));
    let twice = view(&[all[0], all[1], &other]);
    let first = update("1", None, &whole);
    vec![
        ("of_every_kind", both(&first, &update("2", Some(&twice), &whole))),
        ("complete", both(&first, &[])),
        ("and_a_difference", both(&first, &update("2", Some(&whole), &less))),
        ("two_of_one_address", both(&first, &update("2", Some(&less), &twice))),
        ("without_mesh", both(&update("1", Some(&less), &whole), &first)),
        ("mesh_removed", both(&first, &update("2", Some(&whole), &NodeView::default()))),
        ("nothing", both(&[], &[])),
    ]
}

/// Bits of the first byte: owned 1, agent's 2, mesh 4, node's 8, listener 16, taken 32; second byte: strict 1.
fn packets() -> Vec<(&'static str, Vec<u8>)> {
    const ETH_V4: [u8; 14] = [2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2, 8, 0];
    const ETH_V6: [u8; 14] = [2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2, 0x86, 0xdd];
    let v4 = |bits: u8, first: u8, fragment: u16, protocol: u8, rest: &[u8]| {
        let mut header = [first, 0, 0, 60, 0, 1, 0, 0, 64, protocol, 0, 0, 10, 1, 0, 11, 10, 2, 0, 11];
        header[6..8].copy_from_slice(&fragment.to_be_bytes());
        [&[bits, 1][..], &ETH_V4, &header, rest].concat()
    };
    let v6 = |bits: u8, next: u8, rest: &[u8]| {
        let mut header = [0; 40];
        header[0] = 0x60;
        (header[6], header[7]) = (next, 64);
        (header[8], header[9], header[23]) = (0xfd, 1, 11);
        (header[24], header[25], header[39]) = (0xfd, 2, 11);
        [&[bits, 1][..], &ETH_V6, &header, rest].concat()
    };
    let tcp = |flags: u8, data: &[u8]| {
        let header = [0x9c, 0x40, 0x1f, 0x90, 0, 0, 0, 1, 0, 0, 0, 2, 0x50, flags, 0xff, 0xff, 0, 0, 0, 0];
        [&header[..], data].concat()
    };
    vec![
        ("v4_syn_of_an_application", v4(0x15, 0x45, 0x4000, 6, &tcp(2, b""))),
        ("v4_syn_of_the_agent", v4(0x17, 0x45, 0x4000, 6, &tcp(2, b""))),
        ("v4_data_of_an_application", v4(0x05, 0x45, 0x4000, 6, &tcp(0x18, b"secret"))),
        ("v4_answer", v4(0x05, 0x45, 0x4000, 6, &tcp(0x12, b""))),
        ("v4_reset", v4(0x05, 0x45, 0x4000, 6, &tcp(4, b""))),
        ("v4_spoofed", v4(0x04, 0x45, 0x4000, 6, &tcp(0x10, b""))),
        ("v4_fragment", v4(0x05, 0x45, 0x2000, 6, &tcp(2, b""))),
        ("v4_options", v4(0x05, 0x46, 0, 6, &[&[7, 4, 0, 0][..], &tcp(0x18, b"secret")].concat())),
        ("v4_udp", v4(0x05, 0x45, 0, 17, &[0x9c, 0x40, 0x1f, 0x90, 0, 8, 0, 0])),
        ("v4_dns", v4(0x05, 0x45, 0, 17, &[0x9c, 0x40, 0, 53, 0, 8, 0, 0])),
        ("v4_icmp", v4(0x05, 0x45, 0, 1, &[8, 0, 0, 0])),
        ("v4_gre", v4(0x05, 0x45, 0, 47, &[0; 8])),
        ("v4_cut_short", v4(0x05, 0x45, 0, 6, &[1, 2, 3])),
        ("v6_syn_of_an_application", v6(0x15, 6, &tcp(2, b""))),
        ("v6_data_of_an_application", v6(0x05, 6, &tcp(0x18, b"secret"))),
        ("v6_hop_by_hop_mld", v6(0x05, 0, &[58, 0, 5, 2, 0, 0, 1, 0])),
        ("v6_hop_by_hop_tcp", v6(0x05, 0, &[&[6, 0, 1, 4, 0, 0, 0, 0][..], &tcp(2, b"")].concat())),
        ("v6_fragment", v6(0x05, 44, &[6, 0, 0, 1, 0, 0, 0, 1])),
        ("v6_routing", v6(0x05, 43, &[6, 0, 0, 0, 0, 0, 0, 0])),
    ]
}
