//! ★ The story of a request that is sent: what comes by a connection to a port of a service that has routes, from its head
//! to the last byte of its answer. [`answer`] tells it from top to bottom.
//!
//! | file | what |
//! |---|---|
//! | `heads` | what of a head is of one hop, and what is no request that can be read in one way only |
//! | `body` | bodies, as they pass |
//! | `faults` | what goes wrong with a request on purpose |
//! | `backends` | the endpoints that a request may be sent to, and by what one is chosen |
//! | `attempts` | to which of them it is sent, and when it is tried again |
//! | `attempt` | one of these: how it ends, and what that says of its endpoint |
//! | `hedge` | a second one, while the first one has not answered |
//! | `answers` | what it is answered with |
//! | `session` | requests of a session go where its first one went |
//! | `upstream` | connections to backends |
//! | `one` | one that carries one request at a time |
//! | `stream` | a lease, or a socket, as a stream of bytes |
//! | `settings` | whether a server of HTTP/2 takes WebSockets |
//! | `websocket` | WebSockets of clients that speak HTTP/2 |
//! | `line` | one that can be cut, whoever has it |
//! | `within` | all that a connection of HTTP/2 does, in one task |
//! | `exchange` | what is told of a request |
//!
//! How a request is taken in where a policy says something of it is told in [`super::inbound`], with the same parts.
//!
//! Bytes that are no HTTP get no further than this, but for TLS between the applications, which is carried as it is to the
//! service that was asked for.

mod answers;
mod attempt;
mod attempts;
mod backends;
pub(super) mod body;
pub(super) mod exchange;
mod faults;
pub(super) mod heads;
mod hedge;
mod line;
mod one;
mod session;
pub(super) mod settings;
pub(super) mod stream;
pub(super) mod upstream;
pub(super) mod websocket;
pub(super) mod within;

use std::{convert::Infallible, net::SocketAddr, pin::pin, sync::Arc, time::Duration};

use http::{HeaderValue, Request, Response, StatusCode, Version, header};
use hyper::{body::Incoming, service::service_fn};
use hyper_util::{
    rt::{TokioIo, TokioTimer},
    server::conn::auto,
};
use mesh_core::{
    http::{choose, edit, matches::Asked},
    identity::SpiffeId,
    model::{
        Name,
        http::{Backend, BackendTarget, Filters, PathMatch, RouteRule},
    },
    refusal::Reason,
    view::{Owner, Snapshot},
};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::TcpStream,
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use self::{
    answers::empty,
    attempt::Sending,
    attempts::Attempts,
    backends::Backends,
    body::{Asking, Body},
    exchange::{Ends, Exchange},
    faults::Befallen,
    stream::Socket,
    within::Within,
};
pub(super) use self::{
    answers::{Answered, Declined, respond, switched},
    upstream::Upstreams,
};
use super::{Accepted, Node, wants};
use crate::{
    drain::Drain,
    live::Party,
    local::{Admission, Local},
    metrics::{Before, Direction},
    record::Entry,
    refusal::{Failure, Refusal, Stop},
    underway,
    wake::seldom,
};

/// How long a client may take for a head, and be silent between two requests: longer than servers usually allow, so that
/// it is they who end what is idle.
pub(super) const HEAD_TIMEOUT: Duration = Duration::from_secs(300);
/// Most bytes of a head: what servers take at most as a rule is less.
const MOST_HEAD: usize = 128 * 1024;
/// Most headers of a request.
const MOST_HEADERS: usize = 256;
/// Requests of one connection of HTTP/2 at once.
const STREAMS: u32 = 1000;
/// What one stream of HTTP/2 may send before it is read.
const WINDOW: u32 = 256 << 10;
/// What all of a connection may: of its streams, 64 may stand still before they hold up the others.
const CONNECTION_WINDOW: u32 = WINDOW * 64;

/// What is asked for by a connection whose requests are routed.
#[derive(Debug)]
pub(super) struct Routed {
    service: Name,
    port: u16,
    /// Among the workload's connections, and among those to the service where a policy says how many there may be.
    _admission: (Admission, Option<underway::Connection>),
    _held: Option<wants::Held>,
}

