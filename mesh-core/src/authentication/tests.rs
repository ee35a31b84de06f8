//! Requests with tokens that are good, bad and forged. Those of `vectors` were signed by another implementation.

use base64::{Engine, prelude::BASE64_URL_SAFE_NO_PAD};
use http::Method;
use ring::{
    hmac,
    signature::{Ed25519KeyPair, KeyPair},
};
use serde_json::json;

use super::*;
use crate::model::{Algorithm, ClaimHeader, Enforcement, KeyMaterial, Selector, VerifyingKey};

const NOW: i64 = 1_800_000_000;
const ISSUER: &str = "https://id.example";

fn b64(bytes: impl AsRef<[u8]>) -> String {
    BASE64_URL_SAFE_NO_PAD.encode(bytes)
}

fn signer(seed: u8) -> Ed25519KeyPair {
    Ed25519KeyPair::from_seed_unchecked(&[seed; 32]).unwrap()
}

fn key(id: &str, seed: u8) -> VerifyingKey {
    let material = KeyMaterial::Ed25519(signer(seed).public_key().as_ref().to_vec());
    VerifyingKey { id: id.into(), algorithm: None, material }
}

fn signed(header: &Value, claims: &Value, seed: u8) -> String {
    let signed = format!("{}.{}", b64(header.to_string()), b64(claims.to_string()));
    format!("{signed}.{}", b64(signer(seed).sign(signed.as_bytes())))
}

fn claims() -> Value {
    json!({"iss": ISSUER, "aud": "shop", "sub": "ann", "exp": NOW + 300})
}

fn with(changes: Value) -> Value {
    let mut claims = claims();
    for (name, value) in changes.as_object().unwrap() {
        claims[name] = value.clone();
    }
    claims
}

/// Signed as it should be.
fn token(claims: &Value) -> String {
    signed(&json!({"alg": "EdDSA", "kid": "a"}), claims, 1)
}

fn bearer() -> TokenPlace {
    TokenPlace::Header { name: "authorization".into(), prefix: "Bearer".into() }
}

fn policy(required: bool) -> Authentication {
    let issuer = TokenIssuer {
        issuer: ISSUER.into(),
        audiences: vec!["shop".into(), "cart".into()],
        keys: vec![key("a", 1)],
        places: vec![bearer()],
        strip: false,
        headers: vec![],
    };
    Authentication {
        name: Name::new("shop", "users"),
        selector: Selector::default(),
        ports: vec![],
        required,
        enforcement: Enforcement::Enforce,
        issuers: vec![issuer],
    }
}

fn decided(
    policies: &[Authentication],
    uri: &str,
    headers: &[(&str, &str)],
) -> Result<Authenticated, Reason> {
    let (method, uri) = (Method::GET, uri.parse().unwrap());
    let named = |name: &str| HeaderName::try_from(name).unwrap();
    let headers = headers.iter().map(|(name, value)| (named(name), value.parse().unwrap())).collect();
    let asked = Asked { method: &method, uri: &uri, headers: &headers };
    authenticate(policies, 8080, &asked, NOW).map_err(|no| no.reason)
}

fn bearing(policies: &[Authentication], token: &str) -> Result<Option<Claims>, Reason> {
    let value = format!("Bearer {token}");
    decided(policies, "/", &[("authorization", &value)]).map(|it| it.claims)
}

#[test]
fn tokens_of_another_implementation_are_verified_by_every_algorithm() {
    let keys = jwks::parse(include_bytes!("vectors/jwks.json")).unwrap();
    let mut policy = policy(true);
    policy.issuers[0].keys = keys;
    let tokens: Vec<&str> = include_str!("vectors/tokens.txt").lines().collect();
    assert_eq!(tokens.len(), Algorithm::ALL.len());
    for token in tokens {
        let claims = bearing(std::slice::from_ref(&policy), token).unwrap().unwrap();
        assert_eq!(claims.get("sub"), Some(&json!("ann")));
        let (rest, signature) = token.rsplit_once('.').unwrap();
        let mut changed = BASE64_URL_SAFE_NO_PAD.decode(signature).unwrap();
        changed[20] ^= 1;
        let changed = format!("{rest}.{}", b64(changed));
        assert_eq!(bearing(std::slice::from_ref(&policy), &changed), Err(Reason::TokenSignature));
    }
}

