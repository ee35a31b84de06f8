//! h2spec as a client of both readings of HTTP/2: it says what RFC 9113 and RFC 7541 must not be broken by, and looks at what
//! comes back.

use std::{path::Path, process::Stdio};

use tokio::process::Command;

use crate::{Bed, app::app, world::CLIENT};

/// Built by `cargo xtask peers`, which is part of `cargo xtask test`.
const H2SPEC: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../target/peers/h2spec");

/// What it tries: the behaviour that servers have in common, the RFC on HTTP/2, and that on header compression.
const SECTIONS: [&str; 3] = ["generic", "http2", "hpack"];

/// What fails, as it must: whatever does not begin with HTTP/2's preface is HTTP/1.1 on a port that has both, where what
/// cannot be read is answered with 400 before the connection ends; h2spec wants it to end without a word.
const NOT_THE_PREFACE: &str = " 2: Sends invalid connection preface";

#[tokio::test(flavor = "multi_thread")]
async fn both_readings_of_http2_are_as_its_specification_says() {
    assert!(Path::new(H2SPEC).is_file(), "{H2SPEC} is not there: cargo xtask peers");
    for bed in Bed::both().await {
        let port = bed.at.port().to_string();
        let _app = app("web", bed.app);
        let ran = Command::new(H2SPEC)
            .args(["--host", CLIENT, "--port", &port, "--timeout", "5", "--strict"])
            .args(SECTIONS)
            .stdin(Stdio::null())
            .kill_on_drop(true)
            .output()
            .await
            .unwrap();
        let said = String::from_utf8_lossy(&ran.stdout);
        assert!(said.contains(" tests, "), "it ran to its end: {said}");
        // Failures come again at the end.
        let (tried, _) = said.split_once("\nFailures:").unwrap_or((&said, ""));
        let failed: Vec<&str> = tried.lines().filter_map(|line| Some(line.split_once('×')?.1)).collect();
        assert_eq!(failed, [NOT_THE_PREFACE], "{said}");
    }
}
