//! Precedence, as `docs/operate/authorization.md` tells it.

use std::net::IpAddr;

use http::{HeaderMap, HeaderName, HeaderValue, Method, Uri};
use mesh_core::{
    http::matches::Asked as AskedFor,
    identity::SpiffeId,
    model::{Action, Asks, Enforcement, Mode, Policy, Rule, Source, Target, TextPattern},
    policy::{Content, Decision, Reads, Request, Verdict, WouldRefuse, decide, reads, request::Reading},
    refusal::Reason,
};
use proptest::{collection::vec, option, prelude::*, sample::select};

use super::arbitrary;

/// A connection to be decided.
#[derive(Debug, Clone)]
struct Asked {
    mode: Mode,
    source: Option<SpiffeId>,
    address: IpAddr,
    port: u16,
    carries: Carries,
}

/// What comes by it.
#[derive(Debug, Clone)]
enum Carries {
    Bytes,
    Requests,
    Request { method: Method, uri: Box<Uri>, headers: Box<HeaderMap> },
}

impl Asked {
    fn decide(&self, policies: &[Policy]) -> Decision {
        let reading = match &self.carries {
            Carries::Request { method, uri, headers } => {
                Some(Reading::of(&AskedFor { method, uri, headers }))
            }
            Carries::Bytes | Carries::Requests => None,
        };
        let content = match (&self.carries, &reading) {
            (Carries::Bytes, _) => Content::Bytes,
            (_, Some(reading)) => Content::Request(reading),
            (_, None) => Content::Requests,
        };
        let (source, source_address) = (self.source.as_ref(), self.address);
        decide(self.mode, policies, &Request { source, source_address, port: self.port, content })
    }

    fn carrying(&self, carries: Carries) -> Self {
        Self { carries, ..self.clone() }
    }

    fn allowed(&self, policies: &[Policy]) -> bool {
        self.decide(policies).verdict.allows()
    }
}

fn asked() -> impl Strategy<Value = Asked> {
    let who = (arbitrary::mode(), option::of(arbitrary::identity()), arbitrary::address(), arbitrary::port());
    (who, carries()).prop_map(|((mode, source, address, port), carries)| Asked {
        mode,
        source,
        address,
        port,
        carries,
    })
}

fn request() -> impl Strategy<Value = Carries> {
    let method = select(vec![Method::GET, Method::PUT]);
    let path = select(vec!["/a", "/a/", "/a/b", "/A", "/a/../b", "//a", "/a%2fb", "http://b/a"]);
    let header = (select(vec!["x-a", "x-b", "host"]), select(vec!["a", "b", "/a/b"]));
    (method, path, vec(header, 0..3)).prop_map(|(method, path, headers)| {
        let mut all = HeaderMap::new();
        for (name, value) in headers {
            all.append(HeaderName::from_static(name), HeaderValue::from_static(value));
        }
        Carries::Request { method, uri: Box::new(path.parse().expect("a target")), headers: Box::new(all) }
    })
}

fn carries() -> impl Strategy<Value = Carries> {
    prop_oneof![1 => Just(Carries::Bytes), 1 => Just(Carries::Requests), 3 => request()]
}

fn policies() -> impl Strategy<Value = Vec<Policy>> {
    vec(arbitrary::policy(), 0..5)
}

fn enforced(policies: &[Policy]) -> Vec<Policy> {
    policies.iter().filter(|policy| policy.enforcement == Enforcement::Enforce).cloned().collect()
}

fn with(policies: &[Policy], more: Policy) -> Vec<Policy> {
    policies.iter().cloned().chain([more]).collect()
}

fn of(policy: Policy, action: Action, enforcement: Enforcement) -> Policy {
    Policy { action, enforcement, ..policy }
}