#[test]
fn each_thing_that_is_wrong_with_a_token_has_its_reason() {
    let policies = [policy(false)];
    let check = |token: &str, expected| assert_eq!(bearing(&policies, token).err(), expected, "{token}");
    let of = |header: Value| signed(&header, &claims(), 1);
    check(&token(&claims()), None);
    check(&token(&with(json!({"aud": ["other", "cart"]}))), None);
    check(&token(&with(json!({"nbf": NOW + LEEWAY, "exp": NOW - LEEWAY + 1}))), None);
    check(&token(&with(json!({"exp": NOW as f64 + 0.5}))), None);
    // A name that no key has may be that of one without.
    check(&of(json!({"alg": "EdDSA"})), None);

    check(&token(&with(json!({"exp": NOW - LEEWAY}))), Some(Reason::TokenExpired));
    check(&token(&with(json!({"nbf": NOW + LEEWAY + 1}))), Some(Reason::TokenNotYetValid));
    check(&token(&with(json!({"exp": null}))), Some(Reason::TokenMalformed));
    check(&token(&with(json!({"exp": (NOW + 9).to_string()}))), Some(Reason::TokenMalformed));
    check(&token(&with(json!({"nbf": "0"}))), Some(Reason::TokenMalformed));
    check(&token(&json!({"iss": ISSUER, "aud": "shop"})), Some(Reason::TokenMalformed));
    for audience in [json!("shopping"), json!([]), json!(null), json!({"shop": 1}), json!(["Shop"])] {
        check(&token(&with(json!({"aud": audience}))), Some(Reason::TokenAudience));
    }
    for issuer in [json!("https://id.example/"), json!("HTTPS://id.example"), json!([ISSUER]), json!(null)] {
        check(&token(&with(json!({"iss": issuer}))), Some(Reason::TokenIssuer));
    }
    check(&signed(&json!({"alg": "EdDSA", "kid": "a"}), &claims(), 2), Some(Reason::TokenSignature));
    check(&of(json!({"alg": "EdDSA", "kid": "b"})), Some(Reason::TokenKeyUnknown));
    for algorithm in ["none", "None", "", "HS256", "RS256", "ES256", "ES512", "eddsa"] {
        check(&of(json!({"alg": algorithm, "kid": "a"})), Some(Reason::TokenAlgorithm));
    }
    check(&of(json!({"alg": "EdDSA", "kid": "a", "crit": ["exp"]})), Some(Reason::TokenMalformed));
    check(&of(json!({"kid": "a"})), Some(Reason::TokenMalformed));
    check(&of(json!({"alg": "EdDSA", "kid": 1})), Some(Reason::TokenMalformed));
    let good = token(&claims());
    let [header, body, _] = good.split('.').collect::<Vec<_>>()[..] else { panic!() };
    for broken in [
        format!("{header}.{body}"),
        format!("{good}."),
        format!("{good}.{body}"),
        format!("{good}="),
        format!(" {}", &good[1..]),
        format!("{header}..{body}"),
        "a".to_owned(),
        format!("{}.{body}.{}", b64("[]"), b64("x")),
        format!("{header}.{body}.{}", "a".repeat(MAX_TOKEN)),
    ] {
        assert!(bearing(&policies, &broken).is_err(), "{broken}");
    }
    check(&format!("{header}.{body}."), Some(Reason::TokenSignature));
    check(&format!("{}.{body}.", b64(json!({"alg": "none"}).to_string())), Some(Reason::TokenAlgorithm));
}

#[test]
fn a_public_key_is_no_secret_that_a_token_is_signed_with() {
    let policies = [policy(true)];
    let public = signer(1).public_key().as_ref().to_vec();
    let body =
        format!("{}.{}", b64(json!({"alg": "HS256", "kid": "a"}).to_string()), b64(claims().to_string()));
    let forged = hmac::sign(&hmac::Key::new(hmac::HMAC_SHA256, &public), body.as_bytes());
    let forged = format!("{body}.{}", b64(forged.as_ref()));
    assert_eq!(bearing(&policies, &forged), Err(Reason::TokenAlgorithm));
}

#[test]
fn without_a_token_it_depends_on_the_policy_and_with_a_bad_one_it_does_not() {
    for (required, expected) in [(true, Err(Reason::TokenMissing)), (false, Ok(None))] {
        let policies = [policy(required)];
        assert_eq!(decided(&policies, "/", &[]).map(|it| it.claims), expected);
        assert_eq!(decided(&policies, "/", &[("authorization", "Basic x")]).map(|it| it.claims), expected);
        assert_eq!(bearing(&policies, "x"), Err(Reason::TokenMalformed));
    }
    let of_port = Authentication { ports: vec!["80".parse().unwrap()], ..policy(true) };
    assert_eq!(decided(std::slice::from_ref(&of_port), "/", &[]), Ok(Authenticated::default()));
    assert_eq!(covers([&of_port], 8080), None);
    assert_eq!(covers([&of_port], 80), Some(&of_port.name));
}

