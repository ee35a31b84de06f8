//! Asking the controller, or the agent of this machine, over HTTP.

use std::time::Duration;

use anyhow::{Context, anyhow, bail, ensure};
use http_body_util::{BodyExt, Full, Limited};
use hyper::{Method, Request, StatusCode, Uri, body::Bytes};
use hyper_util::rt::TokioIo;
use mesh_controller::admin::answer::Failure;
use serde::de::DeserializeOwned;
use tokio::{net::TcpStream, time::timeout};

/// Longest wait for an answer.
const TIMEOUT: Duration = Duration::from_secs(10);
/// Largest answer: a hundred thousand workloads fit.
const MAX_ANSWER: usize = 256 * 1024 * 1024;

/// Who is asked: its name, which is that of the flag for its address.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Who {
    /// The controller.
    Controller,
    /// The agent of this machine.
    Agent,
}

impl Who {
    fn name(self) -> &'static str {
        match self {
            Self::Controller => "controller",
            Self::Agent => "agent",
        }
    }
}

/// A program with an admin interface.
pub(crate) struct Server {
    who: Who,
    address: String,
    host: String,
}

impl Server {
    /// A program by its URL.
    pub(crate) fn new(who: Who, url: &str) -> anyhow::Result<Self> {
        let form = || format!("--{} '{url}' is not of the form http://HOST:PORT", who.name());
        let uri: Uri = url.parse().with_context(form)?;
        ensure!(uri.scheme_str() == Some("http"), form());
        let host = uri.authority().with_context(form)?.to_string();
        let address = if uri.port().is_some() { host.clone() } else { format!("{host}:80") };
        Ok(Self { who, address, host })
    }

    /// Asks one question.
    pub(crate) fn get<T: DeserializeOwned>(&self, path: &str, query: &[(&str, &str)]) -> anyhow::Result<T> {
        let pairs: Vec<String> =
            query.iter().map(|(key, value)| format!("{key}={}", escape(value))).collect();
        let target = if pairs.is_empty() { path.to_owned() } else { format!("{path}?{}", pairs.join("&")) };
        self.parsed(&self.send(Method::GET, &target, String::new())?)
    }

    /// Puts a text there.
    pub(crate) fn put<T: DeserializeOwned>(&self, path: &str, text: &str) -> anyhow::Result<T> {
        self.parsed(&self.send(Method::PUT, path, text.to_owned())?)
    }

    /// An answer as it came.
    pub(crate) fn raw(&self, path: &str) -> anyhow::Result<Bytes> {
        self.send(Method::GET, path, String::new())
    }

    fn parsed<T: DeserializeOwned>(&self, body: &[u8]) -> anyhow::Result<T> {
        serde_json::from_slice(body).with_context(|| {
            format!(
                "{} answered something else: are meshctl and {} of one version?",
                self.address,
                self.who.name()
            )
        })
    }

    fn send(&self, method: Method, target: &str, body: String) -> anyhow::Result<Bytes> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let (status, body) = runtime.block_on(async {
            timeout(TIMEOUT, self.ask(method, target, body)).await.map_err(|_| {
                anyhow!("the {} at {} did not answer within {TIMEOUT:?}", self.who.name(), self.address)
            })?
        })?;
        if status != StatusCode::OK {
            match serde_json::from_slice::<Failure>(&body) {
                Ok(failure) => bail!(failure.error),
                Err(_) => bail!("{} answered {status}: is it a Nodemesh {}?", self.address, self.who.name()),
            }
        }
        Ok(body)
    }

    async fn ask(&self, method: Method, target: &str, body: String) -> anyhow::Result<(StatusCode, Bytes)> {
        let stream = TcpStream::connect(&self.address).await.with_context(|| {
            let name = self.who.name();
            format!(
                "cannot reach the {name} at http://{}; is it running, and is this its --admin-listen address? \
                 name another with --{name}",
                self.address
            )
        })?;
        let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
        tokio::spawn(connection);
        let request = Request::builder()
            .method(method)
            .uri(target)
            .header("host", &self.host)
            .header("content-type", "text/plain; charset=utf-8")
            .body(Full::new(Bytes::from(body)))?;
        let response = sender.send_request(request).await?;
        let status = response.status();
        let body = Limited::new(response.into_body(), MAX_ANSWER).collect().await;
        Ok((status, body.map_err(|error| anyhow!("reading the answer: {error}"))?.to_bytes()))
    }
}

/// Percent-encodes all but RFC 3986's unreserved characters.
fn escape(text: &str) -> String {
    use std::fmt::Write;
    text.bytes().fold(String::new(), |mut out, byte| {
        if byte.is_ascii_alphanumeric() || b"-._~".contains(&byte) {
            out.push(char::from(byte));
        } else {
            write!(out, "%{byte:02X}").expect("writing to a String never fails");
        }
        out
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn urls_are_checked_before_anything_is_asked() {
        assert_eq!(
            Server::new(Who::Controller, "http://127.0.0.1:15020").unwrap().address,
            "127.0.0.1:15020"
        );
        assert_eq!(Server::new(Who::Controller, "http://[::1]:15020/").unwrap().address, "[::1]:15020");
        for url in ["", "127.0.0.1:15020", "https://a:1", "http://"] {
            let error = Server::new(Who::Controller, url).err().unwrap().to_string();
            assert!(error.contains("http://HOST:PORT"), "{error}");
        }
    }

    #[test]
    fn what_a_query_may_not_hold_is_escaped() {
        assert_eq!(escape("shop/web:80 [::1]"), "shop%2Fweb%3A80%20%5B%3A%3A1%5D");
    }

    #[test]
    fn a_controller_that_is_not_there_is_said_with_what_to_do() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        drop(listener);
        let asked = Server::new(Who::Controller, &url).unwrap().get::<Failure>("/", &[]);
        let error = format!("{:#}", asked.unwrap_err());
        assert!(error.contains("cannot reach the controller") && error.contains("--controller"), "{error}");
    }
}
