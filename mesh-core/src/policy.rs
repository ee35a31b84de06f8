//! Who may connect: the one decision that agents enforce and `meshctl why` explains.
//!
//! Order of words, strongest first: a deny rule that matches; an allow rule that matches; the existence of any allow
//! policy (then what nothing allowed is refused); otherwise allowed. Adding a deny policy never allows anything.

use std::net::IpAddr;

use serde::Serialize;

use crate::{
    identity::SpiffeId,
    model::{Action, Mode, Name, Policy, Rule, Source},
    refusal::Reason,
};

/// What is known of a connection when its destination decides.
#[derive(Debug, Clone, Copy)]
pub struct Request<'a> {
    /// The identity that mutual TLS proved; `None` for plaintext.
    pub source: Option<&'a SpiffeId>,
    /// The address that the source's application has.
    pub source_address: IpAddr,
    /// The port of the destination workload.
    pub port: u16,
}

/// The rule that decided.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct RuleRef {
    /// Its policy.
    pub policy: Name,
    /// Its place in `spec.rules`, from 0.
    pub rule: usize,
}

impl std::fmt::Display for RuleRef {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}[{}]", self.policy, self.rule)
    }
}

/// The result, with what it rests on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub enum Verdict {
    /// No allow policy selects the destination and no deny rule matched.
    AllowedByDefault,
    /// This allow rule matched.
    Allowed(RuleRef),
    /// Refused; the rule is named where one matched.
    Refused {
        /// Why.
        reason: Reason,
        /// The deny rule that matched, or nothing when no allow rule did.
        rule: Option<RuleRef>,
    },
}

/// Decides a connection to a workload of the given mode, that the given policies select.
pub fn decide<'p>(
    mode: Mode,
    policies: impl IntoIterator<Item = &'p Policy> + Clone,
    request: &Request<'_>,
) -> Verdict {
    if mode == Mode::Strict && request.source.is_none() {
        return Verdict::Refused { reason: Reason::PlaintextToStrict, rule: None };
    }
    let of = |action| policies.clone().into_iter().filter(move |p| p.action == action);
    if let Some(rule) = of(Action::Deny).find_map(|policy| matching_rule(policy, request)) {
        return Verdict::Refused { reason: Reason::PolicyDeny, rule: Some(rule) };
    }
    if let Some(rule) = of(Action::Allow).find_map(|policy| matching_rule(policy, request)) {
        return Verdict::Allowed(rule);
    }
    if of(Action::Allow).next().is_some() {
        return Verdict::Refused { reason: Reason::PolicyNotAllowed, rule: None };
    }
    Verdict::AllowedByDefault
}

fn matching_rule(policy: &Policy, request: &Request<'_>) -> Option<RuleRef> {
    let rule = policy.rules.iter().position(|rule| rule_matches(rule, request))?;
    Some(RuleRef { policy: policy.name.clone(), rule })
}

fn rule_matches(rule: &Rule, request: &Request<'_>) -> bool {
    (rule.ports.is_empty() || rule.ports.contains(&request.port))
        && (rule.from.is_empty() || rule.from.iter().any(|source| source_matches(source, request)))
}