#[test]
fn one_token_is_looked_for_in_every_place_and_two_are_refused() {
    let mut policy = policy(true);
    policy.issuers[0].places.extend([TokenPlace::Query("t".into()), TokenPlace::Cookie("t".into())]);
    let policies = [policy];
    let good = token(&claims());
    let (uri, header, cookie) = (format!("/?t={good}"), format!("Bearer {good}"), format!("t={good}"));
    let (header, cookie) = (("authorization", header.as_str()), ("cookie", cookie.as_str()));
    for (uri, headers) in [(uri.as_str(), &[][..]), ("/", &[header]), ("/", &[cookie])] {
        assert!(decided(&policies, uri, headers).is_ok());
    }
    for (uri, headers) in [
        (uri.as_str(), &[header][..]),
        (&uri, &[cookie]),
        ("/", &[header, cookie]),
        ("/", &[header, header]),
        ("/", &[cookie, cookie]),
    ] {
        assert_eq!(decided(&policies, uri, headers).err(), Some(Reason::TokenAmbiguous));
    }
}

#[test]
fn a_token_counts_only_where_its_issuer_puts_it() {
    let mut policy = policy(true);
    let other = TokenIssuer {
        issuer: "https://other.example".into(),
        keys: vec![key("a", 2)],
        places: vec![TokenPlace::Cookie("t".into())],
        ..policy.issuers[0].clone()
    };
    policy.issuers.push(other);
    let policies = [policy];
    let of_other =
        |seed| signed(&json!({"alg": "EdDSA"}), &with(json!({"iss": "https://other.example"})), seed);
    assert_eq!(bearing(&policies, &of_other(2)), Err(Reason::TokenIssuer));
    let cookie = |token: String| decided(&policies, "/", &[("cookie", &format!("t={token}"))]).map(drop);
    assert_eq!(cookie(of_other(2)), Ok(()));
    assert_eq!(cookie(of_other(1)), Err(Reason::TokenSignature), "keys are their issuer's alone");
    assert_eq!(cookie(token(&claims())), Err(Reason::TokenIssuer));
}

#[test]
fn every_policy_has_to_be_content() {
    let mut other = policy(false);
    other.name = Name::new("shop", "more");
    other.issuers[0].audiences = vec!["cart".into()];
    let policies = [other, policy(true)];
    assert_eq!(bearing(&policies, &token(&claims())), Err(Reason::TokenAudience));
    let both = token(&with(json!({"aud": ["shop", "cart"]})));
    assert!(bearing(&policies, &both).unwrap().is_some());
    assert_eq!(decided(&policies, "/", &[]), Err(Reason::TokenMissing));
}

#[test]
fn the_application_sees_what_the_policy_wants() {
    let mut policy = policy(false);
    let header = |header: &str, claim: &str| ClaimHeader { header: header.into(), claim: claim.into() };
    policy.issuers[0].strip = true;
    policy.issuers[0].headers = vec![
        header("x-user", "sub"),
        header("x-roles", "/realm/roles"),
        header("x-none", "none"),
        header("x-bad", "bad"),
    ];
    let policies = [policy];
    let applied = |token: Option<&str>| {
        let forged = [("x-user", "root"), ("X_User", "root"), ("x-none", "1"), ("x-else", "1")];
        let mut all: Vec<(&str, &str)> = forged.to_vec();
        let value = token.map(|token| format!("Bearer {token}"));
        all.extend(value.iter().map(|value| ("authorization", value.as_str())));
        let authenticated = decided(&policies, "/", &all).unwrap();
        let named = |name: &str| HeaderName::try_from(name).unwrap();
        let mut headers: HeaderMap =
            all.iter().map(|(name, value)| (named(name), value.parse().unwrap())).collect();
        authenticated.apply(&mut "/".parse().unwrap(), &mut headers);
        let mut seen: Vec<String> =
            headers.iter().map(|(name, value)| format!("{name}: {}", value.to_str().unwrap())).collect();
        seen.sort();
        seen.join("\n")
    };
    assert_eq!(applied(None), "x-else: 1");
    let claims = with(json!({"realm": {"roles": ["a", "b"]}, "bad": "a\nx-else: 2"}));
    assert_eq!(applied(Some(&token(&claims))), "x-else: 1\nx-roles: [\"a\",\"b\"]\nx-user: ann");
}

