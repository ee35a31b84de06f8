//! Rules that can never decide, because another matches all that they match. Pure sets: no connection is looked at.
//!
//! Says so only when it is certain. Every field of a rule is taken apart by name, so that a new one does not compile
//! until it is thought of here.

use mesh_core::{
    model::{
        Action, Asks, ClaimPattern, Enforcement, HeaderPattern, IdentityPattern, Policy, PortRange, Rule,
        Selector, Source, Target, TextPattern, Traits,
    },
    policy::RuleRef,
};

/// Rules of a policy that another of its rules covers: each with that one. Of two equal ones, the later.
pub(super) fn within(policy: &Policy) -> Vec<(usize, usize)> {
    let rules = &policy.rules;
    let by = |place: usize| {
        (0..rules.len()).find(|other| {
            *other != place
                && covers(&rules[*other], &rules[place])
                && (*other < place || !covers(&rules[place], &rules[*other]))
        })
    };
    (0..rules.len()).filter_map(|place| Some((place, by(place)?))).collect()
}

/// Rules of an allow policy that a rule of a deny policy covers, wherever the allow policy selects anything. A deny
/// that is only audited refuses nothing, so it covers nothing.
pub(super) fn denied(allow: &Policy, deny: &Policy) -> Vec<(usize, RuleRef)> {
    let everywhere = allow.action == Action::Allow
        && deny.action == Action::Deny
        && deny.enforcement == Enforcement::Enforce
        && allow.name.namespace == deny.name.namespace
        && selects_all_of(&deny.selector, &allow.selector);
    if !everywhere {
        return vec![];
    }
    let by = |rule| {
        let rule = deny.rules.iter().position(|wide| covers(wide, rule))?;
        Some(RuleRef { policy: deny.name.clone(), rule })
    };
    allow.rules.iter().enumerate().filter_map(|(place, rule)| Some((place, by(rule)?))).collect()
}

/// Whether the first selects every workload that the second selects: it asks for nothing that the second does not.
fn selects_all_of(wide: &Selector, narrow: &Selector) -> bool {
    let Selector { labels, expressions } = wide;
    labels.iter().all(|(key, value)| narrow.labels.get(key) == Some(value))
        && expressions.iter().all(|expression| narrow.expressions.contains(expression))
}

/// Whether the first matches everything that the second matches. Holds for a deny over an allow too: what nothing
/// proves satisfies the negations of a deny and not those of an allow.
fn covers(wide: &Rule, narrow: &Rule) -> bool {
    let Rule { from, to } = wide;
    any_or(from, &narrow.from, source_covers) && any_or(to, &narrow.to, target_covers)
}

fn source_covers(wide: &Source, narrow: &Source) -> bool {
    let Source { any_of, none_of } = wide;
    any_of_covers(any_of, &narrow.any_of) && none_of_covers(none_of, &narrow.none_of)
}

fn any_of_covers(wide: &Traits, narrow: &Traits) -> bool {
    let Traits { identities, namespaces, trust_domains, address_blocks } = wide;
    let all_identities = |within: &dyn Fn(&IdentityPattern) -> bool| {
        !narrow.identities.is_empty() && narrow.identities.iter().all(within)
    };
    let of_namespaces = |pattern: &IdentityPattern| match pattern {
        IdentityPattern::Exact(id) => id.namespace().is_some_and(|it| namespaces.iter().any(|ns| ns == it)),
        IdentityPattern::Namespace(_, namespace) => namespaces.contains(namespace),
        IdentityPattern::TrustDomain(_) => false,
    };
    let of_domains = |pattern: &IdentityPattern| match pattern {
        IdentityPattern::Exact(id) => trust_domains.contains(id.trust_domain()),
        IdentityPattern::Namespace(domain, _) | IdentityPattern::TrustDomain(domain) => {
            trust_domains.contains(domain)
        }
    };
    any_or(identities, &narrow.identities, identity_covers)
        && (any_or(namespaces, &narrow.namespaces, |wide, narrow| wide == narrow)
            || all_identities(&of_namespaces))
        && (any_or(trust_domains, &narrow.trust_domains, |wide, narrow| wide == narrow)
            || all_identities(&of_domains))
        && any_or(address_blocks, &narrow.address_blocks, |wide, narrow| wide.contains(narrow))
}

/// Whether what the first leaves out, the second leaves out too. That the second may not ask for it at all is not
/// looked for.
fn none_of_covers(wide: &Traits, narrow: &Traits) -> bool {
    let Traits { identities, namespaces, trust_domains, address_blocks } = wide;
    all_within(identities, &narrow.identities, identity_covers)
        && all_within(namespaces, &narrow.namespaces, |wide, narrow| wide == narrow)
        && all_within(trust_domains, &narrow.trust_domains, |wide, narrow| wide == narrow)
        && all_within(address_blocks, &narrow.address_blocks, |wide, narrow| wide.contains(narrow))
}

