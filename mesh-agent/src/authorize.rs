//! May they: the destination's decision, when a connection is opened, for each request of one whose requests are read,
//! and again whenever the view changes.

use std::{
    net::IpAddr,
    sync::Arc,
    time::{SystemTime, UNIX_EPOCH},
};

use mesh_core::{
    authentication::{self, Authenticated},
    http::matches::Asked,
    identity::SpiffeId,
    intake,
    model::{Name, Workload},
    policy::{self, Content, Decision, Reads, Request, RuleRef, Verdict, WouldRefuse, decide},
    refusal::Reason,
    view::Snapshot,
};

use crate::refusal::Refusal;

/// Decides a connection to a workload of this node.
pub(crate) fn inbound(
    view: &Snapshot,
    destination: &Workload,
    source: Option<&SpiffeId>,
    source_address: IpAddr,
    port: u16,
    content: Content<'_>,
) -> Result<Allowed, Denied> {
    let request = Request { source, source_address, port, content };
    let Decision { verdict, would_refuse } =
        decide(destination.mode, view.policies_of(destination), &request);
    let mut would_refuse = would_refuse;
    if verdict.allows() && matches!(content, Content::Bytes) {
        let policies = view.authentications_of(destination);
        if let Some(policy) = authentication::covers(policies.clone(), port) {
            let detail = format!("AuthenticationPolicy {policy}");
            return Err(Denied { reason: Reason::TokenUnreadable, rule: None, detail });
        }
        would_refuse = authentication::would_refuse(policies, port, None, 0).or(would_refuse);
    }
    if verdict.allows() && matches!(content, Content::Bytes) && limits(view, destination, port) {
        let detail = "a TrafficPolicy limits requests to this port".to_owned();
        return Err(Denied { reason: Reason::RequestsUnreadable, rule: None, detail });
    }
    match verdict {
        Verdict::AllowedByDefault | Verdict::ByRequest => Ok(Allowed { rule: None, would_refuse }),
        Verdict::Allowed(rule) => Ok(Allowed { rule: Some(rule), would_refuse }),
        Verdict::Refused { reason, rule } => Err(Denied { reason, rule, detail: String::new() }),
    }
}

/// Whether requests to a port of a workload of this node have to be read.
pub(crate) fn reads(view: &Snapshot, destination: &Workload, port: u16) -> Reads {
    if limits(view, destination, port) {
        return Reads::Enforce;
    }
    let of_users = authentication::reads(view.authentications_of(destination), port);
    of_users.max(policy::reads(view.policies_of(destination), port))
}

/// Whether requests to a port of a workload of this node are limited, so that what is none cannot be let through.
fn limits(view: &Snapshot, destination: &Workload, port: u16) -> bool {
    intake::is_read(view.port_intake(&destination.name, port))
}

/// Whose request it is that comes to a workload of this node, by the token that it bears; and what audited policies would say.
pub(crate) fn user(
    view: &Snapshot,
    destination: &Workload,
    port: u16,
    asked: &Asked<'_>,
) -> Result<(Authenticated, Option<WouldRefuse>), Refusal> {
    // Before 1970 every token is of the future.
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let now = i64::try_from(now.as_secs()).unwrap_or(i64::MAX);
    let policies = view.authentications_of(destination);
    let authenticated = authentication::authenticate(policies.clone(), port, asked, now)
        .map_err(|it| Refusal::new(it.reason, it.to_string()))?;
    Ok((authenticated, authentication::would_refuse(policies, port, Some(asked), now)))
}

/// A verdict for a connection, or a request.
#[derive(Debug)]
pub(crate) struct Allowed {
    /// The rule that allows it, if one had to.
    pub(crate) rule: Option<RuleRef>,
    /// What audited policies would say.
    pub(crate) would_refuse: Option<WouldRefuse>,
}

/// A verdict against a connection, or a request.
#[derive(Debug)]
pub(crate) struct Denied {
    pub(crate) reason: Reason,
    pub(crate) rule: Option<RuleRef>,
    pub(crate) detail: String,
}

impl From<Denied> for Refusal {
    fn from(denied: Denied) -> Self {
        Self { rule: denied.rule, ..Self::new(denied.reason, denied.detail) }
    }
}

/// The workload that a connection arrived at.
pub(crate) fn destination(view: &Snapshot, name: &Name) -> Result<Arc<Workload>, Refusal> {
    let unknown = || Refusal::new(Reason::DestinationUnknown, format!("the view has no workload {name}"));
    view.workload(name).cloned().ok_or_else(unknown)
}
