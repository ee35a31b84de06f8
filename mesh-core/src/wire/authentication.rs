//! Policies on end users, to the wire and back.
//!
//! They travel as an AuthorizationPolicy with more to it. An agent that knows nothing of end users takes it for one that
//! denies all that comes to its ports: it refuses more, never less, and goes on with everything else of its view. An audited one
//! is in a field of its own, so that agents of before that which know of end users do not enforce it: to them it is an audited denial.

use super::{WireError, error, name_from_proto, proto, range_to_proto, ranges_from_proto};
use crate::{
    authentication::jwks::MAX_KEYS,
    model::{
        self, Algorithm, Authentication, ClaimHeader, Enforcement, KeyMaterial, TokenIssuer, TokenPlace,
        VerifyingKey,
    },
    view::OF_USERS,
};

pub(super) fn to_proto(policy: &Authentication) -> proto::AuthorizationPolicy {
    let ports: Vec<_> = policy.ports.iter().map(range_to_proto).collect();
    let target = (!ports.is_empty()).then(|| proto::Target { ports: ports.clone(), ..Default::default() });
    let (labels, expressions) = super::selector_to_proto(&policy.selector);
    let issuer = |issuer: &TokenIssuer| proto::TokenIssuer {
        issuer: issuer.issuer.clone(),
        audiences: issuer.audiences.clone(),
        keys: issuer.keys.iter().map(key_to_proto).collect(),
        places: issuer.places.iter().map(place_to_proto).collect(),
        strip: issuer.strip,
        headers: issuer
            .headers
            .iter()
            .map(|it| proto::ClaimHeader { header: it.header.clone(), claim: it.claim.clone() })
            .collect(),
    };
    let said = Some(proto::Authentication {
        required: policy.required,
        ports,
        issuers: policy.issuers.iter().map(issuer).collect(),
    });
    let (enforcement, enforced, audited) = match policy.enforcement {
        Enforcement::Enforce => (proto::Enforcement::Enforce, said, None),
        Enforcement::Audit => (proto::Enforcement::Audit, None, said),
    };
    proto::AuthorizationPolicy {
        namespace: policy.name.namespace.clone(),
        name: format!("{OF_USERS}{}", policy.name.name),
        labels,
        expressions,
        action: proto::Action::Deny.into(),
        enforcement: enforcement.into(),
        rules: vec![proto::Rule { from: vec![], to: target.into_iter().collect() }],
        authentication: enforced,
        audited_authentication: audited,
        intake: None,
    }
}

/// Nothing for what is no policy on end users.
pub(super) fn from_proto(
    key: &str,
    policy: &proto::AuthorizationPolicy,
) -> Result<Option<Authentication>, WireError> {
    let (authentication, enforcement) = match (&policy.authentication, &policy.audited_authentication) {
        (None, None) => return Ok(None),
        (Some(enforced), None) => (enforced, Enforcement::Enforce),
        (None, Some(audited)) => (audited, Enforcement::Audit),
        (Some(_), Some(_)) => return Err(error(key, "audited_authentication", "it is enforced too")),
    };
    let name = policy.name.strip_prefix(OF_USERS);
    let name = name.ok_or_else(|| error(key, "name", "it is not of a policy on end users"))?;
    Ok(Some(Authentication {
        name: name_from_proto(key, &policy.namespace, name)?,
        selector: super::selector_from_proto(key, policy)?,
        ports: ranges_from_proto(key, "authentication.ports", &authentication.ports)?,
        required: authentication.required,
        enforcement,
        issuers: authentication
            .issuers
            .iter()
            .map(|it| issuer_from_proto(key, it))
            .collect::<Result<_, _>>()?,
    }))
}

fn issuer_from_proto(key: &str, issuer: &proto::TokenIssuer) -> Result<TokenIssuer, WireError> {
    // Without an issuer or an audience it would take tokens that are for others.
    if issuer.issuer.is_empty() || issuer.audiences.is_empty() {
        return Err(error(key, "authentication.issuers", "an issuer has no name, or no audience"));
    }
    if issuer.keys.len() > MAX_KEYS {
        return Err(error(key, "authentication.issuers.keys", "too many keys"));
    }
    Ok(TokenIssuer {
        issuer: issuer.issuer.clone(),
        audiences: issuer.audiences.clone(),
        keys: issuer.keys.iter().map(|it| key_from_proto(key, it)).collect::<Result<_, _>>()?,
        places: issuer.places.iter().map(|it| place_from_proto(key, it)).collect::<Result<_, _>>()?,
        strip: issuer.strip,
        headers: issuer
            .headers
            .iter()
            .map(|it| ClaimHeader { header: it.header.clone(), claim: it.claim.clone() })
            .collect(),
    })
}

