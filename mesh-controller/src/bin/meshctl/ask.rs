//! Asking the controller over HTTP.

use std::time::Duration;

use anyhow::{Context, anyhow, bail, ensure};
use http_body_util::{BodyExt, Empty, Limited};
use hyper::{Request, StatusCode, Uri, body::Bytes};
use hyper_util::rt::TokioIo;
use mesh_controller::admin::answer::Failure;
use serde::de::DeserializeOwned;
use tokio::{net::TcpStream, time::timeout};

/// Longest wait for an answer.
const TIMEOUT: Duration = Duration::from_secs(10);
/// Largest answer: a hundred thousand workloads fit.
const MAX_ANSWER: usize = 256 * 1024 * 1024;

/// The controller that is asked.
pub(crate) struct Controller {
    address: String,
    host: String,
}

impl Controller {
    /// A controller by its URL.
    pub(crate) fn new(url: &str) -> anyhow::Result<Self> {
        let form = || format!("--controller '{url}' is not of the form http://HOST:PORT");
        let uri: Uri = url.parse().with_context(form)?;
        ensure!(uri.scheme_str() == Some("http"), form());
        let host = uri.authority().with_context(form)?.to_string();
        let address = if uri.port().is_some() { host.clone() } else { format!("{host}:80") };
        Ok(Self { address, host })
    }

    /// Asks one question.
    pub(crate) fn get<T: DeserializeOwned>(&self, path: &str, query: &[(&str, &str)]) -> anyhow::Result<T> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let (status, body) = runtime.block_on(async {
            timeout(TIMEOUT, self.ask(path, query)).await.map_err(|_| {
                anyhow!("the controller at {} did not answer within {TIMEOUT:?}", self.address)
            })?
        })?;
        if status != StatusCode::OK {
            match serde_json::from_slice::<Failure>(&body) {
                Ok(failure) => bail!(failure.error),
                Err(_) => bail!("{} answered {status}: is it a Nodemesh controller?", self.address),
            }
        }
        serde_json::from_slice(&body).with_context(|| {
            format!("{} answered something else: are meshctl and controller of one version?", self.address)
        })
    }

    async fn ask(&self, path: &str, query: &[(&str, &str)]) -> anyhow::Result<(StatusCode, Bytes)> {
        let stream = TcpStream::connect(&self.address).await.with_context(|| {
            format!(
                "cannot reach the controller at http://{}; is it running, and is this its --admin-listen address? \
                 name another with --controller",
                self.address
            )
        })?;
        let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
        tokio::spawn(connection);
        let pairs: Vec<String> =
            query.iter().map(|(key, value)| format!("{key}={}", escape(value))).collect();
        let target = if pairs.is_empty() { path.to_owned() } else { format!("{path}?{}", pairs.join("&")) };
        let request = Request::get(target).header("host", &self.host).body(Empty::<Bytes>::new())?;
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
        assert_eq!(Controller::new("http://127.0.0.1:15020").unwrap().address, "127.0.0.1:15020");
        assert_eq!(Controller::new("http://[::1]:15020/").unwrap().address, "[::1]:15020");
        for url in ["", "127.0.0.1:15020", "https://a:1", "http://"] {
            let error = Controller::new(url).err().unwrap().to_string();
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
        let asked = Controller::new(&url).unwrap().get::<Failure>("/", &[]);
        let error = format!("{:#}", asked.unwrap_err());
        assert!(error.contains("cannot reach the controller") && error.contains("--controller"), "{error}");
    }
}
