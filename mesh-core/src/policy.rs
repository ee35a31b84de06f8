//! Who may connect, and who may ask for what: the one decision that agents enforce and `meshctl why` explains.
//!
//! Order of words, strongest first: a strict destination's mode; a deny rule that matches; an allow rule that matches;
//! the existence of any allow policy (then what nothing allowed is refused); otherwise allowed. `docs/operate/authorization.md`
//! tells it to people.
//!
//! Invariants, each a property test (`tests/properties/policy.rs`): a deny policy never allows anything; an allow policy
//! never allows what a deny rule refuses; an audited policy never changes the verdict; order changes nothing but the
//! name of the rule; what nothing proves never satisfies an allow rule's `not…`, and always a deny rule's; a connection
//! that carries no requests is allowed only where every request is, and one whose requests are still to come is refused only
//! where every request is.

pub mod request;

use std::net::IpAddr;

use serde::Serialize;

use crate::{
    identity::SpiffeId,
    model::{Action, Enforcement, IdentityPattern, Mode, Name, Policy, Rule, Source, Target},
    refusal::Reason,
};
use request::Reading;

/// What is known of a connection when its destination decides.
#[derive(Debug, Clone, Copy)]
pub struct Request<'a> {
    /// The identity that mutual TLS proved; `None` for plaintext.
    pub source: Option<&'a SpiffeId>,
    /// The address that the source's application has.
    pub source_address: IpAddr,
    /// The port of the destination workload.
    pub port: u16,
    /// What comes by it.
    pub content: Content<'a>,
}

/// What a connection carries, as far as that is known when it is decided.
#[derive(Debug, Clone, Copy)]
pub enum Content<'a> {
    /// Bytes, of which nothing can be said: rules on requests allow none of it, and deny all.
    Bytes,
    /// Requests, each of which is decided for itself when it comes.
    Requests,
    /// This one.
    Request(&'a Reading<'a>),
}

/// Whether requests to a port have to be read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Reads {
    /// No rule says anything of them.
    No,
    /// Only audited policies do: what cannot be read goes on.
    Audit,
    /// An enforced policy does: what cannot be read is decided as [`Content::Bytes`].
    Enforce,
}

/// Whether rules of these policies, which select a workload, say something of requests to this port of it.
pub fn reads<'p>(policies: impl IntoIterator<Item = &'p Policy>, port: u16) -> Reads {
    let of = |policy: &Policy| {
        let mut targets = policy.rules.iter().flat_map(|rule| &rule.to);
        match (targets.any(|target| target.is_of_requests() && target.has_port(port)), policy.enforcement) {
            (false, _) => Reads::No,
            (true, Enforcement::Audit) => Reads::Audit,
            (true, Enforcement::Enforce) => Reads::Enforce,
        }
    };
    policies.into_iter().map(of).max().unwrap_or(Reads::No)
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
    /// Some of the requests that may come by it are allowed by a rule, and others are not.
    ByRequest,
    /// Refused; the rule is named where one matched.
    Refused {
        /// Why.
        reason: Reason,
        /// The deny rule that matched, or nothing when no allow rule did.
        rule: Option<RuleRef>,
    },
}

impl Verdict {
    /// Whether the connection is let through.
    pub fn allows(&self) -> bool {
        !matches!(self, Self::Refused { .. })
    }
}

/// What audited policies would refuse that is let through.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct WouldRefuse {
    /// The audited policy; where several would refuse, the first by name.
    pub policy: Name,
    /// The place of its deny rule in `spec.rules`, or nothing when no allow rule matched.
    pub rule: Option<usize>,
    /// With which reason.
    pub reason: Reason,
}

impl std::fmt::Display for WouldRefuse {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.rule {
            Some(rule) => write!(f, "{}[{rule}] ({})", self.policy, self.reason),
            None => write!(f, "{} ({})", self.policy, self.reason),
        }
    }
}

/// What was decided, and what would have been.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Decision {
    /// By the enforced policies: this happens.
    pub verdict: Verdict,
    /// What enforcing the audited ones too would refuse.
    pub would_refuse: Option<WouldRefuse>,
}

