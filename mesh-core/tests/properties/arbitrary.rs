//! Values of every type that crosses the wire, with every field in use.
//!
//! Names and addresses come from small sets, so that what is made by chance often matches, collides and selects.

mod traffic;

use std::{
    collections::BTreeMap,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    sync::Arc,
    time::Duration,
};

use ipnet::IpNet;
use mesh_core::{
    identity::{SpiffeId, TrustDomain},
    model::{
        Action, Algorithm, Asks, Authentication, Choice, ClaimHeader, ClaimPattern, Distribution, Endpoint,
        Enforcement, Expression, HeaderPattern, IdentityPattern, KeyMaterial, Mode, Name, Operator, Place,
        Policy, PortRange, Rule, Selector, Service, ServicePort, Source, Target, TextPattern, TokenIssuer,
        TokenPlace, Traits, VerifyingKey, Workload,
        health::{Check, CheckedEndpoint, Pace, Probe},
        http::{
            Backend, BackendTarget, Cors, Filters, HeaderEdits, Mirror, Parent, PathEdit, PathMatch,
            PersistBy, Persistence, Redirect, RequestMatch, RequestRoute, Retry, Rewrite, RouteKind,
            RouteRule, TextMatch, Timeouts, ValueMatch,
        },
        intake::{Intake, PortIntake, RateBy, RateLimit, Sizes},
        tcp::{ConnectionRoute, Hostname, Share},
    },
    view::{Demand, Mesh, NodeView, Resource},
};
use proptest::{
    collection::{btree_map, vec},
    option,
    prelude::*,
    sample::select,
};

const NAMES: [&str; 3] = ["a", "b", "c"];
const DOMAINS: [&str; 2] = ["td", "td2"];

fn word() -> impl Strategy<Value = String> {
    select(&NAMES[..]).prop_map(ToOwned::to_owned)
}

fn trust_domain() -> impl Strategy<Value = TrustDomain> {
    select(&DOMAINS[..]).prop_map(|name| TrustDomain::parse(name).expect("a trust domain"))
}

pub(crate) fn name() -> impl Strategy<Value = Name> {
    (word(), word()).prop_map(|(namespace, name)| Name::new(namespace, name))
}

pub(crate) fn identity() -> impl Strategy<Value = SpiffeId> {
    (trust_domain(), word(), word()).prop_map(|(domain, namespace, account)| {
        SpiffeId::workload(&domain, &namespace, &account).expect("an identity")
    })
}

pub(crate) fn address() -> impl Strategy<Value = IpAddr> {
    let v4 = (0u8..4).prop_map(|last| Ipv4Addr::new(10, 0, 0, last).into());
    let v6 = (0u16..4).prop_map(|last| Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, last).into());
    prop_oneof![v4, v6]
}

pub(crate) fn port() -> impl Strategy<Value = u16> {
    prop_oneof![79u16..83, Just(1), Just(u16::MAX)]
}

fn labels() -> impl Strategy<Value = BTreeMap<String, String>> {
    prop::collection::btree_map(word(), word(), 0..3)
}

fn identity_pattern() -> impl Strategy<Value = IdentityPattern> {
    prop_oneof![
        identity().prop_map(IdentityPattern::Exact),
        (trust_domain(), word())
            .prop_map(|(domain, namespace)| IdentityPattern::Namespace(domain, namespace)),
        trust_domain().prop_map(IdentityPattern::TrustDomain),
    ]
}

fn block() -> impl Strategy<Value = IpNet> {
    (address(), 0u8..=32).prop_map(|(address, cut)| {
        let longest = if address.is_ipv4() { 32 } else { 128 };
        IpNet::new(address, longest - cut.min(longest)).expect("a prefix length of the family")
    })
}

fn traits() -> impl Strategy<Value = Traits> {
    let domains = vec(trust_domain(), 0..2);
    (vec(identity_pattern(), 0..3), vec(word(), 0..2), domains, vec(block(), 0..2)).prop_map(
        |(identities, namespaces, trust_domains, address_blocks)| Traits {
            identities,
            namespaces,
            trust_domains,
            address_blocks,
        },
    )
}

/// Mostly one list at a time: all of them together match next to nothing.
pub(crate) fn source() -> impl Strategy<Value = Source> {
    let some = || prop_oneof![3 => Just(Traits::default()), 2 => traits()];
    (some(), some()).prop_map(|(any_of, none_of)| Source { any_of, none_of })
}

