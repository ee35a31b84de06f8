//! Bodies while they pass: byte by byte, answered before they end, given up, larger than memory.

use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::{Bed, hear, is_over, say, world::in_time};

const GET: &str = "GET / HTTP/1.1\r\nHost: web\r\n\r\n";
const PIECES: &str = "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n";
const POST: &str = "POST / HTTP/1.1\r\nHost: web\r\nTransfer-Encoding: chunked\r\n\r\n";

#[tokio::test(flavor = "multi_thread")]
async fn streams_arrive_byte_by_byte_both_ways() {
    for bed in Bed::both().await {
        let mut client = bed.connect().await;
        say(&mut client, POST).await;
        let mut app = bed.accept().await;
        hear(&mut app, "\r\n\r\n").await;
        say(&mut app, PIECES).await;
        hear(&mut client, "\r\n\r\n").await;
        for _ in 0..100 {
            say(&mut client, "1\r\na\r\n").await;
            assert_eq!(hear(&mut app, "a\r\n").await, "1\r\na\r\n");
            say(&mut app, "1\r\nb\r\n").await;
            assert_eq!(hear(&mut client, "b\r\n").await, "1\r\nb\r\n");
        }
        say(&mut app, "0\r\n\r\n").await;
        assert_eq!(hear(&mut client, "\r\n\r\n").await, "0\r\n\r\n");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_short_answer_whose_server_takes_its_time_is_not_waited_for() {
    for bed in Bed::both().await {
        let mut client = bed.connect().await;
        for _ in 0..2 {
            say(&mut client, GET).await;
        }
        let mut app = bed.accept().await;
        for _ in 0..2 {
            hear(&mut app, "\r\n\r\n").await;
            say(&mut app, "HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\n").await;
            hear(&mut client, "\r\n\r\n").await;
            for part in ["ab", "cd", "ef"] {
                say(&mut app, part).await;
                assert_eq!(hear(&mut client, part).await, part);
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_answer_may_come_before_its_request_has_ended() {
    for bed in Bed::both().await {
        for framing in ["Transfer-Encoding: chunked", "Content-Length: 1000000"] {
            let mut client = bed.connect().await;
            say(&mut client, &format!("POST / HTTP/1.1\r\nHost: web\r\n{framing}\r\n\r\n")).await;
            let mut app = bed.accept().await;
            hear(&mut app, "\r\n\r\n").await;
            say(
                &mut app,
                "HTTP/1.1 413 Content Too Large\r\nContent-Length: 2\r\nConnection: close\r\n\r\nno",
            )
            .await;
            let head = hear(&mut client, "\r\n\r\n").await;
            assert!(head.starts_with("HTTP/1.1 413 "), "{head}");
            hear(&mut client, "no").await;
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_does_not_wait_for_the_body_of_another() {
    let bed = Bed::routed().await;
    let mut slow = bed.connect().await;
    say(&mut slow, POST).await;
    let mut app = bed.accept().await;
    hear(&mut app, "\r\n\r\n").await;
    say(&mut app, "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok").await;
    hear(&mut slow, "ok").await;

    // The backend's connection has its answer, but not the end of its request.
    let mut other = bed.connect().await;
    say(&mut other, GET).await;
    let mut second = bed.accept().await;
    hear(&mut second, "\r\n\r\n").await;
    say(&mut second, "HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nyes").await;
    hear(&mut other, "yes").await;

    // Once it has that, it is one as any.
    say(&mut slow, "0\r\n\r\n").await;
    hear(&mut app, "0\r\n\r\n").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_goes_is_missed_at_once() {
    for bed in Bed::both().await {
        for (asks, answers) in [(GET, ""), (GET, PIECES), (POST, ""), (POST, PIECES)] {
            let mut client = bed.connect().await;
            say(&mut client, asks).await;
            let mut app = bed.accept().await;
            hear(&mut app, "\r\n\r\n").await;
            say(&mut app, answers).await;
            if !answers.is_empty() {
                hear(&mut client, "\r\n\r\n").await;
            }
            drop(client);
            is_over(&mut app).await;
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_answer_that_breaks_off_does_not_look_whole() {
    for bed in Bed::both().await {
        for head in [PIECES, "HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\n"] {
            let mut client = bed.connect().await;
            say(&mut client, "POST / HTTP/1.1\r\nHost: web\r\nContent-Length: 0\r\n\r\n").await;
            let mut app = bed.accept().await;
            hear(&mut app, "\r\n\r\n").await;
            say(&mut app, head).await;
            say(&mut app, "2\r\nab\r\n").await;
            drop(app);
            let mut answer = vec![];
            let _ = in_time(client.read_to_end(&mut answer)).await;
            let answer = String::from_utf8_lossy(&answer);
            assert!(answer.contains("ab") && !answer.ends_with("0\r\n\r\n"), "{answer:?}");
        }
    }
}

/// A body that no node has the memory for a thousand times over.
const LARGE: usize = 1 << 30;
/// What the agents may take for it, in KiB; what bodies may have under way is far less.
const MOST_MEMORY: usize = 64 << 10;

#[tokio::test(flavor = "multi_thread")]
async fn a_body_of_a_gigabyte_passes_in_constant_memory() {
    let bed = Bed::routed().await;
    let mut client = bed.connect().await;
    say(&mut client, GET).await;
    let mut app = bed.accept().await;
    hear(&mut app, "\r\n\r\n").await;
    say(&mut app, &format!("HTTP/1.1 200 OK\r\nContent-Length: {LARGE}\r\n\r\n")).await;
    hear(&mut client, "\r\n\r\n").await;
    let before = most_memory();
    let sent = tokio::spawn(async move {
        let block = vec![7; 1 << 18];
        for _ in 0..LARGE / block.len() {
            in_time(app.write_all(&block)).await.unwrap();
        }
        app
    });
    let (mut block, mut got) = (vec![0; 1 << 18], 0);
    while got < LARGE {
        let n = in_time(client.read(&mut block)).await.unwrap();
        assert!(n > 0, "it ends after {got}");
        got += n;
    }
    sent.await.unwrap();
    let more = most_memory() - before;
    assert!(more < MOST_MEMORY, "{more} KiB more");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_upload_of_a_gigabyte_passes_in_constant_memory_wherever_it_is_read() {
    for bed in Bed::both().await {
        let mut client = bed.connect().await;
        say(&mut client, &format!("POST / HTTP/1.1\r\nHost: web\r\nContent-Length: {LARGE}\r\n\r\n")).await;
        let mut app = bed.accept().await;
        hear(&mut app, "\r\n\r\n").await;
        let before = most_memory();
        let sent = tokio::spawn(async move {
            let block = vec![7; 1 << 18];
            for _ in 0..LARGE / block.len() {
                in_time(client.write_all(&block)).await.unwrap();
            }
            client
        });
        let (mut block, mut got) = (vec![0; 1 << 18], 0);
        while got < LARGE {
            let n = in_time(app.read(&mut block)).await.unwrap();
            assert!(n > 0, "it ends after {got}");
            got += n;
        }
        let mut client = sent.await.unwrap();
        say(&mut app, "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok").await;
        hear(&mut client, "ok").await;
        let more = most_memory() - before;
        assert!(more < MOST_MEMORY, "{more} KiB more");
    }
}

/// The most that this process, both agents in it, has had in memory so far, in KiB.
fn most_memory() -> usize {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
    line.trim().trim_end_matches(" kB").parse().unwrap()
}