fn identity_covers(wide: &IdentityPattern, narrow: &IdentityPattern) -> bool {
    match (wide, narrow) {
        (_, IdentityPattern::Exact(id)) => wide.matches(id),
        (IdentityPattern::TrustDomain(wide), IdentityPattern::Namespace(narrow, _)) => wide == narrow,
        _ => wide == narrow,
    }
}

fn target_covers(wide: &Target, narrow: &Target) -> bool {
    let Target { ports, not_ports, any_of, none_of } = wide;
    let asked_elsewhere = |left_out: &PortRange| {
        let apart = |asked: &PortRange| asked.last() < left_out.first() || left_out.last() < asked.first();
        !narrow.ports.is_empty() && narrow.ports.iter().all(apart)
    };
    let left_out = |it: &PortRange| narrow.not_ports.iter().any(|narrow| range_covers(narrow, it));
    any_or(ports, &narrow.ports, range_covers)
        && not_ports.iter().all(|it| left_out(it) || asked_elsewhere(it))
        && any_asks_cover(any_of, &narrow.any_of)
        && none_of_asks_cover(none_of, &narrow.none_of)
}

/// Of requests. A pattern that covers another does so in every reading of a request.
fn any_asks_cover(wide: &Asks, narrow: &Asks) -> bool {
    let Asks { methods, hosts, paths, headers, claims } = wide;
    any_or(methods, &narrow.methods, |wide, narrow| wide == narrow)
        && any_or(hosts, &narrow.hosts, TextPattern::covers)
        && any_or(paths, &narrow.paths, TextPattern::covers)
        && headers.iter().all(|wide| narrow.headers.iter().any(|narrow| header_covers(wide, narrow)))
        && claims.iter().all(|wide| narrow.claims.iter().any(|narrow| claim_covers(wide, narrow)))
}

fn none_of_asks_cover(wide: &Asks, narrow: &Asks) -> bool {
    let Asks { methods, hosts, paths, headers, claims } = wide;
    all_within(methods, &narrow.methods, |wide, narrow| wide == narrow)
        && all_within(hosts, &narrow.hosts, TextPattern::covers)
        && all_within(paths, &narrow.paths, TextPattern::covers)
        && all_within(headers, &narrow.headers, header_covers)
        && all_within(claims, &narrow.claims, claim_covers)
}

fn claim_covers(wide: &ClaimPattern, narrow: &ClaimPattern) -> bool {
    wide.name == narrow.name && any_or(&wide.values, &narrow.values, TextPattern::covers)
}

fn header_covers(wide: &HeaderPattern, narrow: &HeaderPattern) -> bool {
    wide.name == narrow.name && any_or(&wide.values, &narrow.values, TextPattern::covers)
}

fn range_covers(wide: &PortRange, narrow: &PortRange) -> bool {
    wide.contains(narrow.first()) && wide.contains(narrow.last())
}

/// Empty means any; else every entry of the second is within one of the first.
fn any_or<T>(wide: &[T], narrow: &[T], within: impl Fn(&T, &T) -> bool) -> bool {
    wide.is_empty() || (!narrow.is_empty() && all_within(narrow, wide, within))
}

/// Every entry of the first is within one of the second.
fn all_within<T>(inner: &[T], outer: &[T], within: impl Fn(&T, &T) -> bool) -> bool {
    inner.iter().all(|inner| outer.iter().any(|outer| within(outer, inner)))
}

#[cfg(test)]
mod tests {
    use mesh_core::model::Name;

    use super::*;

    fn traits(texts: &str) -> Traits {
        let mut traits = Traits::default();
        for text in texts.split_whitespace() {
            if text.starts_with("spiffe://") {
                traits.identities.push(IdentityPattern::parse(text).unwrap());
            } else if let Some(domain) = text.strip_prefix("td=") {
                traits.trust_domains.push(domain.parse().unwrap());
            } else if let Ok(block) = text.parse() {
                traits.address_blocks.push(block);
            } else {
                traits.namespaces.push(text.to_owned());
            }
        }
        traits
    }

    /// A rule from what any of and none of is, to ports and without ports, each apart by spaces.
    fn rule([any_of, none_of, ports, not_ports]: [&str; 4]) -> Rule {
        let ranges = |text: &str| text.split_whitespace().map(|it| it.parse().unwrap()).collect();
        Rule {
            from: vec![Source { any_of: traits(any_of), none_of: traits(none_of) }],
            to: vec![Target { ports: ranges(ports), not_ports: ranges(not_ports), ..Target::default() }],
        }
    }

    const WEB: &str = "spiffe://td/ns/shop/sa/web";
    const SHOP: &str = "spiffe://td/ns/shop/*";
    const ALL: &str = "spiffe://td/*";