fn port_range() -> impl Strategy<Value = PortRange> {
    (port(), port()).prop_map(|(a, b)| PortRange::new(a.min(b).into(), a.max(b).into()).expect("in order"))
}

fn text_pattern() -> impl Strategy<Value = TextPattern> {
    let text = select(vec!["/a", "/a/", "/a/b", "a", "b", "/"]);
    (0..3, text).prop_map(|(kind, text)| match kind {
        0 => TextPattern::Exact(text.to_owned()),
        1 => TextPattern::Prefix(text.to_owned()),
        _ => TextPattern::Suffix(text.to_owned()),
    })
}

fn asks() -> impl Strategy<Value = Asks> {
    let methods = vec(select(vec!["GET".to_owned(), "PUT".to_owned()]), 0..2);
    let header = (select(vec!["x-a", "x-b"]), vec(text_pattern(), 0..2))
        .prop_map(|(name, values)| HeaderPattern { name: name.to_owned(), values });
    let patterns = || vec(text_pattern(), 0..2);
    let claim = (select(vec!["sub", "groups"]), vec(text_pattern(), 0..2))
        .prop_map(|(name, values)| ClaimPattern { name: name.to_owned(), values });
    let claims = prop_oneof![2 => Just(vec![]), 1 => vec(claim, 1..3)];
    (methods, patterns(), patterns(), vec(header, 0..2), claims)
        .prop_map(|(methods, hosts, paths, headers, claims)| Asks { methods, hosts, paths, headers, claims })
}

pub(crate) fn target() -> impl Strategy<Value = Target> {
    let some = || prop_oneof![3 => Just(Asks::default()), 2 => asks()];
    (vec(port_range(), 0..2), vec(port_range(), 0..2), some(), some())
        .prop_map(|(ports, not_ports, any_of, none_of)| Target { ports, not_ports, any_of, none_of })
}

pub(crate) fn rule() -> impl Strategy<Value = Rule> {
    (vec(source(), 0..3), vec(target(), 0..2)).prop_map(|(from, to)| Rule { from, to })
}

fn selector() -> impl Strategy<Value = Selector> {
    let operator = select(vec![Operator::In, Operator::NotIn, Operator::Exists, Operator::DoesNotExist]);
    let expression = (word(), operator, vec(word(), 0..2)).prop_map(|(key, operator, values)| Expression {
        key,
        operator,
        values,
    });
    (labels(), vec(expression, 0..2)).prop_map(|(labels, expressions)| Selector { labels, expressions })
}

pub(crate) fn policy() -> impl Strategy<Value = Policy> {
    let action = select(vec![Action::Allow, Action::Deny]);
    let enforcement = select(vec![Enforcement::Enforce, Enforcement::Audit]);
    (name(), selector(), action, enforcement, vec(rule(), 0..3)).prop_map(
        |(name, selector, action, enforcement, rules)| Policy { name, selector, action, enforcement, rules },
    )
}

fn token_place() -> impl Strategy<Value = TokenPlace> {
    (0..3, word(), select(vec!["", "Bearer"])).prop_map(|(kind, name, prefix)| match kind {
        0 => TokenPlace::Header { name, prefix: prefix.to_owned() },
        1 => TokenPlace::Query(name),
        _ => TokenPlace::Cookie(name),
    })
}

fn verifying_key() -> impl Strategy<Value = VerifyingKey> {
    let bytes = || vec(any::<u8>(), 1..4);
    let material = prop_oneof![
        (bytes(), bytes()).prop_map(|(n, e)| KeyMaterial::Rsa { n, e }),
        bytes().prop_map(KeyMaterial::P256),
        bytes().prop_map(KeyMaterial::P384),
        bytes().prop_map(KeyMaterial::Ed25519),
    ];
    (word(), option::of(select(Algorithm::ALL)), material)
        .prop_map(|(id, algorithm, material)| VerifyingKey { id, algorithm, material })
}

fn token_issuer() -> impl Strategy<Value = TokenIssuer> {
    let header = (word(), word()).prop_map(|(header, claim)| ClaimHeader { header, claim });
    let who = (word(), vec(word(), 1..3), vec(verifying_key(), 0..3));
    (who, vec(token_place(), 1..3), any::<bool>(), vec(header, 0..2)).prop_map(
        |((issuer, audiences, keys), places, strip, headers)| TokenIssuer {
            issuer,
            audiences,
            keys,
            places,
            strip,
            headers,
        },
    )
}

