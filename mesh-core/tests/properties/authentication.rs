//! End users: a policy more never lets more through, and claims without a verified token never do.

use http::{HeaderMap, HeaderValue, Method, Uri};
use mesh_core::{
    authentication::{authenticate, would_refuse},
    http::matches::Asked,
    model::{Action, Asks, Authentication, ClaimPattern, Enforcement, Mode, Name, Policy, Rule, Target},
    policy::{Content, Request, decide, request::Reading},
};
use proptest::{collection::vec, prelude::*, sample::select};

use crate::arbitrary;

/// What is no token, in places where tokens are looked for.
fn headers() -> impl Strategy<Value = HeaderMap> {
    let value = select(vec!["Bearer a.b.c", "Bearer eyJhbGciOiJub25lIn0.e30.", "a=x; b=y", "x", ""]);
    let name = select(vec!["a", "b", "c", "cookie"]);
    vec((name, value), 0..4).prop_map(|all| {
        let mut headers = HeaderMap::new();
        for (name, value) in all {
            headers.append(name, HeaderValue::from_static(value));
        }
        headers
    })
}

fn uri() -> impl Strategy<Value = Uri> {
    select(vec!["/", "/?a=x", "/?a=x&b=y", "/?a=x&a=y"]).prop_map(Uri::from_static)
}

proptest! {
    #[test]
    fn a_policy_more_never_lets_more_through(
        policies in vec(arbitrary::authentication(), 0..3),
        more in arbitrary::authentication(),
        headers in headers(),
        uri in uri(),
        port in 1u16..4,
        now in any::<i64>(),
    ) {
        let asked = Asked { method: &Method::GET, uri: &uri, headers: &headers };
        let before = authenticate(&policies, port, &asked, now);
        let after = authenticate(policies.iter().chain([&more]), port, &asked, now);
        prop_assert!(before.is_ok() || after.is_err(), "{:?} {:?}", before, after);
        let audited = Authentication { enforcement: Enforcement::Audit, ..more.clone() };
        let beside = authenticate(policies.iter().chain([&audited]), port, &asked, now);
        prop_assert_eq!(&beside, &before, "an audited one changes nothing");
        if before.is_ok() {
            let would = would_refuse(policies.iter().chain([&audited]), port, Some(&asked), now);
            let enforced = Authentication { enforcement: Enforcement::Enforce, ..more.clone() };
            let then = authenticate(policies.iter().filter(|it| it.is_enforced()).chain([&enforced]), port, &asked, now);
            prop_assert!(then.is_ok() || would.is_some(), "{:?} is not told", then);
        }
        // None of these tokens is one, so whoever goes on is nobody.
        for decided in [before, after].into_iter().flatten() {
            prop_assert!(decided.claims.is_none());
        }
    }

    #[test]
    fn of_nobody_an_allow_rule_on_claims_never_matches_and_a_deny_rule_always_does(
        names in vec("[a-z/]{1,4}", 1..3),
        negated in any::<bool>(),
    ) {
        let claims = names.into_iter().map(|name| ClaimPattern { name, values: vec![] }).collect();
        let asks = Asks { claims, ..Asks::default() };
        let (any_of, none_of) = if negated { (Asks::default(), asks) } else { (asks, Asks::default()) };
        let rules = vec![Rule { from: vec![], to: vec![Target { any_of, none_of, ..Target::default() }] }];
        let (uri, headers) = (Uri::from_static("/"), HeaderMap::new());
        let reading = Reading::of(&Asked { method: &Method::GET, uri: &uri, headers: &headers });
        for action in [Action::Allow, Action::Deny] {
            let policy = Policy::new(Name::new("a", "b"), action, rules.clone());
            for content in [Content::Request(&reading), Content::Bytes] {
                let source_address = [10, 0, 0, 1].into();
                let request = Request { source: None, source_address, port: 80, content };
                prop_assert!(!decide(Mode::Permissive, [&policy], &request).verdict.allows(), "{:?}", action);
            }
        }
    }
}