proptest! {
    #[test]
    fn deny_wins(asked in asked(), policies in policies(), deny in arbitrary::policy()) {
        let deny = of(deny, Action::Deny, Enforcement::Enforce);
        if !asked.allowed(std::slice::from_ref(&deny)) {
            let refused = !asked.allowed(&with(&policies, deny));
            prop_assert!(refused);
        }
    }

    #[test]
    fn adding_a_deny_policy_never_allows(asked in asked(), policies in policies(), deny in arbitrary::policy()) {
        let more = with(&policies, Policy { action: Action::Deny, ..deny });
        prop_assert!(asked.allowed(&policies) || !asked.allowed(&more));
    }

    #[test]
    fn adding_an_allow_policy_never_allows_what_a_deny_refuses(
        asked in asked(), policies in policies(), allow in arbitrary::policy(),
    ) {
        if let Verdict::Refused { reason: Reason::PolicyDeny, .. } = asked.decide(&policies).verdict {
            let after = asked.decide(&with(&policies, Policy { action: Action::Allow, ..allow })).verdict;
            let still_denied = matches!(after, Verdict::Refused { reason: Reason::PolicyDeny, .. });
            prop_assert!(still_denied);
        }
    }

    #[test]
    fn with_an_empty_allow_policy_only_what_another_allows_passes(
        asked in asked(), policies in policies(), empty in arbitrary::policy(),
    ) {
        let empty = Policy { rules: vec![], ..of(empty, Action::Allow, Enforcement::Enforce) };
        prop_assert!(!asked.allowed(std::slice::from_ref(&empty)));
        match asked.decide(&with(&policies, empty)).verdict {
            Verdict::AllowedByDefault => prop_assert!(false, "an allow policy is there"),
            Verdict::Allowed(_) | Verdict::ByRequest | Verdict::Refused { .. } => {}
        }
    }

    #[test]
    fn audited_policies_never_change_the_verdict(asked in asked(), policies in policies()) {
        prop_assert_eq!(asked.decide(&policies).verdict, asked.decide(&enforced(&policies)).verdict);
        prop_assert_eq!(asked.decide(&enforced(&policies)).would_refuse, None);
    }

    #[test]
    fn what_would_be_refused_is_what_enforcing_everything_refuses(asked in asked(), policies in policies()) {
        let all: Vec<Policy> =
            policies.iter().map(|it| Policy { enforcement: Enforcement::Enforce, ..it.clone() }).collect();
        let Decision { verdict, would_refuse } = asked.decide(&policies);
        match (verdict.allows(), asked.decide(&all).verdict) {
            (true, Verdict::Refused { reason, .. }) => {
                prop_assert_eq!(would_refuse.as_ref().map(|it| it.reason), Some(reason));
                let WouldRefuse { policy, .. } = would_refuse.expect("just compared");
                let audited = |it: &&Policy| it.name == policy && it.enforcement == Enforcement::Audit;
                prop_assert!(policies.iter().any(|it| audited(&it)), "{policy} is to blame, and not audited");
            }
            _ => prop_assert_eq!(would_refuse, None),
        }
    }

    #[test]
    fn order_never_shows(
        (policies, shuffled) in policies().prop_flat_map(|it| (Just(it.clone()), Just(it).prop_shuffle())),
        asked in asked(),
    ) {
        let backwards: Vec<Policy> = shuffled
            .into_iter()
            .map(|it| Policy { rules: it.rules.into_iter().rev().map(reversed).collect(), ..it })
            .collect();
        let (one, other) = (asked.decide(&policies), asked.decide(&backwards));
        prop_assert_eq!(one.verdict.allows(), other.verdict.allows());
        prop_assert_eq!(reason(&one.verdict), reason(&other.verdict));
        let shadow = |decision: &Decision| decision.would_refuse.as_ref().map(|it| it.reason);
        prop_assert_eq!(shadow(&one), shadow(&other));
    }

    #[test]
    fn a_source_that_proves_nothing_passes_no_rule_that_asks_who_it_is(
        asked in asked(), mut source in arbitrary::source(), name in arbitrary::name(),
    ) {
        let asked = Asked { source: None, mode: Mode::Permissive, ..asked };
        // Only identities, said either way: an address it does have.
        source.any_of.address_blocks.clear();
        source.none_of.address_blocks.clear();
        let asks = source != Source::default();
        let asks_only_who_not = source.any_of == Default::default();
        let rules = vec![Rule { from: vec![source], to: vec![] }];
        let allow = Policy::new(name.clone(), Action::Allow, rules.clone());
        let deny = Policy::new(name, Action::Deny, rules);
        prop_assert_eq!(asked.allowed(&[allow]), !asks);
        prop_assert_eq!(asked.allowed(&[deny]), !asks_only_who_not);
    }

    #[test]
    fn what_cannot_be_read_is_allowed_only_where_every_request_is(
        asked in asked(), policies in policies(), request in request(),
    ) {
        if asked.carrying(Carries::Bytes).allowed(&policies) {
            prop_assert!(asked.carrying(request).allowed(&policies));
        }
    }

    #[test]
    fn a_connection_is_refused_before_its_requests_only_where_every_request_is(
        asked in asked(), policies in policies(), request in request(),
    ) {
        if asked.carrying(request).allowed(&policies) {
            prop_assert!(asked.carrying(Carries::Requests).allowed(&policies));
        }
    }

    #[test]
    fn where_requests_are_not_read_they_make_no_difference(
        asked in asked(), policies in policies(), request in request(),
    ) {
        match reads(&policies, asked.port) {
            Reads::No => {
                let read = asked.carrying(request).decide(&policies);
                prop_assert_eq!(asked.carrying(Carries::Bytes).decide(&policies), read.clone());
                prop_assert_eq!(asked.carrying(Carries::Requests).decide(&policies), read);
            }
            Reads::Audit => {
                let read = asked.carrying(request).decide(&policies).verdict;
                prop_assert_eq!(asked.carrying(Carries::Bytes).decide(&policies).verdict, read);
            }
            Reads::Enforce => {}
        }
    }

    #[test]
    fn of_what_is_asked_for_and_left_out_at_once_nothing_is_allowed(
        asked in asked(), mut target in arbitrary::target(), request in request(), name in arbitrary::name(),
    ) {
        prop_assume!(!target.any_of.is_empty());
        target.none_of = target.any_of.clone();
        let rules = vec![Rule { from: vec![], to: vec![target] }];
        let allowed = asked.carrying(request).allowed(&[Policy::new(name, Action::Allow, rules)]);
        prop_assert!(!allowed);
    }

    #[test]
    fn a_path_is_the_same_however_it_is_encoded(
        path in "(/[a-z._~!$&'()*+,=:@ é-]{1,6}){1,4}", encoded in vec(any::<bool>(), 64),
    ) {
        prop_assume!(!path.contains('*') && path.split('/').all(|it| !matches!(it, "." | "..")));
        let written: String = path
            .bytes()
            .zip(encoded.iter().cycle())
            .map(|(byte, encode)| match byte {
                b'/' => "/".to_owned(),
                _ if *encode || byte == b' ' || !byte.is_ascii() => format!("%{byte:02X}"),
                _ => char::from(byte).to_string(),
            })
            .collect();
        let (method, uri, headers) = (Method::GET, written.parse().expect("a target"), HeaderMap::new());
        let reading = Reading::of(&AskedFor { method: &method, uri: &uri, headers: &headers });
        let any_of = Asks { paths: vec![TextPattern::Exact(path)], ..Asks::default() };
        let rules = vec![Rule { from: vec![], to: vec![Target { any_of, ..Target::default() }] }];
        let name = mesh_core::model::Name::new("a", "b");
        for (action, allowed) in [(Action::Allow, true), (Action::Deny, false)] {
            let content = Content::Request(&reading);
            let request = Request { source: None, source_address: IpAddr::from([10, 0, 0, 1]), port: 80, content };
            let policy = Policy::new(name.clone(), action, rules.clone());
            prop_assert_eq!(decide(Mode::Permissive, [&policy], &request).verdict.allows(), allowed, "{}", &written);
        }
    }

    #[test]
    fn strict_takes_no_plaintext_whatever_policies_say(asked in asked(), policies in policies()) {
        let asked = Asked { source: None, mode: Mode::Strict, ..asked };
        let Decision { verdict, would_refuse } = asked.decide(&policies);
        prop_assert_eq!(reason(&verdict), Some(Reason::PlaintextToStrict));
        prop_assert_eq!(would_refuse, None);
    }
}

fn reversed(rule: Rule) -> Rule {
    let (from, to) = (rule.from.into_iter().rev().collect(), rule.to.into_iter().rev().collect());
    Rule { from, to }
}

fn reason(verdict: &Verdict) -> Option<Reason> {
    match verdict {
        Verdict::Refused { reason, .. } => Some(*reason),
        Verdict::AllowedByDefault | Verdict::Allowed(_) | Verdict::ByRequest => None,
    }
}
