//! Whose a request is, by the very function that the agents run, and told.

use std::time::{SystemTime, UNIX_EPOCH};

use mesh_core::{
    authentication::{self, Claims, authenticate},
    model::Workload,
    policy::{Reads, WouldRefuse},
    refusal::{Reason, Step},
};

use super::{request::Request, why::Story};

/// What policies on end users make of a request.
pub(super) struct OfUser {
    pub(super) reads: Reads,
    /// As its destination sees it then.
    pub(super) request: Option<Request>,
    pub(super) claims: Option<Claims>,
    /// What audited ones would say.
    pub(super) would_refuse: Option<WouldRefuse>,
}

impl Story<'_> {
    /// Verifies the token of the request that is asked about, if there is one.
    /// Nobody looks at those of a connection that may not be.
    pub(super) fn user(
        &mut self,
        destination: &Workload,
        port: u16,
        connects: bool,
    ) -> Result<OfUser, Reason> {
        let policies = self.snapshot.authentications_of(destination);
        let request = self.request.cloned();
        let reads = authentication::reads(policies.clone(), port);
        let covers = authentication::covers(policies.clone(), port);
        if reads == Reads::No || !connects {
            return Ok(OfUser { reads, request, claims: None, would_refuse: None });
        }
        let Some(mut request) = request else {
            let says = match covers {
                Some(first) => format!(
                    "AuthenticationPolicy {first}: requests to this port are read, and their tokens verified"
                ),
                None => "audited AuthenticationPolicies: requests to this port are looked at where they can be read".to_owned(),
            };
            self.step(Step::Identify, says);
            return Ok(OfUser { reads, request, claims: None, would_refuse: None });
        };
        // The time of this machine stands for the node's.
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
        let now = i64::try_from(now).unwrap_or(i64::MAX);
        let would_refuse = authentication::would_refuse(policies.clone(), port, Some(&request.asked()), now);
        let Some(first) = covers else {
            return Ok(OfUser { reads, request: Some(request), claims: None, would_refuse });
        };
        match authenticate(policies, port, &request.asked(), now) {
            Ok(authenticated) => {
                let says = match &authenticated.claims {
                    Some(_) => format!("AuthenticationPolicy {first}: the token is verified"),
                    None => format!("AuthenticationPolicy {first}: there is no token, and none is required"),
                };
                self.step(Step::Identify, says);
                request.apply(&authenticated);
                let claims = authenticated.claims;
                Ok(OfUser { reads, request: Some(request), claims, would_refuse })
            }
            Err(no) => {
                self.step(Step::Identify, format!("{no}: {}", no.reason.says()));
                Err(no.reason)
            }
        }
    }
}
