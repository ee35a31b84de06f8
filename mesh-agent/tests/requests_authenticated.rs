//! Requests to a workload whose policy asks for end users' tokens: which are refused, what their bearers are told, what the
//! application sees of the others. Needs root, as the data path does.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking, in its helpers too")]

#[path = "data_path/app.rs"]
mod app;
#[path = "data_path/guarded.rs"]
mod guarded;
#[path = "data_path/world.rs"]
#[allow(dead_code, reason = "the tests of bytes use the rest of it")]
mod world;

use std::{
    net::SocketAddr,
    time::{SystemTime, UNIX_EPOCH},
};

use base64::{Engine, prelude::BASE64_URL_SAFE_NO_PAD};
use bytes::Bytes;
use guarded::*;
use http::{Request, StatusCode, Version};
use http_body_util::{BodyExt, Full};
use hyper::client::conn::{http1, http2};
use hyper_util::rt::{TokioExecutor, TokioIo};
use mesh_agent::metrics::AuditLabels;
use mesh_core::model::{
    Action, Asks, Authentication, ClaimHeader, ClaimPattern, Enforcement, KeyMaterial, Policy, Rule,
    Selector, Target, TokenIssuer, TokenPlace, VerifyingKey,
};
use ring::signature::{Ed25519KeyPair, KeyPair};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use world::*;

const ISSUER: &str = "https://id.example";

fn signer(seed: u8) -> Ed25519KeyPair {
    Ed25519KeyPair::from_seed_unchecked(&[seed; 32]).unwrap()
}

fn key(id: &str, seed: u8) -> VerifyingKey {
    let material = KeyMaterial::Ed25519(signer(seed).public_key().as_ref().to_vec());
    VerifyingKey { id: id.into(), algorithm: None, material }
}

fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs()
}

fn signed(header: Value, claims: &Value, seed: u8) -> String {
    let b64 = |bytes: &[u8]| BASE64_URL_SAFE_NO_PAD.encode(bytes);
    let signed = format!("{}.{}", b64(header.to_string().as_bytes()), b64(claims.to_string().as_bytes()));
    format!("{signed}.{}", b64(signer(seed).sign(signed.as_bytes()).as_ref()))
}

fn claims() -> Value {
    json!({"iss": ISSUER, "aud": "shop", "sub": "ann", "groups": ["staff"], "exp": now() + 300})
}

fn with(name: &str, value: Value) -> Value {
    let mut claims = claims();
    claims[name] = value;
    claims
}

fn token(claims: &Value) -> String {
    signed(json!({"alg": "EdDSA", "kid": "a"}), claims, 1)
}

fn bearer(token: &str) -> http::request::Builder {
    Request::get("/").header("authorization", format!("Bearer {token}"))
}

fn users(required: bool) -> Authentication {
    let issuer = TokenIssuer {
        issuer: ISSUER.into(),
        audiences: vec!["shop".into()],
        keys: vec![key("a", 1)],
        places: vec![TokenPlace::Header { name: "authorization".into(), prefix: "Bearer".into() }],
        strip: false,
        headers: vec![],
    };
    Authentication {
        name: name("users"),
        selector: Selector::default(),
        ports: vec![],
        required,
        enforcement: Enforcement::Enforce,
        issuers: vec![issuer],
    }
}

fn staff(action: Action) -> Policy {
    let claims = vec![ClaimPattern { name: "groups".into(), values: vec!["staff".parse().unwrap()] }];
    let any_of = Asks { claims, ..Asks::default() };
    let to = vec![Target { any_of, ..Target::default() }];
    Policy::new(name("staff"), action, vec![Rule { from: vec![], to }])
}

impl Bed {
    /// A client, and `web` under these policies.
    async fn new(authentications: Vec<Authentication>, policies: Vec<Policy>) -> Self {
        Self::of(Plan { authentications, policies, ..Plan::default() }).await
    }
}