impl Routed {
    /// The service that is asked for, if requests to it are read: for routes, or for what a policy says of them. It need not
    /// have endpoints of its own.
    pub(super) fn service(view: &Snapshot, destination: SocketAddr, local: &Local) -> Option<Name> {
        let Some(Owner::Service(service)) = view.owner(destination.ip()) else { return None };
        let port = destination.port();
        let routed = view.table(&service.name, port, &local.name.namespace).is_some();
        // Whoever routes connections wants them as they are, whatever is said of requests.
        let as_bytes = || view.connections(&service.name, port, &local.name.namespace).is_some();
        let is_read = routed || service.port(port).is_some_and(|it| it.traffic.reads_requests) && !as_bytes();
        is_read.then(|| service.name.clone())
    }

    pub(super) fn new(
        service: Name,
        port: u16,
        admission: (Admission, Option<underway::Connection>),
        held: Option<wants::Held>,
    ) -> Self {
        Self { service, port, _admission: admission, _held: held }
    }
}

/// The first byte of TLS: a record of a handshake (RFC 8446, section 5.1). No request begins with it.
pub(super) const HANDSHAKE: u8 = 22;

/// Waits for a client's first byte, and says whether what it speaks is encrypted between it and the application: that is
/// carried as it is, to the service that was asked for. Cancel-safe: what is looked at stays.
pub(super) async fn are_hidden(stream: &TcpStream) -> bool {
    let mut first = [0];
    let peeked = tokio::time::timeout(HEAD_TIMEOUT, stream.peek(&mut first)).await;
    matches!(peeked, Ok(Ok(1))) && first[0] == HANDSHAKE
}

/// Whose requests come by a connection, and what they ask.
#[derive(Debug)]
struct Asker {
    node: Node,
    local: Arc<Local>,
    /// The application's own end, as it knows it.
    peer: SocketAddr,
    /// What it connected to.
    original: SocketAddr,
    service: Name,
    port: u16,
    /// What its last request has counted.
    before: Arc<Before>,
    /// What goes on in another protocol.
    upgraded: TaskTracker,
    /// Cancelled when the connection must end.
    ended: CancellationToken,
}

impl Asker {
    /// Between whom its requests are.
    fn ends(&self) -> Ends {
        let source =
            Party { workload: Some(self.local.name.clone()), address: Some(self.peer), ..Party::default() };
        Ends {
            recorder: self.node.inner.recorder.clone(),
            direction: Direction::Outbound,
            source,
            destination: Party { service: Some(self.service.clone()), ..Party::default() },
            port: self.port,
            before: self.before.clone(),
        }
    }

    /// Who asks, to a backend.
    fn asking<'a>(&'a self, own: &'a Arc<SpiffeId>, view: &'a Snapshot) -> upstream::Asking<'a> {
        upstream::Asking { node: &self.node, local: &self.local, own, address: self.peer, view }
    }
}

/// Serves the requests of a connection until it ends, and records how that was.
pub(super) async fn serve(accepted: Accepted, routed: Routed, node: &Node, entry: Box<Entry>) {
    let Accepted { stream, peer, original, workload, .. } = accepted;
    entry.opened();
    let socket = Socket::new(stream).counting(entry.shared());
    let ended = CancellationToken::new();
    let _ended = ended.clone().drop_guard();
    let asker = Arc::new(Asker {
        node: node.clone(),
        local: workload,
        peer,
        original,
        service: routed.service.clone(),
        port: routed.port,
        before: Arc::default(),
        upgraded: TaskTracker::new(),
        ended,
    });
    let conversation = async {
        let answer = |request| {
            let asker = asker.clone();
            async move { Ok::<_, Infallible>(Box::pin(answer(&asker, request)).await) }
        };
        let ended = converse(socket.clone(), node.drain(), answer).await;
        asker.upgraded.close();
        asker.upgraded.wait().await;
        ended
    };
    let result = tokio::select! {
        result = conversation => result,
        refusal = seldom(node.cut(&asker.local)) => Err(refusal.into()),
    };
    if result.is_ok() {
        socket.ended();
    }
    entry.finish(result);
    drop(routed);
}

