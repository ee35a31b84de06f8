//! `meshctl bundle`: what a person who helps has to know, in one archive.
//!
//! The invariant: it holds what the admin interfaces answer and what the kernel says of itself, and no file of theirs.
//! So nothing of a key can be in it: none of these ever has one.

use std::{fs, io::Write, path::Path};

use anyhow::Context;
use flate2::{Compression, write::GzEncoder};

use crate::ask::Server;

/// What is asked of the controller and of the agent; what one of them does not have is passed over by it.
const QUESTIONS: [(&str, &[&str]); 2] = [
    (
        "controller",
        &[
            "/api/v1/status",
            "/api/v1/workloads",
            "/api/v1/services",
            "/api/v1/policies",
            "/api/v1/authentication",
            "/api/v1/routes",
            "/api/v1/traffic",
            "/api/v1/certificates",
            "/api/v1/views",
            "/api/v1/config",
            "/api/v1/log-level",
            "/metrics",
        ],
    ),
    (
        "agent",
        &[
            "/api/v1/state",
            "/api/v1/connections",
            "/api/v1/view",
            "/api/v1/config",
            "/api/v1/log-level",
            "/readyz",
            "/metrics",
        ],
    ),
];
/// What the kernel says of itself.
const KERNEL: [&str; 3] = ["/proc/version", "/proc/meminfo", "/proc/sys/kernel/unprivileged_bpf_disabled"];

/// Writes the archive, which only its owner can read: it says who talks to whom.
pub(crate) fn write(file: &Path, servers: &[(&str, Server)]) -> anyhow::Result<()> {
    use std::os::unix::fs::OpenOptionsExt;
    let out =
        fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(file).with_context(|| {
            format!("cannot make {}: name another file, or remove this one", file.display())
        })?;
    let mut archive = tar::Builder::new(GzEncoder::new(out, Compression::default()));
    let mut missing = String::new();
    add(&mut archive, "meshctl-version.txt", env!("CARGO_PKG_VERSION").as_bytes())?;
    for (name, server) in servers {
        let questions = QUESTIONS.iter().find(|(of, _)| of == name).map_or(&[][..], |(_, paths)| paths);
        for path in questions {
            let plain = path.trim_start_matches("/api/v1").trim_matches('/');
            let ending = if path.starts_with("/api") { "json" } else { "txt" };
            match server.raw(path) {
                Ok(answer) => add(&mut archive, &format!("{name}/{plain}.{ending}"), &answer)?,
                Err(error) => missing += &format!("{name} {path}: {error:#}\n"),
            }
        }
    }
    for path in KERNEL {
        match fs::read(path) {
            Ok(text) => add(&mut archive, &format!("kernel{}.txt", path.replace('/', "-")), &text)?,
            Err(error) => missing += &format!("{path}: {error}\n"),
        }
    }
    add(&mut archive, "missing.txt", missing.as_bytes())?;
    archive
        .into_inner()
        .and_then(GzEncoder::finish)
        .and_then(|mut out| out.flush())
        .context("writing the archive")?;
    let (path, note) = (
        file.display(),
        if missing.is_empty() { "" } else { "; missing.txt in it says what could not be asked" },
    );
    crate::print(crate::Output::Table, &(), |()| format!("{path} written{note}\n"))
}

fn add(archive: &mut tar::Builder<impl Write>, name: &str, content: &[u8]) -> anyhow::Result<()> {
    let mut header = tar::Header::new_gnu();
    header.set_size(content.len() as u64);
    header.set_mode(0o600);
    archive
        .append_data(&mut header, format!("nodemesh-bundle/{name}"), content)
        .context("writing the archive")
}
