//! What policies say of how requests and connections to a service are sent, through two agents: which endpoint is chosen, what
//! is tried again, how much may be under way, who is left alone, and what goes wrong on purpose. Needs root, as the data path
//! does.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking, in its helpers too")]

#[path = "data_path/app.rs"]
#[allow(dead_code, reason = "the tests of requests use the rest of it")]
mod app;
#[path = "data_path/bed.rs"]
#[allow(dead_code, reason = "the tests of requests use the rest of it")]
mod bed;
#[path = "data_path/world.rs"]
#[allow(dead_code, reason = "the tests of bytes use the rest of it")]
mod world;

use std::{
    collections::BTreeSet,
    time::{Duration, Instant},
};

use bed::*;
use http::{Request, StatusCode};
use http_body_util::BodyExt;
use mesh_agent::metrics::HedgeOutcome;
use mesh_core::{
    balance::Cause,
    model::{
        http::{RouteRule, TextMatch, Timeouts},
        traffic::{
            Algorithm, Balancing, Ejection, FailureShare, Fault, FaultEffect, HashBy, Hedge, Limits, Retries,
            RetryBudget, Traffic,
        },
    },
};
use serde_json::json;
use tokio::io::AsyncReadExt;
use world::*;

/// A service of whose requests this is said, and of which no route speaks.
async fn service(traffic: Traffic) -> Bed {
    let mut bed = Bed::new(vec![]).await;
    bed.plan.routes = vec![];
    says(&mut bed, Traffic { reads_requests: true, ..traffic });
    bed
}

/// From now on this is said of the service.
fn says(bed: &mut Bed, traffic: Traffic) {
    bed.plan.services[0].ports[0].traffic = traffic;
    bed.world.publish(&bed.plan, "next");
}

fn balancing(algorithm: Algorithm) -> Traffic {
    Traffic { balancing: Some(Balancing { algorithm, slow_start: None }), ..Traffic::default() }
}

fn retries() -> Retries {
    Retries {
        attempts: 4,
        codes: vec![503],
        grpc_codes: vec![],
        every_method: false,
        backoff: Duration::from_millis(1),
        budget: RetryBudget::default(),
    }
}

/// Half of the endpoints, for longer than a test takes.
fn ejection(failures: u32) -> Option<Ejection> {
    let (base, most) = (Duration::from_secs(30), Duration::from_secs(60));
    Some(Ejection {
        failures,
        base,
        most,
        most_percent: 50,
        panic_percent: 0,
        share: None,
        retry_after: None,
    })
}

fn ejections(bed: &Bed, cause: Cause) -> u64 {
    bed.world.source.metrics.ejections(&name("service"), cause)
}

#[tokio::test(flavor = "multi_thread")]
async fn requests_go_round_and_those_of_one_value_to_one_endpoint() {
    let mut bed = service(balancing(Algorithm::RoundRobin)).await;
    let mut client = bed.client().await;
    for _ in 0..10 {
        assert_eq!(client.get("/").await.0, StatusCode::OK);
    }
    assert_eq!((bed.web.served(), bed.api.served()), (5, 5));

    says(
        &mut bed,
        Traffic { reads_requests: true, ..balancing(Algorithm::Hash(HashBy::Header("x-user".into()))) },
    );
    let mut all = BTreeSet::new();
    for user in 0..16 {
        let mut own = BTreeSet::new();
        for _ in 0..3 {
            let (_, said) = client.ask(Request::get("/").header("x-user", user)).await;
            own.insert(said["app"].as_str().unwrap().to_owned());
        }
        assert_eq!(own.len(), 1, "user {user}: {own:?}");
        all.extend(own);
    }
    assert_eq!(all.len(), 2, "not all have the same");
}