fn source_matches(source: &Source, request: &Request<'_>) -> bool {
    let identity =
        source.identities.is_empty() || request.source.is_some_and(|id| source.identities.contains(id));
    let namespace = source.namespaces.is_empty()
        || request
            .source
            .and_then(SpiffeId::namespace)
            .is_some_and(|ns| source.namespaces.iter().any(|wanted| wanted == ns));
    let block = source.address_blocks.is_empty()
        || source.address_blocks.iter().any(|block| block.contains(&request.source_address));
    identity && namespace && block
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn id(text: &str) -> SpiffeId {
        SpiffeId::parse(text).expect("a valid identity")
    }

    fn policy(action: Action, rules: Vec<Rule>) -> Policy {
        Policy { name: Name::new("shop", "p"), selector: Default::default(), action, rules }
    }

    fn any_connection() -> Rule {
        Rule::default()
    }

    #[track_caller]
    fn check(mode: Mode, policies: &[Policy], source: Option<&str>, expected: Result<(), Reason>) {
        let source = source.map(id);
        let request =
            Request { source: source.as_ref(), source_address: "10.1.0.11".parse().unwrap(), port: 8080 };
        let verdict = decide(mode, policies, &request);
        let got = match &verdict {
            Verdict::AllowedByDefault | Verdict::Allowed(_) => Ok(()),
            Verdict::Refused { reason, .. } => Err(*reason),
        };
        assert_eq!(got, expected, "{verdict:?}");
    }

    const WEB: Option<&str> = Some("spiffe://td/ns/shop/sa/web");

    #[test]
    fn the_order_of_words() {
        use Mode::{Permissive, Strict};
        let from_web = Rule {
            from: vec![Source { identities: vec![id("spiffe://td/ns/shop/sa/web")], ..Source::default() }],
            ports: vec![8080],
        };
        let from_block = Rule {
            from: vec![Source { address_blocks: vec!["10.1.0.0/16".parse().unwrap()], ..Source::default() }],
            ports: vec![],
        };
        let from_ns = Rule {
            from: vec![Source { namespaces: vec!["shop".into()], ..Source::default() }],
            ports: vec![],
        };
        let other_port = Rule { from: vec![], ports: vec![9090] };
        check(Permissive, &[], None, Ok(()));
        check(Strict, &[], None, Err(Reason::PlaintextToStrict));
        check(Strict, &[], WEB, Ok(()));
        check(Permissive, &[policy(Action::Allow, vec![])], WEB, Err(Reason::PolicyNotAllowed));
        check(Permissive, &[policy(Action::Allow, vec![from_web.clone()])], WEB, Ok(()));
        check(
            Permissive,
            &[policy(Action::Allow, vec![from_web.clone()])],
            None,
            Err(Reason::PolicyNotAllowed),
        );
        check(Permissive, &[policy(Action::Allow, vec![from_ns])], WEB, Ok(()));
        check(Permissive, &[policy(Action::Allow, vec![from_block])], None, Ok(()));
        check(Permissive, &[policy(Action::Allow, vec![other_port])], WEB, Err(Reason::PolicyNotAllowed));
        let both = [policy(Action::Allow, vec![any_connection()]), policy(Action::Deny, vec![from_web])];
        check(Permissive, &both, WEB, Err(Reason::PolicyDeny));
        check(Permissive, &both, None, Ok(()));
    }

    fn arbitrary_policy() -> impl Strategy<Value = Policy> {
        let source = (any::<bool>(), any::<bool>(), any::<bool>()).prop_map(|(i, n, b)| Source {
            identities: if i { vec![id("spiffe://td/ns/shop/sa/web")] } else { vec![] },
            namespaces: if n { vec!["other".into()] } else { vec![] },
            address_blocks: if b { vec!["10.1.0.0/16".parse().unwrap()] } else { vec![] },
        });
        let rule = (prop::collection::vec(source, 0..3), prop::collection::vec(8079u16..8082, 0..3))
            .prop_map(|(from, ports)| Rule { from, ports });
        (any::<bool>(), prop::collection::vec(rule, 0..3))
            .prop_map(|(allow, rules)| policy(if allow { Action::Allow } else { Action::Deny }, rules))
    }

    proptest! {
        #[test]
        fn adding_a_deny_never_allows(policies in prop::collection::vec(arbitrary_policy(), 0..5), extra in arbitrary_policy(), tls: bool) {
            let web = id("spiffe://td/ns/shop/sa/web");
            let request = Request {
                source: tls.then_some(&web), source_address: "10.1.0.11".parse().unwrap(), port: 8080,
            };
            let before = decide(Mode::Permissive, &policies, &request);
            let mut more = policies.clone();
            more.push(Policy { action: Action::Deny, ..extra });
            let after = decide(Mode::Permissive, &more, &request);
            if matches!(before, Verdict::Refused { .. }) {
                let still_refused = matches!(after, Verdict::Refused { .. });
                prop_assert!(still_refused);
            }
        }
    }
}
