//! One check of an endpoint. Stands apart from the connections that are carried: nothing of a check is anybody's request,
//! and nothing of what is answered goes anywhere, but for why it was not well.

use std::{io, net::SocketAddr};

use http_body_util::{BodyExt, Empty, Full, Limited};
use hyper::{
    Request, Response, StatusCode,
    body::{Bytes, Incoming},
    client::conn::{http1, http2},
    header::{CONNECTION, CONTENT_TYPE, HOST, TE, USER_AGENT},
};
use hyper_util::rt::{TokioExecutor, TokioIo};
use mesh_core::model::health::{Check, Probe};
use prost::Message;
use tokio::{net::TcpStream, time::timeout_at};

use crate::net::{
    netns::Namespace,
    socket::{dial, is_shortage},
};

/// Who asks, for the application's log.
const AGENT: &str = concat!("nodemesh-health-check/", env!("CARGO_PKG_VERSION"));
/// The longest head that is read.
const MAX_HEAD: usize = 16 * 1024;
/// The longest answer of gRPC that is read: a byte or two, within what a server may add.
const MAX_MESSAGE: usize = 1024;
/// `grpc.health.v1.HealthCheckResponse.ServingStatus`.
const SERVING: i32 = 1;

/// Why an endpoint is not well.
#[derive(Debug, thiserror::Error)]
pub enum ProbeError {
    /// It takes no connection.
    #[error("it takes no connection: {0}")]
    NotTaken(io::Error),
    /// It has not answered in time.
    #[error("no answer within {0:?}")]
    TooLate(std::time::Duration),
    /// It spoke something else, or nothing.
    #[error("not an answer: {0}")]
    NoAnswer(String),
    /// Its status is none of those that are wanted.
    #[error("it answered {0}")]
    Status(u16),
    /// It has a status of gRPC.
    #[error("it answered with grpc-status {0}")]
    GrpcStatus(String),
    /// It says so itself.
    #[error("it is not SERVING (status {0})")]
    NotServing(i32),
}

/// What `grpc.health.v1` asks.
#[derive(Clone, PartialEq, Message)]
struct HealthCheckRequest {
    #[prost(string, tag = "1")]
    service: String,
}

/// What it answers.
#[derive(Clone, PartialEq, Message)]
struct HealthCheckResponse {
    #[prost(int32, tag = "1")]
    status: i32,
}

/// Asks once. Nothing that is answered takes longer, or is longer, than the check allows.
pub async fn ask(namespace: &Namespace, check: &Check) -> Result<(), ProbeError> {
    let limit = check.pace.timeout;
    let to = SocketAddr::new(check.of.address, check.port);
    let deadline = tokio::time::Instant::now() + limit;
    let asked = async {
        let stream = match dial(namespace, to, limit).await {
            Err(error) if error.kind() == io::ErrorKind::TimedOut => return Err(ProbeError::TooLate(limit)),
            other => other.map_err(ProbeError::NotTaken)?,
        };
        match &check.probe {
            Probe::Tcp => Ok(()),
            Probe::Http { path, host, statuses } => {
                let host = host.clone().unwrap_or_else(|| to.to_string());
                get(stream, path, &host, statuses).await
            }
            Probe::Grpc { service } => call(stream, service, to).await,
        }
    };
    timeout_at(deadline, asked).await.unwrap_or(Err(ProbeError::TooLate(limit)))
}

impl ProbeError {
    /// Whether it says nothing of the endpoint: we may open no more.
    pub fn is_ours(&self) -> bool {
        matches!(self, Self::NotTaken(error) if is_shortage(error))
    }
}

fn no_answer(error: impl ToString) -> ProbeError {
    ProbeError::NoAnswer(error.to_string())
}

async fn get(stream: TcpStream, path: &str, host: &str, statuses: &[(u16, u16)]) -> Result<(), ProbeError> {
    let request = Request::get(path).header(HOST, host).header(USER_AGENT, AGENT).header(CONNECTION, "close");
    let request = request.body(Empty::<Bytes>::new()).map_err(no_answer)?;
    let mut builder = http1::Builder::new();
    builder.max_buf_size(MAX_HEAD);
    let (mut sender, connection) = builder.handshake(TokioIo::new(stream)).await.map_err(no_answer)?;
    let answer = async move { sender.send_request(request).await.map_err(no_answer) };
    let answer = with_connection(connection, answer).await?;
    let status = answer.status().as_u16();
    match statuses.iter().any(|(first, last)| (*first..=*last).contains(&status)) {
        true => Ok(()),
        false => Err(ProbeError::Status(status)),
    }
}

async fn call(stream: TcpStream, service: &str, to: SocketAddr) -> Result<(), ProbeError> {
    let asked = HealthCheckRequest { service: service.to_owned() }.encode_to_vec();
    let length = u32::try_from(asked.len()).map_err(no_answer)?;
    let framed = [&[0][..], &length.to_be_bytes(), &asked].concat();
    let request = Request::post(format!("http://{to}/grpc.health.v1.Health/Check"))
        .header(CONTENT_TYPE, "application/grpc")
        .header(TE, "trailers")
        .header(USER_AGENT, AGENT)
        .body(Full::<Bytes>::from(framed))
        .map_err(no_answer)?;
    let mut builder = http2::Builder::new(TokioExecutor::new());
    builder.max_header_list_size(MAX_HEAD as u32);
    let (mut sender, connection) = builder.handshake(TokioIo::new(stream)).await.map_err(no_answer)?;
    let exchange = async move {
        let answer = sender.send_request(request).await.map_err(no_answer)?;
        serving(answer).await
    };
    with_connection(connection, exchange).await
}

/// Whether a server says that it serves.
async fn serving(answer: Response<Incoming>) -> Result<(), ProbeError> {
    if answer.status() != StatusCode::OK {
        return Err(ProbeError::Status(answer.status().as_u16()));
    }
    let of_head = answer.headers().get("grpc-status").cloned();
    let body = Limited::new(answer.into_body(), MAX_MESSAGE).collect().await.map_err(no_answer)?;
    let status = of_head.or_else(|| body.trailers()?.get("grpc-status").cloned());
    let status = status.ok_or_else(|| no_answer("no grpc-status"))?;
    if status != "0" {
        let shown = status.to_str().unwrap_or("?").chars().take(8).collect();
        return Err(ProbeError::GrpcStatus(shown));
    }
    let bytes = body.to_bytes();
    // Uncompressed: we have said nothing of compression.
    let [0, a, b, c, d, message @ ..] = &bytes[..] else { return Err(no_answer("no message of gRPC")) };
    if u32::from_be_bytes([*a, *b, *c, *d]) as usize != message.len() {
        return Err(no_answer("a message of gRPC that is cut off"));
    }
    match HealthCheckResponse::decode(message).map_err(no_answer)?.status {
        SERVING => Ok(()),
        other => Err(ProbeError::NotServing(other)),
    }
}

/// Drives a connection until the exchange on it has ended, and drops it then.
async fn with_connection<T>(
    connection: impl Future<Output = hyper::Result<()>>,
    exchange: impl Future<Output = Result<T, ProbeError>>,
) -> Result<T, ProbeError> {
    let (mut connection, mut exchange) = (std::pin::pin!(connection), std::pin::pin!(exchange));
    tokio::select! {
        biased;
        done = &mut exchange => done,
        // What has arrived before the end is an answer still.
        _ = &mut connection => exchange.await,
    }
}
