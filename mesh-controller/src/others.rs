//! The other controllers of this mesh, asked by their admin interfaces, each for a short time: what agents that are connected
//! to them say, and whether one of them is ready.
//!
//! Asked when there is a question, and nothing of it is kept: what a controller that has gone once said is not an answer.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use futures_util::future::join_all;
use http_body_util::{BodyExt, Empty, Limited};
use hyper::{Request, StatusCode, body::Bytes};
use hyper_util::rt::TokioIo;
use serde::de::DeserializeOwned;
use tokio::{net::TcpStream, sync::watch, time::timeout};

/// How long one of them may take.
const TIMEOUT: Duration = Duration::from_secs(2);
/// Largest answer, bytes.
const MAX_ANSWER: usize = 64 << 20;

/// Where they are, now and as they come and go.
#[derive(Debug, Clone)]
pub struct Others {
    addresses: watch::Receiver<Arc<Vec<SocketAddr>>>,
}

impl Others {
    /// Those at these addresses.
    pub fn new(addresses: watch::Receiver<Arc<Vec<SocketAddr>>>) -> Self {
        Self { addresses }
    }

    /// What each of them answers, or why it does not.
    pub async fn ask<T: DeserializeOwned>(&self, target: &str) -> Vec<(SocketAddr, Result<T, String>)> {
        let one = |address: SocketAddr| async move {
            let answer = ask(address, target).await;
            (
                address,
                answer.and_then(|body| serde_json::from_slice(&body).map_err(|error| error.to_string())),
            )
        };
        let addresses = self.addresses.borrow().clone();
        join_all(addresses.iter().copied().map(one)).await
    }

    /// Whether agents would be served elsewhere.
    pub async fn one_is_ready(&self) -> bool {
        let addresses = self.addresses.borrow().clone();
        let answers = join_all(addresses.iter().map(|address| ask(*address, "/readyz"))).await;
        answers.iter().any(Result::is_ok)
    }
}

async fn ask(address: SocketAddr, target: &str) -> Result<Bytes, String> {
    let asked = async {
        let stream = TcpStream::connect(address).await.map_err(|error| error.to_string())?;
        let handshake = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await;
        let (mut sender, connection) = handshake.map_err(|error| error.to_string())?;
        tokio::spawn(connection);
        let request = Request::get(target).header("host", address.to_string()).body(Empty::<Bytes>::new());
        let request = request.map_err(|error| error.to_string())?;
        let response = sender.send_request(request).await.map_err(|error| error.to_string())?;
        let status = response.status();
        let body = Limited::new(response.into_body(), MAX_ANSWER).collect().await;
        let body = body.map_err(|error| error.to_string())?.to_bytes();
        if status == StatusCode::OK { Ok(body) } else { Err(format!("it answered {status}")) }
    };
    timeout(TIMEOUT, asked).await.unwrap_or_else(|_| Err(format!("no answer within {TIMEOUT:?}")))
}