/// Decides a connection to a workload of the given mode, that the given policies select.
pub fn decide<'p>(
    mode: Mode,
    policies: impl IntoIterator<Item = &'p Policy, IntoIter: Clone>,
    request: &Request<'_>,
) -> Decision {
    if mode == Mode::Strict && request.source.is_none() {
        let verdict = Verdict::Refused { reason: Reason::PlaintextToStrict, rule: None };
        return Decision { verdict, would_refuse: None };
    }
    let policies = policies.into_iter();
    let of = |enforcement| policies.clone().filter(move |policy| policy.enforcement == enforcement);
    let verdict = judge(of(Enforcement::Enforce), request);
    let news = verdict.allows() && of(Enforcement::Audit).next().is_some();
    let would_refuse =
        news.then(|| shadow(judge(policies.clone(), request), of(Enforcement::Audit))).flatten();
    Decision { verdict, would_refuse }
}

fn judge<'p>(policies: impl Iterator<Item = &'p Policy> + Clone, request: &Request<'_>) -> Verdict {
    let of = |action| policies.clone().filter(move |policy| policy.action == action);
    let rule = |action, matches| of(action).find_map(|policy| rule_that(policy, request, |it| it == matches));
    if let Some(rule) = rule(Action::Deny, Matches::Yes) {
        return Verdict::Refused { reason: Reason::PolicyDeny, rule: Some(rule) };
    }
    if let Some(rule) = rule(Action::Allow, Matches::Yes) {
        return Verdict::Allowed(rule);
    }
    if rule(Action::Allow, Matches::SomeRequests).is_some() {
        return Verdict::ByRequest;
    }
    if of(Action::Allow).next().is_some() {
        return Verdict::Refused { reason: Reason::PolicyNotAllowed, rule: None };
    }
    Verdict::AllowedByDefault
}

/// Who is behind a refusal that the enforced policies alone do not make. A deny rule is an audited policy's then, and
/// where no allow rule matched, all allow policies are audited ones: an enforced one would have refused by itself.
fn shadow<'p>(verdict: Verdict, mut audited: impl Iterator<Item = &'p Policy>) -> Option<WouldRefuse> {
    match verdict {
        Verdict::AllowedByDefault | Verdict::Allowed(_) | Verdict::ByRequest => None,
        Verdict::Refused { reason, rule: Some(rule) } => {
            Some(WouldRefuse { policy: rule.policy, rule: Some(rule.rule), reason })
        }
        Verdict::Refused { reason, rule: None } => {
            let policy = audited.find(|policy| policy.action == Action::Allow)?.name.clone();
            Some(WouldRefuse { policy, rule: None, reason })
        }
    }
}

/// Whether a rule matches a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Matches {
    No,
    /// It depends on which request comes.
    SomeRequests,
    Yes,
}

fn rule_that(policy: &Policy, request: &Request<'_>, is: impl Fn(Matches) -> bool) -> Option<RuleRef> {
    let rule = policy.rules.iter().position(|rule| is(rule_matches(rule, policy.action, request)))?;
    Some(RuleRef { policy: policy.name.clone(), rule })
}

fn rule_matches(rule: &Rule, action: Action, request: &Request<'_>) -> Matches {
    if !rule.from.is_empty() && !rule.from.iter().any(|source| source_matches(source, action, request)) {
        return Matches::No;
    }
    if rule.to.is_empty() {
        return Matches::Yes;
    }
    rule.to.iter().map(|target| target_matches(target, action, request)).max().unwrap_or(Matches::No)
}

fn target_matches(target: &Target, action: Action, request: &Request<'_>) -> Matches {
    if !target.has_port(request.port) {
        return Matches::No;
    }
    if !target.is_of_requests() {
        return Matches::Yes;
    }
    let matches = match request.content {
        Content::Bytes => action == Action::Deny,
        Content::Requests => return Matches::SomeRequests,
        Content::Request(reading) => reading.matches(&target.any_of, &target.none_of, action),
    };
    if matches { Matches::Yes } else { Matches::No }
}

fn source_matches(source: &Source, action: Action, request: &Request<'_>) -> bool {
    let Source { any_of, none_of } = source;
    let (id, address) = (request.source, &request.source_address);
    let (namespace, domain) = (id.and_then(SpiffeId::namespace), id.map(SpiffeId::trust_domain));
    let blocks = |blocks: &[ipnet::IpNet]| blocks.iter().any(|block| block.contains(address));
    includes(&any_of.identities, id, IdentityPattern::matches)
        && includes(&any_of.namespaces, namespace, |entry, known| entry == known)
        && includes(&any_of.trust_domains, domain, |entry, known| entry == known)
        && (any_of.address_blocks.is_empty() || blocks(&any_of.address_blocks))
        && excludes(&none_of.identities, action, id, IdentityPattern::matches)
        && excludes(&none_of.namespaces, action, namespace, |entry, known| entry == known)
        && excludes(&none_of.trust_domains, action, domain, |entry, known| entry == known)
        && !blocks(&none_of.address_blocks)
}

