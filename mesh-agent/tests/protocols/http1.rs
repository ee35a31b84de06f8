//! The lines of HTTP/1.1, from both ends, as they are on the wire.

use tokio::io::AsyncReadExt;

use crate::{
    Bed,
    app::app,
    hear, is_over, say,
    world::{accept, connect, in_time},
};

#[tokio::test(flavor = "multi_thread")]
async fn requests_that_are_sent_ahead_are_answered_in_their_order() {
    for bed in Bed::both().await {
        let mut client = bed.connect().await;
        let app = app("web", bed.app);
        let first = "GET /1 HTTP/1.1\r\nHost: web\r\n\r\n";
        let second = "POST /2 HTTP/1.1\r\nHost: web\r\nContent-Length: 3\r\n\r\nabc";
        let third = "GET /3 HTTP/1.1\r\nHost: web\r\nConnection: close\r\n\r\n";
        say(&mut client, &[first, second, third].concat()).await;
        let mut answers = String::new();
        in_time(client.read_to_string(&mut answers)).await.unwrap();
        let at = |path: &str| answers.find(&format!("\"uri\":\"{path}\"")).unwrap();
        assert!(at("/1") < at("/2") && at("/2") < at("/3"), "{answers}");
        assert_eq!((answers.matches("HTTP/1.1 200 ").count(), app.served()), (3, 3));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn pieces_and_trailers_pass_both_ways() {
    for bed in Bed::both().await {
        let mut client = bed.connect().await;
        let head =
            "POST / HTTP/1.1\r\nHost: web\r\nTE: trailers\r\nTransfer-Encoding: chunked\r\nTrailer: x-sum";
        say(&mut client, &format!("{head}\r\n\r\n5\r\nhello\r\n0\r\nx-sum: 7\r\n\r\n")).await;
        let mut app = bed.accept().await;
        let head = hear(&mut app, "\r\n\r\n").await.to_lowercase();
        assert!(
            head.contains("transfer-encoding: chunked\r\n") && head.contains("te: trailers\r\n"),
            "{head}"
        );
        assert_eq!(hear(&mut app, "7\r\n\r\n").await, "5\r\nhello\r\n0\r\nx-sum: 7\r\n\r\n");
        let head = "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nTrailer: x-end\r\n\r\n";
        say(&mut app, &format!("{head}3\r\nyes\r\n0\r\nx-end: 8\r\n\r\n")).await;
        hear(&mut client, "\r\n\r\n").await;
        assert_eq!(hear(&mut client, "8\r\n\r\n").await, "3\r\nyes\r\n0\r\nx-end: 8\r\n\r\n");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn who_asks_before_it_sends_its_body_is_told_to_go_on() {
    for bed in Bed::both().await {
        let mut client = bed.connect().await;
        let _app = app("web", bed.app);
        for (framing, body) in [
            ("Content-Length: 5", "hello".to_owned()),
            ("Transfer-Encoding: chunked", "5\r\nhello\r\n0\r\n\r\n".to_owned()),
            ("Content-Length: 100000", "hello".repeat(20_000)),
        ] {
            say(
                &mut client,
                &format!("PUT / HTTP/1.1\r\nHost: web\r\nExpect: 100-continue\r\n{framing}\r\n\r\n"),
            )
            .await;
            assert_eq!(hear(&mut client, "\r\n\r\n").await, "HTTP/1.1 100 Continue\r\n\r\n", "{framing}");
            say(&mut client, &body).await;
            let head = hear(&mut client, "\r\n\r\n").await;
            assert!(head.starts_with("HTTP/1.1 200 "), "{head}");
            hear(&mut client, "}").await;
        }
    }
    // Who may not is told so without a body.
    let bed = Bed::authorized().await;
    let mut client = bed.connect().await;
    let head = "DELETE / HTTP/1.1\r\nHost: web\r\nExpect: 100-continue\r\nContent-Length: 5\r\n\r\n";
    say(&mut client, head).await;
    assert!(hear(&mut client, "\r\n\r\n").await.starts_with("HTTP/1.1 403 "));
}

#[tokio::test(flavor = "multi_thread")]
async fn an_answer_without_a_body_leaves_the_next_one_whole() {
    for bed in Bed::both().await {
        let mut client = bed.connect().await;
        let mut app = None;
        // To HEAD, then what is no answer yet, then statuses that have none.
        for (method, answers, length) in [
            ("HEAD", "HTTP/1.1 200 OK\r\nContent-Length: 7\r\n\r\n", Some("content-length: 7\r\n")),
            ("GET", "HTTP/1.1 103 Early Hints\r\nLink: <a>\r\n\r\nHTTP/1.1 204 No Content\r\n\r\n", None),
            ("GET", "HTTP/1.1 304 Not Modified\r\nETag: \"a\"\r\n\r\n", None),
        ] {
            say(&mut client, &format!("{method} / HTTP/1.1\r\nHost: web\r\n\r\n")).await;
            let app = match &mut app {
                Some(app) => app,
                None => app.insert(bed.accept().await),
            };
            hear(app, "\r\n\r\n").await;
            say(app, answers).await;
            let head = hear(&mut client, "\r\n\r\n").await;
            let last = answers.trim_end().rsplit("\r\n\r\n").next().unwrap();
            assert!(head.starts_with(last.lines().next().unwrap()), "{head}");
            assert!(length.is_none_or(|length| head.to_lowercase().contains(length)), "{head}");
        }
    }
}

/// RFC 9112, section 6.1: the second is what whoever goes by the other length takes for a body.
#[tokio::test(flavor = "multi_thread")]
async fn of_two_lengths_one_counts_and_nothing_is_taken_behind_them() {
    for bed in Bed::both().await {
        let at = bed.at;
        let app = app("web", bed.app);
        for lengths in [
            "Content-Length: 4\r\nTransfer-Encoding: chunked",
            "Transfer-Encoding: chunked\r\nContent-Length: 4",
            "Content-Length: 4\r\nX: a\r\nTransfer-Encoding: chunked\r\nContent-Length: 4",
        ] {
            let served = app.served();
            let mut client = connect(at).await;
            let first = format!("POST /1 HTTP/1.1\r\nHost: web\r\n{lengths}\r\n\r\n0\r\n\r\n");
            say(&mut client, &format!("{first}GET /2 HTTP/1.1\r\nHost: web\r\n\r\n")).await;
            let mut answers = vec![];
            // It may be reset behind the answer: what it sent was not read to its end.
            let _ = in_time(client.read_to_end(&mut answers)).await;
            let answers = String::from_utf8(answers).unwrap().to_lowercase();
            assert!(answers.starts_with("http/1.1 200 "), "{lengths:?}: {answers}");
            assert!(answers.contains("\r\nconnection: close\r\n"), "{lengths:?}: {answers}");
            assert!(!answers.contains("\"content-length\""), "{lengths:?}: {answers}");
            assert_eq!((answers.matches("http/1.1 ").count(), app.served() - served), (1, 1), "{lengths:?}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_could_be_read_in_two_ways_reaches_nobody() {
    for bed in Bed::both().await {
        let at = bed.at;
        let app = app("web", bed.app);
        for head in [
            "Transfer-Encoding: xchunked",
            "Transfer-Encoding: identity",
            "Transfer-Encoding: gzip, chunked",
            "Transfer-Encoding: chunked, chunked",
            "Transfer-Encoding: \u{b}chunked",
            "Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked",
            "Transfer-Encoding : chunked",
            "Content-Length: +4",
            "Content-Length: -4",
            "Content-Length: 0x4",
            "Content-Length: 4, 5",
            "Content-Length: 4\r\nContent-Length: 5",
            "X: a\rTransfer-Encoding: chunked",
            "X: a\0b",
            "X: a\r\n\tb",
            "X",
            ": a",
        ] {
            let mut client = connect(at).await;
            say(&mut client, &format!("POST / HTTP/1.1\r\nHost: web\r\n{head}\r\n\r\n0\r\n\r\n")).await;
            let mut status = [0; 12];
            in_time(client.read_exact(&mut status)).await.unwrap_or_else(|error| panic!("{head:?}: {error}"));
            assert!(status.starts_with(b"HTTP/1.1 4") || status.starts_with(b"HTTP/1.1 501"), "{head:?}");
        }
        for line in
            ["GET  / HTTP/1.1", "GET / HTTP/1.1 ", "GET /a b HTTP/1.1", "GET / HTTP/2.0", " GET / HTTP/1.1"]
        {
            let mut client = connect(at).await;
            say(&mut client, &format!("{line}\r\nHost: web\r\n\r\n")).await;
            let mut status = [0; 12];
            in_time(client.read_exact(&mut status)).await.unwrap_or_else(|error| panic!("{line:?}: {error}"));
            assert!(status.starts_with(b"HTTP/1.1 4"), "{line:?}");
        }
        assert_eq!(app.served(), 0);
        // Pieces whose length cannot be read: the head has gone on, and never becomes a whole request.
        for size in ["0x5", "-5", "5 5", "", "fffffffffffffffff"] {
            let mut client = connect(at).await;
            let head = "POST / HTTP/1.1\r\nHost: web\r\nTransfer-Encoding: chunked\r\n\r\n";
            say(&mut client, &format!("{head}{size}\r\nhello\r\n0\r\n\r\n")).await;
            let mut answer = vec![];
            let _ = in_time(client.read_to_end(&mut answer)).await;
            let answer = String::from_utf8_lossy(&answer);
            assert!(!answer.contains("hello") && !answer.contains("\"length\":5"), "{size:?}: {answer}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_upgrade_at_a_backend_that_is_somebody_else_now_is_cut() {
    let Bed { world, mut plan, at, app } = Bed::routed().await;
    let mut client = connect(at).await;
    say(&mut client, "GET / HTTP/1.1\r\nHost: web\r\nConnection: upgrade\r\nUpgrade: echo\r\n\r\n").await;
    let mut app = accept(&app).await.0;
    hear(&mut app, "\r\n\r\n").await;
    let switching = "HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: echo\r\n\r\n";
    say(&mut app, &format!("{switching}hello")).await;
    hear(&mut client, "hello").await;
    plan.workload("web").service_account = "other".into();
    world.publish_at_source(&plan, "3");
    is_over(&mut client).await;
    is_over(&mut app).await;
}