/// One request after another, or many at once, as the client likes. An answer that is an error ends the connection.
pub(super) async fn converse<I, A, F, E>(stream: I, drain: &Drain, answer: A) -> Result<(), Stop>
where
    I: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    A: Fn(Request<Incoming>) -> F,
    F: Future<Output = Result<Response<Body>, E>> + Send + 'static,
    E: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    let within = Within::default();
    let mut builder = auto::Builder::new(within.clone());
    builder
        .http1()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_TIMEOUT)
        .preserve_header_case(true)
        .max_buf_size(MOST_HEAD)
        .max_headers(MOST_HEADERS)
        .auto_date_header(false);
    builder
        .http2()
        .timer(TokioTimer::new())
        .max_concurrent_streams(STREAMS)
        .initial_stream_window_size(WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .max_header_list_size(MOST_HEAD as u32)
        .enable_connect_protocol()
        .auto_date_header(false);
    let connection = builder.serve_connection_with_upgrades(TokioIo::new(stream), service_fn(answer));
    let mut connection = pin!(connection);
    let conversation = async {
        tokio::select! {
            ended = connection.as_mut() => ended,
            // What is under way is answered still.
            () = seldom(drain.draining()) => {
                connection.as_mut().graceful_shutdown();
                connection.await
            }
        }
    };
    match within.run(conversation).await {
        Ok(()) => Ok(()),
        Err(error) => match error.downcast_ref::<hyper::Error>() {
            Some(error) if error.is_parse() || error.is_parse_too_large() => {
                Err(Refusal::new(Reason::BadRequest, error.to_string()).into())
            }
            _ => Err(Failure::SourceReset.into()),
        },
    }
}

/// The story of a request. Whatever happens there is an answer, which tells nobody outside why.
async fn answer(asker: &Arc<Asker>, request: Request<Incoming>) -> Response<Body> {
    let mut exchange = Exchange::begin(asker.ends(), &request);
    let form = heads::form(&request);
    let told = tell(asker, request, &mut exchange).await;
    respond(told, form, exchange)
}

async fn tell(
    asker: &Arc<Asker>,
    mut request: Request<Incoming>,
    exchange: &mut Exchange,
) -> Result<Answered, Declined> {
    let unready = |reason: Reason| Declined::new(StatusCode::SERVICE_UNAVAILABLE, reason);
    heads::check(&request).map_err(|refusal| Declined::new(StatusCode::BAD_REQUEST, refusal))?;
    websocket::take_in(&mut request)?;
    let extended = websocket::is_extended(&request);

    // One version for all of it: who asks, and under which rule does it fall?
    let view = asker.node.view().map_err(unready)?;
    let own = view.identity(&asker.local.name).ok_or_else(|| unready(Reason::ViewMissing))?;
    exchange.decided(view.shared_version());
    exchange.comes_from(own.clone());
    let table = view.table(&asker.service, asker.port, &asker.local.name.namespace).cloned();
    let asked = Asked { method: request.method(), uri: request.uri(), headers: request.headers() };
    let chosen = match &table {
        None => None,
        Some(table) => Some(table.choose(&asked).ok_or_else(|| no_rule(table.is_grpc()))?),
    };
    let without;
    let (rule, matched) = match &chosen {
        Some(chosen) => {
            exchange.falls_under(chosen);
            (chosen.rule, chosen.path)
        }
        // There are none, or they have gone while the connection lived.
        None => {
            without = (own_rule(&asker.service, asker.port), PathMatch::default());
            (&without.0, &without.1)
        }
    };

    // How is it sent, and what goes wrong with it on purpose?
    let asked_for = view.service(&asker.service).and_then(|it| it.port(asker.port));
    let terms = choose::terms(rule, asked_for.map_or(backends::NOTHING, |it| &it.traffic));
    let delayed = match faults::befall(asker, &terms, &request, exchange).await {
        Befallen::Goes(delayed) => delayed,
        Befallen::Ends(response) => return Ok(Answered::Here(response)),
    };

    // Is it answered here?
    let asked = Asked { method: request.method(), uri: request.uri(), headers: request.headers() };
    let cors = rule.filters.cors.as_ref();
    if let Some(cors) = cors
        && edit::browser(&asked) == edit::Browser::Preflight
    {
        let mut response = empty(StatusCode::OK);
        *response.headers_mut() = edit::preflight(cors, &asked);
        return Ok(Answered::Here(response));
    }
    if let Some(redirect) = &rule.filters.redirect {
        let location = edit::location(redirect, matched, &asked, asker.port);
        let status = StatusCode::from_u16(redirect.status).unwrap_or(StatusCode::FOUND);
        let mut response = empty(status);
        if let Ok(location) = HeaderValue::try_from(location) {
            response.headers_mut().insert(header::LOCATION, location);
        }
        edit::headers(&rule.filters.response_headers, response.headers_mut());
        return Ok(Answered::Here(response));
    }

    // Which backend, and as what?
    let session = rule.persistence.as_ref().and_then(|it| session::of(it, request.headers()));
    let backend = backend(rule, &view, session)?;
    let BackendTarget::Service { service, port } = &backend.to else {
        return Err(Declined::new(StatusCode::INTERNAL_SERVER_ERROR, Reason::NoBackend));
    };
    exchange.goes_to(service);
    let origin = cors.and_then(|_| request.headers().get(header::ORIGIN).cloned());
    let upgrade =
        heads::wants_upgrade(&request).then(|| request.headers().get(header::UPGRADE).cloned()).flatten();
    let from_client = upgrade.is_some().then(|| hyper::upgrade::on(&mut request));
    let (mut head, body) = {
        let (mut parts, body) = request.into_parts();
        heads::take_hop(&mut parts.headers, upgrade);
        (Request::from_parts(parts, ()), body)
    };
    // Before the rule's filters, which may say something else of these headers.
    exchange.goes_on(head.headers_mut());
    for filters in [&rule.filters, &backend.filters] {
        if let Some(rewrite) = &filters.rewrite {
            heads::rewrite(rewrite, matched, &mut head);
        }
        edit::headers(&filters.request_headers, head.headers_mut());
    }
    if head.version() == Version::HTTP_10 {
        *head.version_mut() = Version::HTTP_11;
    }
    let body = Asking::of(body).await.map_err(|error| {
        Declined::new(StatusCode::BAD_REQUEST, Refusal::new(Reason::BadRequest, error.to_string()))
    })?;

    // The way there and the answer's head, as often as the rule says.
    let backends = Backends::new(&view, asker, (service, *port), session, head.headers())?;
    let (terms, view, head, count) = (&terms, &*view, &head, backends.count());
    let sending = Sending { asker, view, own, terms, service, head, count };
    let mut attempts = Attempts { sending, delayed, backends, body, hedged: false };
    attempts.mirror([&rule.filters, &backend.filters].into_iter().flat_map(|it| &it.mirrors));
    let (response, used, endpoint) = attempts.run(exchange).await?;

    // The answer, as the rule wants it.
    let (mut parts, coming) = response.into_parts();
    if websocket::goes_over(&parts, extended)? {
        let held = used.uncounted();
        return switched((&asker.upgraded, &asker.ended), parts, from_client, held);
    }
    heads::take_hop(&mut parts.headers, None);
    for filters in [&backend.filters, &rule.filters] {
        edit::headers(&filters.response_headers, &mut parts.headers);
    }
    if let Some(cors) = cors {
        edit::share(cors, origin.as_ref(), &mut parts.headers);
    }
    if let Some(persistence) = &rule.persistence
        && session != Some(endpoint)
    {
        session::begin(persistence, endpoint, &mut parts.headers);
    }
    Ok(Answered::Backend(parts, coming, Some(used)))
}