fn key_to_proto(key: &VerifyingKey) -> proto::TokenKey {
    use proto::token_key::Material;
    let material = match &key.material {
        KeyMaterial::Rsa { n, e } => Material::Rsa(proto::RsaKey { n: n.clone(), e: e.clone() }),
        KeyMaterial::P256(point) => Material::P256(point.clone()),
        KeyMaterial::P384(point) => Material::P384(point.clone()),
        KeyMaterial::Ed25519(key) => Material::Ed25519(key.clone()),
    };
    let algorithm = key.algorithm.map(Algorithm::as_str).unwrap_or_default();
    proto::TokenKey { id: key.id.clone(), algorithm: algorithm.into(), material: Some(material) }
}

fn key_from_proto(key: &str, sent: &proto::TokenKey) -> Result<VerifyingKey, WireError> {
    use proto::token_key::Material;
    let field = "authentication.issuers.keys";
    let algorithm = match sent.algorithm.as_str() {
        "" => None,
        name => Some(Algorithm::parse(name).ok_or_else(|| error(key, field, super::UNKNOWN))?),
    };
    let material = match &sent.material {
        None => return Err(error(key, field, super::UNKNOWN)),
        Some(Material::Rsa(proto::RsaKey { n, e })) => KeyMaterial::Rsa { n: n.clone(), e: e.clone() },
        Some(Material::P256(point)) => KeyMaterial::P256(point.clone()),
        Some(Material::P384(point)) => KeyMaterial::P384(point.clone()),
        Some(Material::Ed25519(key)) => KeyMaterial::Ed25519(key.clone()),
    };
    Ok(VerifyingKey { id: sent.id.clone(), algorithm, material })
}

fn place_to_proto(place: &TokenPlace) -> proto::TokenPlace {
    use proto::token_place::Place;
    let (place, prefix) = match place {
        TokenPlace::Header { name, prefix } => (Place::Header(name.clone()), prefix.clone()),
        TokenPlace::Query(name) => (Place::Query(name.clone()), String::new()),
        TokenPlace::Cookie(name) => (Place::Cookie(name.clone()), String::new()),
    };
    proto::TokenPlace { place: Some(place), prefix }
}

fn place_from_proto(key: &str, sent: &proto::TokenPlace) -> Result<TokenPlace, WireError> {
    use proto::token_place::Place;
    match &sent.place {
        None => Err(error(key, "authentication.issuers.places", super::UNKNOWN)),
        Some(Place::Header(name)) => {
            Ok(TokenPlace::Header { name: name.clone(), prefix: sent.prefix.clone() })
        }
        Some(Place::Query(name)) => Ok(TokenPlace::Query(name.clone())),
        Some(Place::Cookie(name)) => Ok(TokenPlace::Cookie(name.clone())),
    }
}

/// A claim that is wanted has the shape of a header that is.
pub(super) fn claim_to_proto(claim: &model::ClaimPattern) -> proto::HeaderPattern {
    let values = claim.values.iter().map(ToString::to_string).collect();
    proto::HeaderPattern { name: claim.name.clone(), values }
}