pub(crate) fn authentication() -> impl Strategy<Value = Authentication> {
    let how = (any::<bool>(), select(vec![Enforcement::Enforce, Enforcement::Audit]));
    (name(), selector(), vec(port_range(), 0..2), how, vec(token_issuer(), 0..3)).prop_map(
        |(name, selector, ports, (required, enforcement), issuers)| Authentication {
            name,
            selector,
            ports,
            required,
            enforcement,
            issuers,
        },
    )
}

fn rate_limit() -> impl Strategy<Value = RateLimit> {
    let by = prop_oneof![Just(RateBy::All), Just(RateBy::Identity), word().prop_map(RateBy::Header)];
    let tokens = (1u32..9, 1u64..9, 1u32..9);
    (name(), 0u32..3, by, tokens, asks()).prop_map(|(policy, index, by, (requests, per, burst), only)| {
        RateLimit { policy, index, by, requests, per: Duration::from_millis(per), burst, only }
    })
}

fn intake() -> impl Strategy<Value = Intake> {
    let sizes = (option::of(1u32..9), option::of(0u64..9)).prop_map(|(head, body)| Sizes { head, body });
    let of_port = (sizes, vec(rate_limit(), 0..3)).prop_map(|(sizes, rates)| PortIntake { sizes, rates });
    (name(), labels(), btree_map(port(), of_port, 0..3)).prop_map(|(workload, labels, ports)| Intake {
        workload,
        labels,
        ports,
    })
}

pub(crate) fn mode() -> impl Strategy<Value = Mode> {
    select(&Mode::ALL[..])
}

pub(crate) fn workload() -> impl Strategy<Value = Workload> {
    let who = (name(), option::of(word()), word(), word(), labels());
    let how = (vec(address(), 0..3), any::<bool>(), any::<bool>(), mode(), vec(check(), 0..3));
    (who, how).prop_map(
        |((name, uid, node, service_account, labels), (addresses, enrolled, captured, mode, checks))| {
            let uid = uid.unwrap_or_default();
            Workload { name, uid, node, service_account, addresses, labels, enrolled, captured, mode, checks }
        },
    )
}

fn check() -> impl Strategy<Value = Check> {
    let statuses = vec((200u16..300, 300u16..400), 0..2);
    let probe = prop_oneof![
        Just(Probe::Tcp),
        word().prop_map(|service| Probe::Grpc { service }),
        (word(), option::of(word()), statuses).prop_map(|(path, host, statuses)| Probe::Http {
            path,
            host,
            statuses
        }),
    ];
    let of = (name(), port(), address()).prop_map(|(service, port, address)| CheckedEndpoint {
        service,
        port,
        address,
    });
    let pace =
        (1u64..9, 1u64..9, 1u32..4, 1u32..4).prop_map(|(interval, timeout, unhealthy, healthy)| Pace {
            interval: Duration::from_secs(interval),
            timeout: Duration::from_millis(timeout),
            unhealthy_after: unhealthy,
            healthy_after: healthy,
        });
    (of, port(), probe, pace).prop_map(|(of, port, probe, pace)| Check { of, port, probe, pace })
}

fn endpoint() -> impl Strategy<Value = Endpoint> {
    (option::of(name()), address(), port()).prop_map(|(workload, address, port)| Endpoint {
        workload,
        address,
        port,
    })
}

pub(crate) fn service() -> impl Strategy<Value = Service> {
    let routes = vec(connection_route().prop_map(Arc::new), 0..3);
    let port = (option::of(word()), port(), vec(endpoint(), 0..4), traffic::traffic(), routes).prop_map(
        |(name, port, endpoints, traffic, routes)| ServicePort {
            name: name.unwrap_or_default(),
            port,
            endpoints,
            traffic,
            routes,
        },
    );
    (name(), vec(address(), 0..3), vec(port, 0..3), choice())
        .prop_map(|(name, addresses, ports, choice)| Service { name, addresses, ports, choice })
}

/// A name of a server: few, so that some are another's and some are below another.
pub(crate) fn server() -> impl Strategy<Value = String> {
    vec(select(vec!["a", "b"]), 1..4).prop_map(|labels| labels.join("."))
}

