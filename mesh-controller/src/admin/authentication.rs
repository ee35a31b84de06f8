//! Policies on end users, as they are told: whose tokens they take, and whether there are keys for them.

use std::sync::Arc;

use mesh_core::model::{Authentication, Enforcement, Name, TokenIssuer, Workload};

use super::answer::{AuthenticationRow, IssuerRow};
use crate::model::Model;

/// All policies, by name.
pub(super) fn rows(model: &Model, workloads: &[Arc<Workload>]) -> Vec<AuthenticationRow> {
    let row = |policy: &Arc<Authentication>| AuthenticationRow {
        name: policy.name.to_string(),
        required: policy.required,
        enforcement: match policy.enforcement {
            Enforcement::Enforce => "Enforce".to_owned(),
            Enforcement::Audit => "Audit".to_owned(),
        },
        selector: policy.selector.to_string(),
        ports: policy.ports.iter().map(ToString::to_string).collect(),
        selected: workloads.iter().filter(|it| policy.selects(it)).map(|it| it.name.to_string()).collect(),
        issuers: policy
            .issuers
            .iter()
            .zip(0..)
            .map(|(it, place)| issuer(model, &policy.name, it, place))
            .collect(),
    };
    model.authentications.values().map(row).collect()
}

fn issuer(model: &Model, policy: &Name, issuer: &TokenIssuer, place: usize) -> IssuerRow {
    let elsewhere = model.keys_elsewhere.get(policy).into_iter().flat_map(|it| &it.elsewhere);
    IssuerRow {
        issuer: issuer.issuer.clone(),
        audiences: issuer.audiences.clone(),
        places: issuer.places.iter().map(ToString::to_string).collect(),
        keys: issuer.keys.len(),
        url: elsewhere.into_iter().find(|it| it.0 == place).map(|it| it.1.url.clone()),
    }
}