/// An entry matches what is known; a list that is not given includes everything.
fn includes<E, K: ?Sized>(list: &[E], known: Option<&K>, matches: impl Fn(&E, &K) -> bool) -> bool {
    list.is_empty() || known.is_some_and(|known| list.iter().any(|entry| matches(entry, known)))
}

/// No entry matches what is known. Of a source that has proved nothing it cannot be said that it is *not* somebody: it
/// is never allowed for that, and always denied.
fn excludes<E, K: ?Sized>(
    list: &[E],
    action: Action,
    known: Option<&K>,
    matches: impl Fn(&E, &K) -> bool,
) -> bool {
    match known {
        _ if list.is_empty() => true,
        Some(known) => !list.iter().any(|entry| matches(entry, known)),
        None => action == Action::Deny,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::Traits;

    fn id(text: &str) -> SpiffeId {
        SpiffeId::parse(text).expect("a valid identity")
    }

    fn policy(action: Action, rules: Vec<Rule>) -> Policy {
        Policy::new(Name::new("shop", "p"), action, rules)
    }

    fn from(any_of: Traits) -> Rule {
        Rule { from: vec![Source { any_of, none_of: Traits::default() }], to: vec![] }
    }

    fn not_from(none_of: Traits) -> Rule {
        Rule { from: vec![Source { any_of: Traits::default(), none_of }], to: vec![] }
    }

    fn to(ports: &[&str], not_ports: &[&str]) -> Rule {
        let ranges = |texts: &[&str]| texts.iter().map(|text| text.parse().unwrap()).collect();
        Rule {
            from: vec![],
            to: vec![Target { ports: ranges(ports), not_ports: ranges(not_ports), ..Target::default() }],
        }
    }

    fn identities(patterns: &[&str]) -> Traits {
        let identities = patterns.iter().map(|text| IdentityPattern::parse(text).unwrap()).collect();
        Traits { identities, ..Traits::default() }
    }

    fn namespaces(names: &[&str]) -> Traits {
        Traits { namespaces: names.iter().map(|name| (*name).to_owned()).collect(), ..Traits::default() }
    }

    fn trust_domains(names: &[&str]) -> Traits {
        let trust_domains = names.iter().map(|name| name.parse().unwrap()).collect();
        Traits { trust_domains, ..Traits::default() }
    }

    fn blocks(texts: &[&str]) -> Traits {
        let address_blocks = texts.iter().map(|text| text.parse().unwrap()).collect();
        Traits { address_blocks, ..Traits::default() }
    }

    fn decided(mode: Mode, policies: &[Policy], source: Option<&str>) -> Decision {
        let source = source.map(id);
        let request = Request {
            source: source.as_ref(),
            source_address: "10.1.0.11".parse().unwrap(),
            port: 8080,
            content: Content::Bytes,
        };
        decide(mode, policies, &request)
    }

    #[track_caller]
    fn check(mode: Mode, policies: &[Policy], source: Option<&str>, expected: Result<(), Reason>) {
        let Decision { verdict, would_refuse } = decided(mode, policies, source);
        let got = match &verdict {
            Verdict::AllowedByDefault | Verdict::Allowed(_) | Verdict::ByRequest => Ok(()),
            Verdict::Refused { reason, .. } => Err(*reason),
        };
        assert_eq!((got, would_refuse), (expected, None), "{verdict:?}");
    }

    const WEB: Option<&str> = Some("spiffe://td/ns/shop/sa/web");

    #[test]
    fn the_order_of_words() {
        use Mode::{Permissive, Strict};
        let from_web = from(identities(&["spiffe://td/ns/shop/sa/web"]));
        check(Permissive, &[], None, Ok(()));
        check(Strict, &[], None, Err(Reason::PlaintextToStrict));
        check(Strict, &[], WEB, Ok(()));
        let allow = |rules| [policy(Action::Allow, rules)];
        check(Strict, &allow(vec![Rule::default()]), None, Err(Reason::PlaintextToStrict));
        check(Permissive, &allow(vec![]), WEB, Err(Reason::PolicyNotAllowed));
        check(Permissive, &allow(vec![from_web.clone()]), WEB, Ok(()));
        check(Permissive, &allow(vec![from_web.clone()]), None, Err(Reason::PolicyNotAllowed));
        check(Permissive, &[policy(Action::Deny, vec![])], WEB, Ok(()));
        let both = [policy(Action::Allow, vec![Rule::default()]), policy(Action::Deny, vec![from_web])];
        check(Permissive, &both, WEB, Err(Reason::PolicyDeny));
        check(Permissive, &both, None, Ok(()));
    }

    /// Whether the rule matches `shop/web` from 10.1.0.11 to 8080, and a source there that has proved nothing, in an
    /// allow policy and in a deny policy.
    #[track_caller]
    fn check_rule(rule: Rule, web: bool, nobody_allowed: bool, nobody_denied: bool) {
        let allows = |source| decided(Mode::Permissive, &[policy(Action::Allow, vec![rule.clone()])], source);
        let denies = |source| decided(Mode::Permissive, &[policy(Action::Deny, vec![rule.clone()])], source);
        assert_eq!(allows(WEB).verdict.allows(), web, "allow: {rule:?}");
        assert_eq!(denies(WEB).verdict.allows(), !web, "deny: {rule:?}");
        assert_eq!(allows(None).verdict.allows(), nobody_allowed, "allow nobody: {rule:?}");
        assert_eq!(denies(None).verdict.allows(), !nobody_denied, "deny nobody: {rule:?}");
    }

    #[test]
    fn each_kind_of_source_and_its_negation() {
        let of_shop = "spiffe://td/ns/shop/*";
        for (matching, other) in [
            (
                identities(&["spiffe://td/ns/a/sa/b", "spiffe://td/ns/shop/sa/web"]),
                identities(&["spiffe://td/ns/shop/sa/db"]),
            ),
            (identities(&[of_shop]), identities(&["spiffe://td/ns/other/*"])),
            (namespaces(&["other", "shop"]), namespaces(&["other"])),
            (trust_domains(&["td"]), trust_domains(&["elsewhere"])),
        ] {
            check_rule(from(matching.clone()), true, false, false);
            check_rule(from(other.clone()), false, false, false);
            check_rule(not_from(matching), false, false, true);
            check_rule(not_from(other), true, false, true);
        }
        // An address is known of everybody.
        check_rule(from(blocks(&["10.1.0.0/16"])), true, true, true);
        check_rule(from(blocks(&["10.2.0.0/16", "fd00::/8"])), false, false, false);
        check_rule(not_from(blocks(&["10.1.0.0/16"])), false, false, false);
        check_rule(not_from(blocks(&["10.2.0.0/16"])), true, true, true);
        for (rule, matches) in [
            (to(&["8080"], &[]), true),
            (to(&["9090", "8000-8999"], &[]), true),
            (to(&["9090"], &[]), false),
            (to(&[], &["8080"]), false),
            (to(&[], &["9090"]), true),
            (to(&["8000-8999"], &["8080"]), false),
        ] {
            check_rule(rule, matches, matches, matches);
        }
    }

    #[test]
    fn every_list_that_is_given_must_match() {
        let both = Traits { namespaces: vec!["shop".into()], ..blocks(&["10.2.0.0/16"]) };
        check_rule(from(both), false, false, false);
        let shop_without_web =
            Source { any_of: namespaces(&["shop"]), none_of: identities(&["spiffe://td/ns/shop/sa/web"]) };
        check_rule(Rule { from: vec![shop_without_web.clone()], to: vec![] }, false, false, false);
        let or_web = vec![
            shop_without_web,
            Source { any_of: identities(&["spiffe://td/ns/shop/sa/web"]), ..Source::default() },
        ];
        check_rule(Rule { from: or_web, to: vec![] }, true, false, false);
    }

    /// A rule on GET requests to 8080.
    fn gets() -> Rule {
        let any_of = crate::model::Asks { methods: vec!["GET".into()], ..Default::default() };
        let ports = vec!["8080".parse().unwrap()];
        Rule { from: vec![], to: vec![Target { ports, any_of, ..Target::default() }] }
    }

    #[test]
    fn requests_are_decided_one_by_one_and_what_is_none_by_no_rule_on_requests() {
        let (headers, uri) = (http::HeaderMap::new(), http::Uri::from_static("/"));
        let decided = |policies: &[Policy], port, method: Option<&http::Method>| {
            let of = |method| crate::http::matches::Asked { method, uri: &uri, headers: &headers };
            let reading = method.map(|method| Reading::of(&of(method)));
            let content = reading.as_ref().map_or(Content::Requests, Content::Request);
            let source_address = "10.1.0.11".parse().unwrap();
            let request = |content| Request { source: None, source_address, port, content };
            let decide = |content| decide(Mode::Permissive, policies, &request(content)).verdict;
            (decide(content), decide(Content::Bytes))
        };
        let rule = || RuleRef { policy: Name::new("shop", "p"), rule: 0 };
        let not_allowed = || Verdict::Refused { reason: Reason::PolicyNotAllowed, rule: None };
        let denied = || Verdict::Refused { reason: Reason::PolicyDeny, rule: Some(rule()) };
        let (get, put) = (Some(&http::Method::GET), Some(&http::Method::PUT));
        let allow = [policy(Action::Allow, vec![gets()])];
        assert_eq!(decided(&allow, 8080, None), (Verdict::ByRequest, not_allowed()));
        assert_eq!(decided(&allow, 8080, get).0, Verdict::Allowed(rule()));
        assert_eq!(decided(&allow, 8080, put).0, not_allowed());
        assert_eq!(decided(&allow, 9090, None).0, not_allowed());
        let deny = [policy(Action::Deny, vec![gets()])];
        assert_eq!(decided(&deny, 8080, None), (Verdict::AllowedByDefault, denied()));
        assert_eq!(decided(&deny, 8080, get).0, denied());
        assert_eq!(decided(&deny, 8080, put).0, Verdict::AllowedByDefault);
        assert_eq!(decided(&deny, 9090, None), (Verdict::AllowedByDefault, Verdict::AllowedByDefault));
        let audit = Policy { enforcement: Enforcement::Audit, ..deny[0].clone() };
        assert_eq!(reads(&deny, 8080), Reads::Enforce);
        assert_eq!(reads(&deny, 9090), Reads::No);
        assert_eq!(reads([&audit], 8080), Reads::Audit);
        assert_eq!(reads([&audit, &deny[0]], 8080), Reads::Enforce);
    }

    #[track_caller]
    fn check_audit(
        policies: &[(Action, Enforcement, bool)],
        allowed: bool,
        expected: Option<(&str, Option<usize>)>,
    ) {
        let policies: Vec<Policy> = policies
            .iter()
            .zip('a'..)
            .map(|((action, enforcement, matches), name)| Policy {
                name: Name::new("shop", name),
                enforcement: *enforcement,
                ..policy(*action, if *matches { vec![Rule::default()] } else { vec![to(&["1"], &[])] })
            })
            .collect();
        let Decision { verdict, would_refuse } = decided(Mode::Permissive, &policies, WEB);
        assert_eq!(verdict.allows(), allowed, "{policies:?}");
        let got = would_refuse.as_ref().map(|it| (it.policy.name.as_str(), it.rule));
        assert_eq!(got, expected, "{policies:?}");
    }

    #[test]
    fn what_audited_policies_would_refuse_is_told_with_its_policy() {
        use Action::{Allow, Deny};
        use Enforcement::{Audit, Enforce};
        check_audit(&[(Deny, Audit, true)], true, Some(("a", Some(0))));
        check_audit(&[(Deny, Audit, false)], true, None);
        check_audit(&[(Allow, Audit, false), (Allow, Audit, false)], true, Some(("a", None)));
        check_audit(&[(Allow, Audit, false), (Allow, Audit, true)], true, None);
        check_audit(&[(Allow, Enforce, true), (Allow, Audit, false)], true, None);
        check_audit(&[(Allow, Enforce, true), (Deny, Audit, true)], true, Some(("b", Some(0))));
        // What is refused anyway is no news, and an audited allow policy does not help.
        check_audit(&[(Deny, Enforce, true), (Deny, Audit, true)], false, None);
        check_audit(&[(Allow, Enforce, false), (Allow, Audit, true)], false, None);
    }
}