fn no_rule(grpc: bool) -> Declined {
    // In gRPC's way a call of an unknown method is answered so, which `said` does for calls.
    let status = if grpc { StatusCode::NOT_IMPLEMENTED } else { StatusCode::NOT_FOUND };
    Declined::new(status, Reason::NoRule)
}

/// What a service without routes does: all of it goes to itself.
fn own_rule(service: &Name, port: u16) -> RouteRule {
    let to = BackendTarget::Service { service: service.clone(), port };
    RouteRule {
        backends: vec![Backend { to, weight: 1, filters: Filters::default() }],
        ..RouteRule::default()
    }
}

/// The backend of a request: that of its session, or else one by chance.
fn backend<'a>(
    rule: &'a RouteRule,
    view: &Snapshot,
    session: Option<SocketAddr>,
) -> Result<&'a Backend, Declined> {
    let has = |backend: &&Backend, endpoint: SocketAddr| match &backend.to {
        BackendTarget::Nowhere => false,
        BackendTarget::Service { service, port } => {
            let of_port =
                view.service(service).into_iter().flat_map(|it| &it.ports).filter(|it| it.port == *port);
            of_port.flat_map(|it| &it.endpoints).any(|it| SocketAddr::new(it.address, it.port) == endpoint)
        }
    };
    let of_session = session.and_then(|endpoint| {
        rule.backends.iter().filter(|backend| backend.weight > 0).find(|backend| has(backend, endpoint))
    });
    let by_chance = || choose::backend(&rule.backends, rand::random());
    let nobody = || Declined::new(StatusCode::INTERNAL_SERVER_ERROR, Reason::NoBackend);
    of_session.or_else(by_chance).ok_or_else(nobody)
}