    #[test]
    fn a_wider_rule_covers_a_narrower_one_and_never_the_other_way() {
        assert!(covers(&Rule::default(), &rule([WEB, "", "80", ""])));
        for (wide, narrow) in [
            ([WEB, "", "", ""], [WEB, "", "80", ""]),
            (["", "", "80 81", ""], [WEB, "", "80", ""]),
            (["", "", "80-90", ""], ["", "", "81-85 90", ""]),
            (["shop", "", "", ""], [WEB, "", "", ""]),
            (["shop", "", "", ""], [SHOP, "", "", ""]),
            ([SHOP, "", "", ""], [WEB, "", "", ""]),
            ([ALL, "", "", ""], [SHOP, "", "", ""]),
            (["td=td", "", "", ""], [ALL, "", "", ""]),
            (["td=td", "", "", ""], [WEB, "", "", ""]),
            (["10.0.0.0/8", "", "", ""], ["10.1.0.0/16", "", "", ""]),
            (["10.0.0.0/8", "", "", ""], [&format!("{WEB} 10.1.2.3/32"), "", "", ""]),
            (["", WEB, "", ""], ["", SHOP, "", ""]),
            (["", "10.1.0.0/16", "", ""], ["", "10.0.0.0/8", "", ""]),
            (["", "", "", "80"], ["", "", "", "80-90"]),
            (["", "", "", "80"], ["", "", "443", ""]),
            (["", "", "", ""], ["", "shop td=td", "", "80"]),
        ] {
            assert!(covers(&rule(wide), &rule(narrow)), "{wide:?} {narrow:?}");
            assert!(!covers(&rule(narrow), &rule(wide)), "{narrow:?} {wide:?}");
        }
    }

    #[test]
    fn what_is_not_certain_covers_nothing() {
        for (one, other) in [
            ([WEB, "", "", ""], ["other", "", "", ""]),
            (["", WEB, "", ""], ["", "shop", "", ""]),
            (["", WEB, "", ""], ["other", "", "", ""]),
            (["", "", "80-90", "85"], ["", "", "84-86", ""]),
            (["", "", "80 81", ""], ["", "", "81-82", ""]),
            ([ALL, "", "", ""], ["spiffe://elsewhere/ns/shop/*", "", "", ""]),
        ] {
            assert!(!covers(&rule(one), &rule(other)), "{one:?} {other:?}");
            assert!(!covers(&rule(other), &rule(one)), "{other:?} {one:?}");
        }
    }

    /// A rule to requests with these methods, paths and headers that are there, and not with these.
    fn of_requests(any_of: [&str; 3], none_of: [&str; 3]) -> Rule {
        let asks = |[methods, paths, headers]: [&str; 3]| Asks {
            methods: methods.split_whitespace().map(str::to_owned).collect(),
            hosts: vec![],
            paths: paths.split_whitespace().map(|it| it.parse().unwrap()).collect(),
            headers: headers
                .split_whitespace()
                .map(|name| HeaderPattern { name: name.to_owned(), values: vec![] })
                .collect(),
            claims: vec![],
        };
        let (any_of, none_of) = (asks(any_of), asks(none_of));
        Rule { from: vec![], to: vec![Target { any_of, none_of, ..Target::default() }] }
    }

    #[test]
    fn a_rule_on_connections_covers_one_on_requests_and_never_the_other_way() {
        let nothing = [""; 3];
        for (wide, narrow) in [
            ((nothing, nothing), (["GET", "", ""], nothing)),
            ((nothing, nothing), (nothing, ["", "/a", ""])),
            ((["GET PUT", "", ""], nothing), (["GET", "", ""], nothing)),
            ((["", "/a*", ""], nothing), (["", "/a/*", "x"], nothing)),
            ((["", "", "x"], nothing), (["GET", "", "x y"], nothing)),
            ((nothing, ["", "/a/*", ""]), (nothing, ["", "/a*", ""])),
        ] {
            let (wide, narrow) = (of_requests(wide.0, wide.1), of_requests(narrow.0, narrow.1));
            assert!(covers(&wide, &narrow), "{wide} {narrow}");
            assert!(!covers(&narrow, &wide), "{narrow} {wide}");
        }
    }

    fn policy(action: Action, rules: Vec<Rule>) -> Policy {
        Policy::new(Name::new("shop", "p"), action, rules)
    }

    #[test]
    fn only_a_deny_that_is_enforced_on_all_that_the_allow_selects_covers() {
        let allow = policy(Action::Allow, vec![rule([WEB, "", "80", ""])]);
        let deny = policy(Action::Deny, vec![rule([SHOP, "", "", ""])]);
        assert_eq!(denied(&allow, &deny).len(), 1);
        assert_eq!(denied(&allow, &Policy { enforcement: Enforcement::Audit, ..deny.clone() }), []);
        let labels = [("app".to_owned(), "web".to_owned())].into();
        let selector = Selector { labels, ..Selector::default() };
        assert_eq!(denied(&allow, &Policy { selector: selector.clone(), ..deny.clone() }), []);
        assert_eq!(denied(&Policy { selector, ..allow }, &deny).len(), 1);
    }

    #[test]
    fn of_two_equal_rules_the_later_one_is_told() {
        let twice = vec![rule(["", "", "80", ""]), rule(["", "", "80", ""])];
        assert_eq!(within(&policy(Action::Allow, twice)), [(1, 0)]);
    }
}