pub(crate) fn connection_route() -> impl Strategy<Value = ConnectionRoute> {
    let hostname = (any::<bool>(), server()).prop_map(|(under, name)| match under {
        true => Hostname::Under(name),
        false => Hostname::Exact(name),
    });
    let share = (backend_target(), 0u32..4).prop_map(|(to, weight)| Share { to, weight });
    let kind = select(vec![RouteKind::Tls, RouteKind::Tcp]);
    (kind, name(), 0i64..3, vec(hostname, 1..4), vec(share, 0..3)).prop_map(
        |(kind, name, created, mut hostnames, backends)| {
            hostnames.retain(|_| kind == RouteKind::Tls);
            ConnectionRoute { kind, name, created, hostnames, backends }
        },
    )
}

fn choice() -> impl Strategy<Value = Choice> {
    let place = (word(), word()).prop_map(|(node, zone)| Place { node, zone });
    let distribution = select(&Distribution::ALL[..]);
    (distribution, option::of(1..=u32::MAX), btree_map(address(), place, 0..4))
        .prop_map(|(distribution, affinity, places)| Choice { distribution, affinity, places })
}

fn text_match() -> impl Strategy<Value = TextMatch> {
    let pattern = select(vec!["a", "a|b", "[ab]+", ".*"]);
    prop_oneof![
        2 => word().prop_map(TextMatch::Exact),
        1 => pattern.prop_map(|text| TextMatch::Pattern(text.parse().expect("a pattern"))),
    ]
}

fn value_match() -> impl Strategy<Value = ValueMatch> {
    (word(), text_match()).prop_map(|(name, value)| ValueMatch { name, value })
}

/// A path of up to three segments.
pub(crate) fn path() -> impl Strategy<Value = String> {
    (vec(word(), 0..4), any::<bool>()).prop_map(|(segments, slash)| {
        let whole: String = segments.iter().map(|segment| format!("/{segment}")).collect();
        if slash || whole.is_empty() { whole + "/" } else { whole }
    })
}

fn path_match(kind: RouteKind) -> BoxedStrategy<PathMatch> {
    let pattern = select(vec!["/a", "/a.*", "/[ab]/?", "/.*"]);
    match kind {
        RouteKind::Http => prop_oneof![
            2 => path().prop_map(PathMatch::Exact),
            3 => path().prop_map(|path| PathMatch::Prefix(path.trim_end_matches('/').to_owned())),
            1 => pattern.prop_map(|text| PathMatch::Pattern(text.parse().expect("a pattern"))),
        ]
        .boxed(),
        RouteKind::Grpc | RouteKind::Tls | RouteKind::Tcp => {
            (option::of(text_match()), option::of(text_match()))
                .prop_map(|(service, method)| PathMatch::Call { service, method })
                .boxed()
        }
    }
}

fn request_match(kind: RouteKind) -> impl Strategy<Value = RequestMatch> {
    let method = option::of(select(vec!["GET", "POST"]).prop_map(ToOwned::to_owned));
    (path_match(kind), vec(value_match(), 0..3), vec(value_match(), 0..2), method)
        .prop_map(|(path, headers, query, method)| RequestMatch { path, headers, query, method })
}

fn backend_target() -> impl Strategy<Value = BackendTarget> {
    let service = (name(), port()).prop_map(|(service, port)| BackendTarget::Service { service, port });
    prop_oneof![4 => service, 1 => Just(BackendTarget::Nowhere)]
}