#[tokio::test(flavor = "multi_thread")]
async fn connections_that_are_not_read_go_round_too() {
    let bed = Bed::new(vec![]).await;
    let mut plan = bed.plan.clone();
    plan.routes = vec![];
    plan.services[0].ports[0].traffic = balancing(Algorithm::RoundRobin);
    bed.world.publish(&plan, "bytes");
    for _ in 0..6 {
        assert_eq!(bed.client().await.get("/").await.0, StatusCode::OK);
    }
    assert_eq!((bed.web.served(), bed.api.served()), (3, 3));
    assert!(bed.world.source.log().await.iter().all(|line| line["kind"] != "request"), "nothing is read");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_tried_again_is_what_the_policy_says_and_no_more_than_its_budget() {
    let mut bed = service(Traffic { retries: Some(retries()), ..Traffic::default() }).await;
    let mut client = bed.client().await;
    // Each of the two says no twice.
    assert_eq!(client.get("/unready").await.0, StatusCode::OK);
    let again = bed.world.source.metrics.retries(&name("service"));
    assert!((2..=4).contains(&again), "{again}");
    assert_eq!(bed.log("/unready").await["attempts"], again + 1);

    // What is no safe method is not, unless it says so.
    let before = bed.web.served() + bed.api.served();
    let broken = Retries { codes: vec![500], ..retries() };
    says(&mut bed, Traffic { retries: Some(broken.clone()), reads_requests: true, ..Traffic::default() });
    let ask = async |client: &mut Client, path: &str| client.ask(Request::post(path)).await.0;
    assert_eq!(ask(&mut client, "/broken/all").await, StatusCode::INTERNAL_SERVER_ERROR);
    assert_eq!(bed.web.served() + bed.api.served(), before + 1);
    let every = Retries { every_method: true, ..broken.clone() };
    says(&mut bed, Traffic { retries: Some(every), reads_requests: true, ..Traffic::default() });
    assert_eq!(ask(&mut client, "/broken/all").await, StatusCode::INTERNAL_SERVER_ERROR);
    assert_eq!(bed.web.served() + bed.api.served(), before + 6);

    // Nothing is saved up, and none may be.
    let none = RetryBudget { percent: 0, per_second: 0 };
    let none = Retries { every_method: true, budget: none, ..broken };
    says(&mut bed, Traffic { retries: Some(none), reads_requests: true, ..Traffic::default() });
    for _ in 0..2 {
        assert_eq!(ask(&mut client, "/broken/all").await, StatusCode::INTERNAL_SERVER_ERROR);
    }
    let asked = bed.web.served() + bed.api.served();
    assert!((before + 8..=before + 9).contains(&asked), "one at most, of what there was: {asked}");
    assert!(bed.world.source.metrics.limit_hits("retries") >= 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn so_many_requests_are_sent_so_many_wait_and_others_are_refused_at_once() {
    let limits = Limits { connections: None, requests: Some(1), pending: 1 };
    let bed = service(Traffic { limits: Some(limits), ..Traffic::default() }).await;
    let (mut first, mut second, mut third) = (bed.client().await, bed.client().await, bed.client().await);
    let first = tokio::spawn(async move { first.get("/never").await });
    eventually(async || (bed.web.served() + bed.api.served() == 1).then_some(())).await;
    let second = tokio::spawn(async move { second.get("/waits").await });
    // Whichever of the two comes first waits; the other one is refused, and the one that waits has its turn in the end.
    let third = tokio::spawn(async move { third.get("/waits").await });
    eventually(async || (second.is_finished() || third.is_finished()).then_some(())).await;
    assert_eq!(bed.web.served() + bed.api.served(), 1);
    first.abort();
    let _ = first.await;
    let (second, third) = (in_time(second).await.unwrap().0, in_time(third).await.unwrap().0);
    let both = BTreeSet::from([second.as_u16(), third.as_u16()]);
    assert_eq!(both, BTreeSet::from([200, 503]));
    let lines = bed.world.source.log().await;
    let refused: Vec<_> = lines.iter().filter(|line| line["reason"] == "limit_requests").collect();
    assert_eq!(refused.len(), 1);
    assert_eq!(bed.world.source.metrics.limit_hits("requests"), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn no_more_connections_than_the_policy_lets_be() {
    let limits = Limits { connections: Some(1), requests: None, pending: 0 };
    let mut bed = Bed::new(vec![]).await;
    bed.plan.routes = vec![];
    says(&mut bed, Traffic { limits: Some(limits), ..Traffic::default() });
    let mut client = bed.client().await;
    assert_eq!(client.get("/").await.0, StatusCode::OK);
    // It is reset, perhaps before the client has heard that it is open.
    if let Ok(mut more) = connect_from(CLIENT, bed.at).await {
        assert!(in_time(more.read_u8()).await.is_err());
    }
    let refused = eventually(async || {
        let lines = bed.world.source.log().await;
        lines.into_iter().find(|line| line["reason"] == "limit_service_connections")
    });
    assert_eq!(refused.await["step"], "connect");
    drop(client);
    eventually(async || {
        bed.world.source.node.connections().list(None, 1).connections.is_empty().then_some(())
    })
    .await;
    assert_eq!(bed.client().await.get("/").await.0, StatusCode::OK);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_endpoint_that_fails_is_left_alone_until_its_time_is_over() {
    let traffic = Traffic { ejection: ejection(3), ..balancing(Algorithm::RoundRobin) };
    let bed = service(traffic).await;
    let mut client = bed.client().await;
    let mut failed = 0;
    for _ in 0..20 {
        failed += u32::from(client.get("/broken/web").await.0 == StatusCode::INTERNAL_SERVER_ERROR);
    }
    assert_eq!((failed, bed.web.served()), (3, 3));
    assert_eq!(ejections(&bed, Cause::Consecutive), 1);
    // Half of two is one: when the other one fails too, it is the one that has failed for longer that serves again.
    for expected in [500, 500, 500, 200, 200] {
        assert_eq!(client.get("/broken/api").await.0.as_u16(), expected);
    }
    assert_eq!((bed.web.served(), ejections(&bed, Cause::Consecutive)), (5, 2));
}

#[tokio::test(flavor = "multi_thread")]
async fn an_endpoint_that_fails_among_successes_is_left_alone_for_its_share() {
    let share = FailureShare { percent: 40, minimum: 10, window: Duration::from_secs(3600) };
    let ejection = ejection(3).map(|it| Ejection { share: Some(share), ..it });
    let bed = service(Traffic { ejection, ..balancing(Algorithm::RoundRobin) }).await;
    let mut client = bed.client().await;
    let mut ask = async |path: &str| client.get(path).await.0.as_u16();
    // Two of each five that it takes fail, never three in a row: it has ten of twenty before there is a share of them.
    for _ in 0..2 {
        let mut said = vec![];
        for path in ["/", "/", "/", "/broken/web", "/broken/web"] {
            // To both, whoever has the turn.
            said.extend([ask(path).await, ask(path).await]);
        }
        assert_eq!(said.iter().filter(|status| **status == 500).count(), 2, "{said:?}");
    }
    assert_eq!((bed.web.served(), ejections(&bed, Cause::Percent)), (10, 1));
    assert_eq!(ejections(&bed, Cause::Consecutive), 0, "it is told why");
    for _ in 0..6 {
        assert_eq!(ask("/broken/web").await, 200);
    }
    assert_eq!(bed.web.served(), 10);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_is_tried_again_no_sooner_than_its_server_wants_and_not_if_that_is_too_late() {
    let again = Some(Retries { codes: vec![429], ..retries() });
    let traffic = Traffic { retries: again.clone(), ..balancing(Algorithm::RoundRobin) };
    let mut bed = service(traffic.clone()).await;
    let mut client = bed.client().await;
    // Each of the two has the first turn once.
    let mut ask = async |path: &str| [client.get(path).await.0.as_u16(), client.get(path).await.0.as_u16()];
    let began = Instant::now();
    assert_eq!(ask("/busy/web/429/1").await, [200; 2]);
    assert!(began.elapsed() >= Duration::from_secs(1));
    assert_eq!((bed.web.served(), bed.api.served()), (1, 2));

    let some = |statuses: [u16; 2]| BTreeSet::from(statuses) == BTreeSet::from([200, 429]);
    assert!(some(ask("/busy/web/429/3600").await), "nobody waits for an hour");
    assert_eq!(bed.world.source.metrics.limit_hits("retry_pause"), 1);
    let timeouts = Some(Timeouts { request: Some(Duration::from_millis(900)), backend: None });
    says(&mut bed, Traffic { timeouts, reads_requests: true, ..traffic });
    assert!(some(ask("/busy/web/429/1").await), "it would be too late");
    assert_eq!(bed.world.source.metrics.retries(&name("service")), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_endpoint_that_asks_for_time_is_left_alone_until_then() {
    let hour = Duration::from_secs(3600);
    let of = |most| ejection(1000).map(|it| Ejection { retry_after: Some(most), ..it });
    let traffic = Traffic { retries: Some(retries()), ..balancing(Algorithm::RoundRobin) };
    let bed = service(Traffic { ejection: of(hour), ..traffic.clone() }).await;
    let mut client = bed.client().await;
    for _ in 0..10 {
        let began = Instant::now();
        assert_eq!(client.get("/busy/web/503/9").await.0, StatusCode::OK);
        assert!(began.elapsed() < Duration::from_secs(9), "the other one is asked at once");
    }
    assert_eq!((bed.web.served(), bed.api.served()), (1, 10));
    assert_eq!((ejections(&bed, Cause::RetryAfter), ejections(&bed, Cause::Consecutive)), (1, 0));

    // It is believed for no longer than the policy says.
    let bed = service(Traffic { ejection: of(Duration::from_millis(1)), ..traffic }).await;
    let mut client = bed.client().await;
    in_time(async {
        while bed.web.served() < 3 {
            assert_eq!(client.get("/busy/web/503/3600").await.0, StatusCode::OK);
        }
    })
    .await;
    assert_eq!(ejections(&bed, Cause::RetryAfter), 3);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_call_is_tried_again_when_its_server_says_and_never_if_it_says_never() {
    let again = Retries { grpc_codes: vec![14], every_method: true, ..retries() };
    let bed = service(Traffic { retries: Some(again), ..balancing(Algorithm::RoundRobin) }).await;
    let caller = bed.caller().await;
    let calls = async |path: &str| {
        let statuses = [caller.call(path).await, caller.call(path).await];
        statuses.iter().filter(|it| it.headers().contains_key("grpc-status")).count()
    };
    let began = Instant::now();
    assert_eq!(calls("/pushback/web/300").await, 0);
    assert!(began.elapsed() >= Duration::from_millis(300));
    assert_eq!(bed.world.source.metrics.retries(&name("service")), 1);
    for said in ["-1", "never"] {
        assert_eq!(calls(&format!("/pushback/web/{said}")).await, 1, "{said}");
    }
    assert_eq!(bed.world.source.metrics.retries(&name("service")), 1);
}

fn hedge(calls: &[&str]) -> Hedge {
    let calls = calls.iter().map(|call| (*call).to_owned()).collect();
    Hedge { after: Duration::from_millis(20), calls, budget: RetryBudget::default() }
}

fn hedges(bed: &Bed, outcome: HedgeOutcome) -> u64 {
    bed.world.source.metrics.hedges(&name("service"), outcome)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_that_stalls_is_answered_elsewhere_and_the_first_endpoint_sees_at_once_that_it_is_given_up()
{
    let hedge = Some(hedge(&["stalls/web"]));
    let bed = service(Traffic { hedge, ..balancing(Algorithm::RoundRobin) }).await;
    let mut client = bed.client().await;
    // Each of the two has the first turn once.
    for _ in 0..2 {
        let (status, said) = client.get("/stalls/web").await;
        assert_eq!((status, &said["app"]), (StatusCode::OK, &json!("api")));
    }
    eventually(async || (bed.web.given_up() == 1).then_some(())).await;
    assert_eq!((bed.web.served(), bed.api.served(), hedges(&bed, HedgeOutcome::Won)), (1, 2, 1));
    let line = eventually(async || {
        let lines = bed.world.source.log().await;
        lines.into_iter().find(|line| line["path"] == "/stalls/web" && line["attempts"] == 2)
    })
    .await;
    assert_eq!((&line["destination"]["workload"], &line["status"]), (&json!("shop/api"), &json!(200)));

    // A call that is named, on a connection that many share: its stream alone is reset.
    let caller = bed.caller().await;
    for _ in 0..2 {
        assert_eq!(caller.call("/stalls/web").await.headers()["x-app"], "api");
    }
    eventually(async || (bed.web.given_up() == 2).then_some(())).await;
    assert_eq!(hedges(&bed, HedgeOutcome::Won), 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_failure_wins_nothing_while_the_other_endpoint_may_answer() {
    let timeouts = Some(Timeouts { request: None, backend: Some(Duration::from_millis(300)) });
    let again = Some(Retries { attempts: 0, ..retries() });
    let traffic =
        Traffic { hedge: Some(hedge(&[])), retries: again, timeouts, ..balancing(Algorithm::RoundRobin) };
    let bed = service(traffic).await;
    let mut client = bed.client().await;
    let statuses = [client.get("/stalls/web/503").await.0, client.get("/stalls/web/503").await.0];
    // The one that was asked first says 503 at once; the one that was asked second does while the other may answer.
    assert_eq!(BTreeSet::from(statuses.map(|it| it.as_u16())), BTreeSet::from([503, 504]));
    assert_eq!((hedges(&bed, HedgeOutcome::Won), hedges(&bed, HedgeOutcome::Failed)), (0, 1));
}

#[tokio::test(flavor = "multi_thread")]
async fn what_may_do_harm_and_what_has_no_budget_or_no_room_is_sent_once() {
    let timeouts = Some(Timeouts { request: Some(Duration::from_millis(200)), backend: None });
    let traffic = Traffic { hedge: Some(hedge(&["shop.Cart/Get"])), timeouts, ..Traffic::default() };
    let mut bed = service(traffic.clone()).await;
    let mut client = bed.client().await;
    let asked = |bed: &Bed| bed.web.served() + bed.api.served();
    assert_eq!(client.ask(Request::post("/never")).await.0, StatusCode::GATEWAY_TIMEOUT);
    let call = bed.caller().await.call("/never").await;
    assert_eq!((call.headers()["grpc-status"].to_str().unwrap(), asked(&bed)), ("4", 2));

    // What is saved up is one request, if nothing may be.
    let none = Hedge { budget: RetryBudget { percent: 0, per_second: 0 }, ..hedge(&[]) };
    says(&mut bed, Traffic { hedge: Some(none), reads_requests: true, ..traffic.clone() });
    for expected in [4, 5] {
        assert_eq!(client.get("/never").await.0, StatusCode::GATEWAY_TIMEOUT);
        assert_eq!(asked(&bed), expected);
    }
    assert_eq!(bed.world.source.metrics.limit_hits("hedges"), 1);

    let limits = Some(Limits { connections: None, requests: Some(1), pending: 0 });
    says(&mut bed, Traffic { limits, reads_requests: true, ..traffic });
    assert_eq!(client.get("/never").await.0, StatusCode::GATEWAY_TIMEOUT);
    assert_eq!((asked(&bed), bed.world.source.metrics.limit_hits("hedges")), (6, 2));
}

#[tokio::test(flavor = "multi_thread")]
async fn an_endpoint_that_takes_all_of_a_requests_time_has_failed() {
    let timeouts = Some(Timeouts { request: Some(Duration::from_millis(50)), backend: None });
    let bed = service(Traffic { ejection: ejection(1), timeouts, ..Traffic::default() }).await;
    let mut client = bed.client().await;
    assert_eq!(client.get("/never").await.0, StatusCode::GATEWAY_TIMEOUT);
    assert_eq!(ejections(&bed, Cause::Consecutive), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_call_that_fails_in_its_trailers_is_a_failure_too() {
    let bed = service(Traffic { ejection: ejection(1), ..Traffic::default() }).await;
    let caller = bed.caller().await;
    let call = async |path: &str| {
        let answer = in_time(caller.call(path).await.into_body().collect()).await.unwrap();
        answer.trailers().unwrap()["grpc-status"].clone()
    };
    // PERMISSION_DENIED is the caller's fault, INTERNAL is not.
    assert_eq!(call("/trailers/say").await, "7");
    assert_eq!(ejections(&bed, Cause::Consecutive), 0);
    assert_eq!(call("/trailers/fail").await, "13");
    eventually(async || (ejections(&bed, Cause::Consecutive) == 1).then_some(())).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn faults_happen_to_those_that_they_are_for_and_are_told_as_such() {
    let tester = vec![("x-tester".to_owned(), TextMatch::Exact("me".into()))];
    let delay = Duration::from_millis(50);
    let faults = vec![
        Fault { of_ten_thousand: 10_000, headers: vec![], effect: FaultEffect::Delay(delay) },
        Fault { of_ten_thousand: 10_000, headers: tester, effect: FaultEffect::Abort(418) },
    ];
    let mut bed = service(Traffic { faults: Some(faults), ..Traffic::default() }).await;
    let mut client = bed.client().await;
    let began = Instant::now();
    assert_eq!(client.get("/").await.0, StatusCode::OK);
    assert!(began.elapsed() >= delay);
    let (status, _) = client.ask(Request::get("/mine").header("x-tester", "me")).await;
    assert_eq!(status, StatusCode::IM_A_TEAPOT);
    let line = bed.log("/mine").await;
    assert_eq!((&line["reason"], &line["status"]), (&json!("fault_injected"), &json!(418)));
    let faults = |fault| bed.world.source.metrics.faults(&name("service"), fault);
    assert_eq!((faults("delay"), faults("abort")), (2, 1));
    assert_eq!(bed.web.served() + bed.api.served(), 1);

    // A delay is a part of the request's time.
    let timeouts = Some(Timeouts { request: Some(Duration::from_millis(20)), backend: None });
    let hour = FaultEffect::Delay(Duration::from_secs(3600));
    let faults = Some(vec![Fault { of_ten_thousand: 10_000, headers: vec![], effect: hour }]);
    says(&mut bed, Traffic { faults, timeouts, reads_requests: true, ..Traffic::default() });
    assert_eq!(client.get("/").await.0, StatusCode::GATEWAY_TIMEOUT);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_said_of_a_rule_comes_before_what_is_said_of_the_service() {
    let abort = |status| {
        let effect = FaultEffect::Abort(status);
        Some(vec![Fault { of_ten_thousand: 10_000, headers: vec![], effect }])
    };
    let of_rule = Traffic { faults: abort(418), ..Traffic::default() };
    let rules = vec![
        RouteRule { traffic: of_rule, ..rule(vec![prefix("/a")], vec![to("web", 1)]) },
        rule(vec![prefix("/b")], vec![to("web", 1)]),
    ];
    let mut bed = Bed::new(rules).await;
    says(&mut bed, Traffic { faults: abort(502), ..Traffic::default() });
    let mut client = bed.client().await;
    assert_eq!(client.get("/a").await.0, StatusCode::IM_A_TEAPOT);
    assert_eq!(client.get("/b").await.0, StatusCode::BAD_GATEWAY);
    assert_eq!(bed.web.served(), 0);
}