impl Client {
    /// What a client is told that is refused.
    async fn challenge(&mut self, request: http::request::Builder) -> String {
        let response = self.send(request).await.unwrap();
        assert_eq!(response.status(), StatusCode::UNAUTHORIZED);
        let challenge = response.headers()["www-authenticate"].to_str().unwrap().to_owned();
        let body = in_time(response.into_body().collect()).await.unwrap().to_bytes();
        assert_eq!(body, "Unauthorized", "and tells nobody why");
        challenge
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn each_bad_token_is_refused_with_its_reason_and_its_bearer_is_not_told() {
    let mut bed = Bed::new(vec![users(true)], vec![]).await;
    let app = bed.app();
    let mut client = bed.client().await;
    assert_eq!(client.ask(bearer(&token(&claims()))).await.0, StatusCode::OK);
    let of = |header: Value| signed(header, &claims(), 1);
    let good = token(&claims());
    let none = {
        let mut parts = good.split('.');
        let header = BASE64_URL_SAFE_NO_PAD.encode(json!({"alg": "none"}).to_string());
        format!("{header}.{}.", parts.nth(1).unwrap())
    };
    let cases = [
        (token(&with("exp", json!(now() - 120))), "token_expired"),
        (token(&with("nbf", json!(now() + 120))), "token_not_yet_valid"),
        (token(&with("aud", json!("bank"))), "token_audience"),
        (token(&with("iss", json!("https://other.example"))), "token_issuer"),
        (signed(json!({"alg": "EdDSA", "kid": "a"}), &claims(), 2), "token_signature"),
        (of(json!({"alg": "EdDSA", "kid": "b"})), "token_key_unknown"),
        (of(json!({"alg": "HS256", "kid": "a"})), "token_algorithm"),
        (of(json!({"alg": "RS256", "kid": "a"})), "token_algorithm"),
        (none, "token_algorithm"),
        ("x".into(), "token_malformed"),
        ("a".repeat(16 * 1024 + 1), "token_malformed"),
    ];
    for (token, _) in &cases {
        assert_eq!(client.challenge(bearer(token)).await, "Bearer error=\"invalid_token\"");
    }
    assert_eq!(client.challenge(Request::get("/missing")).await, "Bearer");
    let twice = bearer(&good).header("authorization", format!("Bearer {good}"));
    assert_eq!(client.challenge(twice).await, "Bearer error=\"invalid_token\"");
    assert_eq!(app.served(), 1, "what is refused does not reach it");

    let line = bed.log(|line| line["reason"] == "token_audience").await;
    assert_eq!((&line["outcome"], &line["status"]), (&json!("refused"), &json!(401)), "{line}");
    let detail = "AuthenticationPolicy shop/users, header authorization";
    assert!(line.to_string().contains(detail), "{line}");
    for reason in cases.iter().map(|(_, reason)| *reason).chain(["token_missing", "token_ambiguous"]) {
        bed.log(|line| line["reason"] == reason).await;
        assert!(bed.answered(401, reason) > 0, "{reason}");
    }
    let signature = good.rsplit('.').next().unwrap();
    for line in bed.world.destination.log().await.iter().chain(&bed.world.source.log().await) {
        assert!(!line.to_string().contains(signature), "no token is logged: {line}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn where_no_token_is_required_a_bad_one_is_refused_still() {
    let mut bed = Bed::new(vec![users(false)], vec![]).await;
    let _app = bed.app();
    let mut client = bed.client().await;
    assert_eq!(client.ask(Request::get("/")).await.0, StatusCode::OK);
    let (status, said) = client.ask(bearer(&token(&claims()))).await;
    assert_eq!(status, StatusCode::OK);
    assert_eq!(header(&said, "authorization").len(), 1, "it is kept");
    client.challenge(bearer("x")).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_token_is_taken_from_where_the_policy_says_and_away_where_it_says_so() {
    let mut policy = users(true);
    let issuer = &mut policy.issuers[0];
    issuer.places.extend([TokenPlace::Query("t".into()), TokenPlace::Cookie("session".into())]);
    issuer.strip = true;
    issuer.headers = vec![ClaimHeader { header: "x-user".into(), claim: "sub".into() }];
    let mut bed = Bed::new(vec![policy], vec![]).await;
    let _app = bed.app();
    let mut client = bed.client().await;
    let good = token(&claims());
    let cookie = format!("a=1; session={good}; b=2");
    for (request, uri, cookies) in [
        (bearer(&good), "/", &[][..]),
        (Request::get(format!("/x?a=1&t={good}&b=2")), "/x?a=1&b=2", &[]),
        (Request::get("/").header("cookie", &cookie), "/", &["a=1; b=2"]),
    ] {
        let forged = request.header("x-user", "root").header("X_User", "root").header("connection", "x-user");
        let (status, said) = client.ask(forged).await;
        assert_eq!((status, &said["uri"]), (StatusCode::OK, &json!(uri)), "{said}");
        assert_eq!(header(&said, "cookie"), cookies);
        assert_eq!(header(&said, "x-user"), ["ann"]);
        assert!(!said.to_string().contains(&good) && header(&said, "x_user").is_empty(), "{said}");
    }
    let two = bearer(&good).header("cookie", cookie);
    client.challenge(two).await;
    bed.log(|line| line["reason"] == "token_ambiguous").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn claims_count_for_rules_once_they_are_verified() {
    let mut bed = Bed::new(vec![users(false)], vec![staff(Action::Allow)]).await;
    let app = bed.app();
    let mut client = bed.client().await;
    assert_eq!(client.ask(bearer(&token(&claims()))).await.0, StatusCode::OK);
    let other = token(&with("groups", json!(["guests"])));
    assert_eq!(client.ask(bearer(&other)).await.0, StatusCode::FORBIDDEN);
    assert_eq!(client.ask(Request::get("/")).await.0, StatusCode::FORBIDDEN);
    let line = bed.log(|line| line["status"] == 200).await;
    assert_eq!(line["rule"], "shop/staff[0]", "{line}");

    // A deny rule matches whoever has not proved that it does not.
    bed.plan.policies = vec![staff(Action::Deny)];
    bed.world.publish(&bed.plan, "2");
    eventually(async || {
        let (status, _) = bed.client().await.ask(bearer(&other)).await;
        (status == StatusCode::OK).then_some(())
    })
    .await;
    assert_eq!(client.ask(bearer(&other)).await.0, StatusCode::OK);
    assert_eq!(client.ask(bearer(&token(&claims()))).await.0, StatusCode::FORBIDDEN);
    assert_eq!(client.ask(Request::get("/")).await.0, StatusCode::FORBIDDEN);

    // Nor are claims known where nobody verifies them.
    bed.plan.authentications.clear();
    bed.plan.policies = vec![staff(Action::Allow)];
    bed.world.publish(&bed.plan, "3");
    let before = app.served();
    eventually(async || {
        let (status, _) = bed.client().await.ask(bearer(&token(&claims()))).await;
        (status == StatusCode::FORBIDDEN).then_some(())
    })
    .await;
    assert!(app.served() >= before);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_call_without_a_token_is_unauthenticated() {
    let mut bed = Bed::new(vec![users(true)], vec![]).await;
    let app = bed.app();
    let (mut sender, connection) =
        http2::handshake(TokioExecutor::new(), TokioIo::new(connect(bed.at).await)).await.unwrap();
    tokio::spawn(connection);
    let mut call = async |token: Option<&str>| {
        let mut request = Request::post("http://web/trailers/say")
            .version(Version::HTTP_2)
            .header("content-type", "application/grpc");
        if let Some(token) = token {
            request = request.header("authorization", format!("Bearer {token}"));
        }
        in_time(sender.send_request(request.body(Full::new(Bytes::new())).unwrap())).await.unwrap()
    };
    for token in [None, Some("x")] {
        let response = call(token).await;
        assert_eq!(response.status(), StatusCode::OK);
        assert_eq!(response.headers()["grpc-status"], "16");
        assert!(!response.headers().contains_key("grpc-message"), "and tells nobody why");
    }
    assert_eq!(app.served(), 0);
    let whole = in_time(call(Some(&token(&claims()))).await.into_body().collect()).await.unwrap();
    assert_eq!(whole.trailers().unwrap()["grpc-status"], "7", "the application's own");
    let line = bed.log(|line| line["reason"] == "token_missing").await;
    assert_eq!(line["grpc_status"], 16, "{line}");
}

#[tokio::test(flavor = "multi_thread")]
async fn new_keys_count_from_the_next_request_on() {
    let mut bed = Bed::new(vec![users(true)], vec![]).await;
    let _app = bed.app();
    let mut client = bed.client().await;
    let by = |kid: &str, seed| bearer(&signed(json!({"alg": "EdDSA", "kid": kid}), &claims(), seed));
    assert_eq!(client.ask(by("a", 1)).await.0, StatusCode::OK);
    client.challenge(by("b", 2)).await;
    let mut publish = |keys: Vec<VerifyingKey>, version: &str| {
        bed.plan.authentications[0].issuers[0].keys = keys;
        bed.world.publish(&bed.plan, version);
    };
    publish(vec![key("a", 1), key("b", 2)], "2");
    eventually(async || (client_status(bed.at, by("b", 2)).await == 200).then_some(())).await;
    assert_eq!(client.ask(by("a", 1)).await.0, StatusCode::OK);
    assert_eq!(client.ask(by("b", 2)).await.0, StatusCode::OK, "on the connection that was open");
    publish(vec![key("b", 2)], "3");
    eventually(async || (client_status(bed.at, by("a", 1)).await == 401).then_some(())).await;
    client.challenge(by("a", 1)).await;
    assert_eq!(client.ask(by("b", 2)).await.0, StatusCode::OK);

    // Without any key nobody can be verified, and nobody is let through.
    publish(vec![], "4");
    eventually(async || (client_status(bed.at, by("b", 2)).await == 401).then_some(())).await;
    bed.log(|line| line["reason"] == "token_key_unknown").await;
}

async fn client_status(at: SocketAddr, request: http::request::Builder) -> u16 {
    Client::on(connect(at).await).await.send(request).await.unwrap().status().as_u16()
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_read_is_refused_and_so_is_what_began_before() {
    for required in [true, false] {
        for (bytes, reason) in
            [(&b"EHLO mail\r\n\r\n"[..], "bad_request"), (b"\x16\x03\x01\x00\x05hello", "token_unreadable")]
        {
            let mut bed = Bed::new(vec![users(required)], vec![]).await;
            let app = bed.app();
            let mut client = connect(bed.at).await;
            client.write_all(bytes).await.unwrap();
            let mut answer = vec![];
            let ended = in_time(client.read_to_end(&mut answer)).await;
            assert!(ended.is_err() || answer.starts_with(b"HTTP/1.1 400"), "{reason}: {answer:?}");
            let line = bed.log(|line| line["kind"].is_null()).await;
            assert_eq!((&line["outcome"], &line["reason"]), (&json!("refused"), &json!(reason)), "{line}");
            assert_eq!(app.served(), 0);
        }
    }
    let mut bed = Bed::new(vec![], vec![]).await;
    let listener = bed.listener.take().unwrap();
    let mut client = connect(bed.at).await;
    client.write_all(b"bytes").await.unwrap();
    let (mut app, _) = accept(&listener).await;
    in_time(app.read_exact(&mut [0; 5])).await.unwrap();
    bed.plan.authentications = vec![users(false)];
    bed.world.publish(&bed.plan, "2");
    is_reset(&client).await;
    let line = bed.log(|line| line["kind"].is_null()).await;
    assert_eq!(line["reason"], "token_unreadable", "{line}");
}

#[tokio::test(flavor = "multi_thread")]
async fn plaintext_bears_tokens_too_and_other_ports_are_left_alone() {
    let mut bed = Bed::new(vec![users(true)], vec![]).await;
    let _app = bed.app();
    let stream = connect_from(STRANGER, bed.web).await.unwrap();
    let (sender, connection) = http1::handshake(TokioIo::new(stream)).await.unwrap();
    tokio::spawn(connection);
    let mut client = Client(sender);
    client.challenge(Request::get("/")).await;
    assert_eq!(client.ask(bearer(&token(&claims()))).await.0, StatusCode::OK);

    let elsewhere = Authentication { ports: vec!["1".parse().unwrap()], ..users(true) };
    let mut bed = Bed::new(vec![elsewhere], vec![]).await;
    let server = echo(bed.listener.take().unwrap());
    assert_eq!(ask(bed.at, b"bytes").await.unwrap(), b"bytes");
    server.abort();
}

#[tokio::test(flavor = "multi_thread")]
async fn an_audited_policy_tells_what_it_would_refuse_and_changes_nothing() {
    let mut audited = Authentication { enforcement: Enforcement::Audit, ..users(true) };
    audited.issuers[0].strip = true;
    audited.issuers[0].headers = vec![ClaimHeader { header: "x-user".into(), claim: "sub".into() }];
    let mut bed = Bed::new(vec![audited], vec![]).await;
    let metrics = bed.world.destination.metrics.clone();
    let told = |reason| {
        let (policy, workload) = (name("users").to_string(), "shop/web".to_owned());
        metrics.audit_refusals(&AuditLabels { policy, workload, reason })
    };
    let app = bed.app();
    let mut client = bed.client().await;
    let expired = token(&with("exp", json!(now() - 300)));
    for (request, reason) in [
        (Request::get("/none"), Some("token_missing")),
        (bearer(&expired), Some("token_expired")),
        (bearer(&token(&claims())), None),
    ] {
        let (status, said) = client.ask(request.header("x-user", "me")).await;
        assert_eq!(status, StatusCode::OK, "{reason:?}");
        let headers: Vec<(String, String)> = serde_json::from_value(said["headers"].clone()).unwrap();
        let seen = |name: &str| headers.iter().find(|it| it.0 == name).map(|it| it.1.as_str());
        assert_eq!(seen("x-user"), Some("me"), "what it would set or take away stays: {reason:?}");
        assert_eq!(seen("authorization").is_some(), reason != Some("token_missing"));
        if let Some(reason) = reason {
            assert_eq!(told(reason), 1, "{reason}");
        }
    }
    assert_eq!(app.served(), 3);
    let line = bed.log(|line| line["path"] == "/none").await;
    assert_eq!(
        (&line["outcome"], &line["would_refuse"]["reason"]),
        (&json!("ok"), &json!("token_missing")),
        "{line}"
    );

    // One that is enforced beside it decides alone, and what would be ambiguous with both is not.
    let mut elsewhere = Authentication { enforcement: Enforcement::Audit, ..users(true) };
    elsewhere.name = name("elsewhere");
    elsewhere.issuers[0].places = vec![TokenPlace::Query("token".into())];
    bed.plan.authentications = vec![users(true), elsewhere];
    bed.world.publish(&bed.plan, "2");
    let good = token(&claims());
    client.challenge(Request::get("/")).await;
    let twice = Request::get(format!("/?token={good}")).header("authorization", format!("Bearer {good}"));
    assert_eq!(client.ask(twice).await.0, StatusCode::OK);
    let labels = AuditLabels {
        policy: name("elsewhere").to_string(),
        workload: "shop/web".to_owned(),
        reason: "token_ambiguous",
    };
    assert_eq!(metrics.audit_refusals(&labels), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_no_request_goes_on_under_an_audited_policy_and_is_told() {
    let audited = Authentication { enforcement: Enforcement::Audit, ..users(true) };
    let mut bed = Bed::new(vec![audited], vec![]).await;
    let server = echo(bed.listener.take().unwrap());
    assert_eq!(ask(bed.at, b"bytes").await.unwrap(), b"bytes");
    let line = bed.log(|line| line["kind"].is_null()).await;
    assert_eq!(
        (&line["outcome"], &line["would_refuse"]["reason"]),
        (&json!("ok"), &json!("token_unreadable")),
        "{line}"
    );
    server.abort();
}