#[test]
fn a_claim_is_compared_by_what_it_is() {
    let claims = json!({
        "sub": "ann", "groups": ["dev", "ops", 7], "scope": "read write", "admin": true, "n": 3, "none": null,
        "words": "read write", "realm_access": {"roles": ["editor"]}, "a/b": "c", "https://x/y": "z",
    });
    let Value::Object(claims) = claims else { panic!() };
    let claims = Claims::new(claims);
    let is = |name: &str, values: &[&str]| {
        let values = values.iter().map(|text| text.parse().unwrap()).collect();
        claims.is(&ClaimPattern { name: name.into(), values })
    };
    for (name, values) in [
        ("sub", &["bob", "ann"][..]),
        ("sub", &["a*"]),
        ("sub", &[]),
        ("groups", &["ops"]),
        ("groups", &["7"]),
        ("scope", &["write"]),
        ("admin", &["true"]),
        ("n", &["3"]),
        ("/realm_access/roles", &["editor"]),
        ("/a~1b", &["c"]),
        ("https://x/y", &["z"]),
        ("realm_access", &[]),
    ] {
        assert!(is(name, values), "{name} {values:?}");
    }
    for (name, values) in [
        ("sub", &["an"][..]),
        ("Sub", &[]),
        ("none", &[]),
        ("gone", &[]),
        ("words", &["read"]),
        ("realm_access", &["*"]),
        ("/realm_access/none", &[]),
        ("/", &[]),
        ("/sub/x", &[]),
    ] {
        assert!(!is(name, values), "{name} {values:?}");
    }
}

fn audited(policy: Authentication, name: &str) -> Authentication {
    Authentication { enforcement: Enforcement::Audit, name: Name::new("shop", name), ..policy }
}

/// The policy that would refuse, and why: with these headers.
fn would(policies: &[Authentication], uri: &str, headers: &[(&str, &str)]) -> Option<(String, Reason)> {
    let (method, uri) = (Method::GET, uri.parse().unwrap());
    let named = |name: &str| HeaderName::try_from(name).unwrap();
    let headers = headers.iter().map(|(name, value)| (named(name), value.parse().unwrap())).collect();
    let asked = Asked { method: &method, uri: &uri, headers: &headers };
    would_refuse(policies, 8080, Some(&asked), NOW).map(|it| (it.policy.name.clone(), it.reason))
}

#[test]
fn an_audited_policy_decides_nothing_and_says_what_it_would_refuse() {
    let trial = [audited(policy(true), "trial")];
    assert_eq!(covers(&trial, 8080), None);
    assert_eq!(reads(&trial, 8080), Reads::Audit);
    assert_eq!(decided(&trial, "/", &[]), Ok(Authenticated::default()));
    assert_eq!(decided(&trial, "/", &[("authorization", "Bearer x")]), Ok(Authenticated::default()));
    let of_trial = |reason| Some(("trial".to_owned(), reason));
    assert_eq!(would(&trial, "/", &[]), of_trial(Reason::TokenMissing));
    assert_eq!(would(&trial, "/", &[("authorization", "Bearer x")]), of_trial(Reason::TokenMalformed));
    let good = format!("Bearer {}", token(&claims()));
    assert_eq!(would(&trial, "/", &[("authorization", &good)]), None);
    let unread = would_refuse(&trial, 8080, None, NOW).unwrap();
    assert_eq!((unread.policy.name.as_str(), unread.reason), ("trial", Reason::TokenUnreadable));
    // Nor at a port that it says nothing of.
    let of_port = Authentication { ports: vec!["80".parse().unwrap()], ..trial[0].clone() };
    assert_eq!(reads([&of_port], 8080), Reads::No);
    assert_eq!(would(&[of_port], "/", &[]), None);
}

#[test]
fn what_an_audited_policy_would_refuse_beside_an_enforced_one_is_its_own() {
    let good = format!("Bearer {}", token(&claims()));
    let headers = [("authorization", good.as_str())];
    let mut other = audited(policy(true), "zz");
    other.issuers[0].issuer = "https://other.example".into();
    let both = [policy(true), other.clone()];
    assert!(decided(&both, "/", &headers).unwrap().claims.is_some());
    assert_eq!(would(&both, "/", &headers), Some(("zz".into(), Reason::TokenIssuer)));
    // It finds a second token where the enforced one does not look, and whoever noticed it is it.
    let mut query = audited(policy(false), "aa");
    query.issuers[0].places = vec![TokenPlace::Query("token".into())];
    let both = [query, policy(true)];
    let uri = format!("/?token={}", token(&claims()));
    assert!(decided(&both, &uri, &headers).unwrap().claims.is_some());
    assert_eq!(would(&both, &uri, &headers), Some(("aa".into(), Reason::TokenAmbiguous)));
    assert_eq!(reads(&both, 8080), Reads::Enforce);
}