fn filters() -> impl Strategy<Value = Filters> {
    let header = || (word(), word());
    let edits = || {
        (vec(header(), 0..2), vec(header(), 0..2), vec(word(), 0..2))
            .prop_map(|(set, add, remove)| HeaderEdits { set, add, remove })
    };
    let edit = || prop_oneof![path().prop_map(PathEdit::Full), path().prop_map(PathEdit::Prefix)];
    let where_to = (option::of(word()), option::of(word()), option::of(edit()), option::of(port()));
    let redirect =
        (where_to, select(vec![301u16, 302, 307])).prop_map(|((scheme, hostname, path, port), status)| {
            Redirect { scheme, hostname, path, port, status }
        });
    let rewrite =
        (option::of(word()), option::of(edit())).prop_map(|(hostname, path)| Rewrite { hostname, path });
    let mirror = (backend_target(), 0u32..4, 1u32..4).prop_map(|(to, copies, of)| Mirror { to, copies, of });
    let words = || vec(word(), 0..2);
    let cors = (words(), words(), words(), words(), any::<bool>(), any::<u32>()).prop_map(
        |(origins, methods, headers, expose, credentials, max_age)| Cors {
            origins,
            methods,
            headers,
            expose,
            credentials,
            max_age,
        },
    );
    let answered = (option::of(redirect), option::of(rewrite), option::of(cors));
    (edits(), edits(), answered, vec(mirror, 0..2)).prop_map(
        |(request_headers, response_headers, (redirect, rewrite, cors), mirrors)| Filters {
            request_headers,
            response_headers,
            redirect,
            rewrite,
            mirrors,
            cors,
        },
    )
}

fn route_rule(kind: RouteKind) -> impl Strategy<Value = RouteRule> {
    let millis = || option::of((1u64..9).prop_map(Duration::from_millis));
    let backend = (backend_target(), 0u32..4, filters()).prop_map(|(to, weight, filters)| Backend {
        to,
        weight,
        filters,
    });
    let retry =
        (vec(select(vec![500u16, 503]), 0..2), 0u32..3, 0u64..9).prop_map(|(codes, attempts, backoff)| {
            Retry { codes, attempts, backoff: Duration::from_millis(backoff) }
        });
    let by = select(vec![PersistBy::Cookie, PersistBy::Header]);
    let persistence =
        (word(), by, option::of(1u32..9)).prop_map(|(name, by, lifetime)| Persistence { name, by, lifetime });
    let how = (millis(), millis(), option::of(retry), option::of(persistence), traffic::traffic());
    (word(), vec(request_match(kind), 0..3), filters(), vec(backend, 0..3), how).prop_map(
        |(name, matches, filters, backends, (request, backend, retry, persistence, traffic))| RouteRule {
            name,
            matches,
            filters,
            backends,
            timeouts: Timeouts { request, backend },
            retry,
            persistence,
            traffic,
        },
    )
}

pub(crate) fn route() -> impl Strategy<Value = RequestRoute> {
    select(&RouteKind::OF_REQUESTS[..]).prop_flat_map(|kind| {
        let parent = (name(), option::of(port())).prop_map(|(service, port)| Parent { service, port });
        (name(), 0i64..3, vec(parent, 1..3), vec(route_rule(kind), 0..3)).prop_map(
            move |(name, created, parents, rules)| RequestRoute { kind, name, created, parents, rules },
        )
    })
}

fn mesh() -> impl Strategy<Value = Mesh> {
    (trust_domain(), vec(vec(any::<u8>(), 0..4), 0..3))
        .prop_map(|(trust_domain, roots)| Mesh { trust_domain, roots })
}

/// A view with everything that a view can have.
pub(crate) fn view() -> impl Strategy<Value = NodeView> {
    let demand = option::of(vec(block(), 0..4).prop_map(|blocks| Demand { blocks }));
    let own = (vec(authentication(), 0..3), vec(intake(), 0..3));
    let answers = (demand, vec(address(), 0..3), vec(route(), 0..3), own);
    let parts = (option::of(mesh()), vec(workload(), 0..6), vec(service(), 0..4), vec(policy(), 0..4));
    (parts, answers).prop_map(
        |((mesh, workloads, services, policies), (demand, nobody, routes, (users, intakes)))| {
            mesh.map(|it| Resource::Mesh(Arc::new(it)))
                .into_iter()
                .chain(workloads.into_iter().map(|it| Resource::Workload(Arc::new(it))))
                .chain(services.into_iter().map(|it| Resource::Service(Arc::new(it))))
                .chain(policies.into_iter().map(|it| Resource::Policy(Arc::new(it))))
                .chain(users.into_iter().map(|it| Resource::Authentication(Arc::new(it))))
                .chain(intakes.into_iter().map(|it| Resource::Intake(Arc::new(it))))
                .chain(demand.map(|it| Resource::Demand(Arc::new(it))))
                .chain(nobody.into_iter().map(Resource::Nobody))
                .chain(routes.into_iter().map(|it| Resource::Route(Arc::new(it))))
                .collect()
        },
    )
}
