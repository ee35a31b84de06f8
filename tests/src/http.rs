//! The least HTTP that admin interfaces and demo applications need: one GET, one answer.

use std::{
    io::{Read, Write},
    net::{SocketAddr, TcpStream},
    time::Duration,
};

use anyhow::{Context, Result, bail};

use crate::netns::NetNs;
use crate::wait::scaled;
use crate::workload::connect_in;

/// How long an answer may take.
const TIMEOUT: Duration = Duration::from_secs(10);

/// An answer.
#[derive(Debug, Clone)]
pub struct Answer {
    /// The status code.
    pub status: u16,
    /// The body, as text.
    pub body: String,
}

/// `GET path` from inside a namespace. HTTP/1.0, so that the answer ends with the connection.
pub fn get(from: &NetNs, to: SocketAddr, path: &str) -> Result<Answer> {
    let stream = connect_in(from, to, scaled(TIMEOUT)).with_context(|| format!("connecting to {to}"))?;
    ask(stream, to, path)
}

fn ask(mut stream: TcpStream, to: SocketAddr, path: &str) -> Result<Answer> {
    stream.set_read_timeout(Some(scaled(TIMEOUT)))?;
    write!(stream, "GET {path} HTTP/1.0\r\nHost: {to}\r\n\r\n")?;
    let mut answer = vec![];
    stream.read_to_end(&mut answer).with_context(|| format!("reading the answer of {to}"))?;
    parse(&String::from_utf8_lossy(&answer))
}

/// `GET path` from where this program is.
pub fn get_here(to: SocketAddr, path: &str) -> Result<Answer> {
    let timeout = scaled(TIMEOUT);
    let stream = TcpStream::connect_timeout(&to, timeout).with_context(|| format!("connecting to {to}"))?;
    ask(stream, to, path)
}

fn parse(text: &str) -> Result<Answer> {
    let Some((head, body)) = text.split_once("\r\n\r\n") else { bail!("not an HTTP answer: {text:?}") };
    let status = head.split(' ').nth(1).context("no status")?.parse()?;
    Ok(Answer { status, body: body.to_owned() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_has_a_status_and_a_body() {
        let answer = parse("HTTP/1.0 503 Service Unavailable\r\nServer: x\r\n\r\nno view yet").unwrap();
        assert_eq!((answer.status, answer.body.as_str()), (503, "no view yet"));
        assert!(parse("SSH-2.0").is_err());
    }
}