pub(super) fn claim_from_proto(
    key: &str,
    claim: &proto::HeaderPattern,
) -> Result<model::ClaimPattern, WireError> {
    if claim.name.is_empty() {
        return Err(error(key, "rules.to.claims.name", "it is empty"));
    }
    let values = claim.values.iter().map(|text| text.parse());
    let values = values.collect::<Result<_, model::TextPatternError>>();
    let values = values.map_err(|it| error(key, "rules.to.claims.values", it))?;
    Ok(model::ClaimPattern { name: claim.name.clone(), values })
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::{
        model::{Action, Name, Selector},
        view::{Delta, Key, Resource},
        wire::{delta, update},
    };

    fn a_policy() -> Authentication {
        let key = |id: &str, algorithm, material| VerifyingKey { id: id.into(), algorithm, material };
        let keys = vec![
            key("a", Some(Algorithm::Ps256), KeyMaterial::Rsa { n: vec![1; 256], e: vec![1, 0, 1] }),
            key("", None, KeyMaterial::P256(vec![4; 65])),
            key("b", None, KeyMaterial::P384(vec![4; 97])),
            key("c", Some(Algorithm::EdDsa), KeyMaterial::Ed25519(vec![7; 32])),
        ];
        let places = vec![
            TokenPlace::Header { name: "authorization".into(), prefix: "Bearer".into() },
            TokenPlace::Query("token".into()),
            TokenPlace::Cookie("token".into()),
        ];
        let headers = vec![ClaimHeader { header: "x-user".into(), claim: "sub".into() }];
        let issuers = vec![TokenIssuer {
            issuer: "https://id.example".into(),
            audiences: vec!["shop".into()],
            keys,
            places,
            strip: true,
            headers,
        }];
        Authentication {
            name: Name::new("shop", "users"),
            selector: Selector { labels: [("app".into(), "web".into())].into(), ..Selector::default() },
            ports: vec!["80-90".parse().unwrap()],
            required: false,
            enforcement: Enforcement::Enforce,
            issuers,
        }
    }

    #[test]
    fn who_knows_nothing_of_end_users_denies_all_of_their_ports() {
        let policy = a_policy();
        let resource = Resource::Authentication(Arc::new(policy.clone()));
        let upserts = vec![resource.clone()];
        let removes = vec![resource.key()];
        let sent = update("1".into(), true, &Delta { upserts, removes });
        let Delta { upserts, removes } = delta(&sent).unwrap();
        assert_eq!(
            (upserts, removes),
            (vec![resource.clone()], vec![Key::Authentication(policy.name.clone())])
        );

        let older = proto::AuthorizationPolicy { authentication: None, ..to_proto(&policy) };
        let body = Some(proto::resource::Body::AuthorizationPolicy(older));
        let older = proto::Resource { key: resource.key().to_string(), body };
        let Resource::Policy(older) = super::super::resource_from_proto(&older).unwrap() else { panic!() };
        assert_eq!((older.action, &older.selector), (Action::Deny, &policy.selector));
        assert!(older.rules[0].from.is_empty());
        assert_eq!(
            [79, 80, 90, 91].map(|port| older.rules[0].to[0].has_port(port)),
            [false, true, true, false]
        );
        let every = to_proto(&Authentication { ports: vec![], ..policy });
        assert!(every.rules[0].to.is_empty(), "which is every port");
    }

    #[test]
    fn an_audited_policy_is_nothing_that_an_agent_of_before_would_enforce() {
        let policy = Authentication { enforcement: Enforcement::Audit, ..a_policy() };
        let resource = Resource::Authentication(Arc::new(policy.clone()));
        let sent = super::super::resource_to_proto(&resource);
        assert_eq!(super::super::resource_from_proto(&sent).unwrap(), resource);
        let older = proto::AuthorizationPolicy { audited_authentication: None, ..to_proto(&policy) };
        assert_eq!(older.authentication, None);
        let body = Some(proto::resource::Body::AuthorizationPolicy(older));
        let older = proto::Resource { key: resource.key().to_string(), body };
        let Resource::Policy(older) = super::super::resource_from_proto(&older).unwrap() else { panic!() };
        assert_eq!(older.enforcement, Enforcement::Audit);
    }

    #[test]
    fn what_is_not_understood_of_an_issuer_is_not_guessed_at() {
        let check = |damage: &dyn Fn(&mut proto::TokenIssuer), field: &str| {
            let mut sent = to_proto(&a_policy());
            damage(&mut sent.authentication.as_mut().unwrap().issuers[0]);
            assert_eq!(from_proto("k", &sent).unwrap_err().field, field);
        };
        check(&|issuer| issuer.issuer.clear(), "authentication.issuers");
        check(&|issuer| issuer.audiences.clear(), "authentication.issuers");
        check(&|issuer| issuer.keys[0].material = None, "authentication.issuers.keys");
        check(&|issuer| issuer.keys[0].algorithm = "HS256".into(), "authentication.issuers.keys");
        check(&|issuer| issuer.places[0].place = None, "authentication.issuers.places");
    }
}
