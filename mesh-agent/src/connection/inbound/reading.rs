//! ★ The story of a request that arrives at a workload of whose requests a policy says something: from its head, by the
//! decision on it, to the last byte of its application's answer. [`answer`] tells it from top to bottom.
//!
//! What comes by such a connection has to be HTTP. What is not (bytes of another protocol, TLS between the applications) is
//! decided as what cannot be read, which is refused where an enforced policy asks to read it ([`Content::Bytes`]).
//!
//! To both ends it is as if nobody read: the version of HTTP stays, an application that resets its connection before it has
//! answered has its client's reset, and nothing is tried twice that may have been taken. Of what certainly was not taken, as the
//! application is gone, the source's agent is told so, and sends it elsewhere.

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use http::{HeaderName, HeaderValue, Request, Response, StatusCode, Version, header};
use hyper::{
    body::Incoming,
    client::conn::{http1, http2},
};
use hyper_util::rt::TokioIo;
use mesh_core::{
    http::matches::Asked,
    policy::{Content, Reads, request::Reading},
    refusal::Reason,
};
use tokio::io::AsyncWriteExt;
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use super::{
    super::{
        Node,
        requests::{
            Answered, Declined, HANDSHAKE, HEAD_TIMEOUT,
            body::Body,
            converse,
            exchange::{Ends, Exchange},
            heads, respond,
            settings::{self, FirstFrame, Takes},
            stream::{Arriving, Owed, Socket, Upstream},
            switched,
            upstream::{self, unspoken},
            websocket::{self, Way},
            within::Within,
        },
    },
    At, Proved, Stage, authentication, intake, may, revoked,
};
use crate::{
    authorize::Allowed,
    connect,
    live::Party,
    local::Admission,
    metrics::{Before, Direction},
    record::Entry,
    refusal::{Failure, Refusal, Stop},
    relay::ResetOnDrop,
    wake::seldom,
};

/// How long the source of a connection that need not be read may take for its first byte.
const DETECTION: Duration = Duration::from_millis(100);
/// Who the client is, to the application; what a client says of itself there is taken away.
const CLIENT_CERT: HeaderName = HeaderName::from_static("x-forwarded-client-cert");

/// A connection whose requests are read, and its application's end.
#[derive(Debug)]
pub(super) struct Visit {
    pub(super) at: At,
    /// What its source has shown of itself; `None` in plaintext.
    pub(super) proved: Option<Proved>,
    pub(super) reads: Reads,
    pub(super) app: ResetOnDrop,
    pub(super) _place: Admission,
}

/// Serves the requests of a connection until it ends, or may not go on.
pub(super) async fn serve(
    mut arriving: Arriving,
    visit: Visit,
    node: &Node,
    entry: &Entry,
) -> Result<(), Left> {
    let Visit { at, proved, reads, app, _place } = visit;
    let wait = if reads == Reads::Enforce { HEAD_TIMEOUT } else { DETECTION };
    let read = tokio::select! {
        first = arriving.first(wait) => is_read(first.map_err(|_| Failure::SourceReset)?, reads),
        refusal = revoked(node, &at, proved.as_ref(), entry, Content::Requests) => return Err(refusal.into()),
    };
    if !read {
        let content = Content::Bytes;
        let view = node.view()?;
        let allowed = may(&view, &at, proved.as_ref(), Stage::GoesOn, content)?;
        drop(view);
        entry.would_refuse(allowed.would_refuse);
        return tokio::select! {
            carried = carry(arriving, app) => Ok(carried?),
            refusal = seldom(revoked(node, &at, proved.as_ref(), entry, content)) => Err(refusal.into()),
        };
    }
    let ended = CancellationToken::new();
    let _ended = ended.clone().drop_guard();
    let (source, destination) = {
        let told = entry.told();
        (told.source.clone(), told.destination.clone())
    };
    let guest = Arc::new(Guest {
        node: node.clone(),
        source,
        destination,
        at,
        proved,
        application: Application::new(app),
        before: Arc::default(),
        upgraded: TaskTracker::new(),
        applications: TaskTracker::new(),
        ended,
        gone: Mutex::new(None),
    });
    tokio::select! {
        ended = visited(arriving, &guest) => ended,
        refusal = revoked(node, &guest.at, guest.proved.as_ref(), entry, Content::Requests) => Err(refusal.into()),
    }
}

/// Why the requests of a connection go on no more.
#[derive(Debug)]
pub(super) enum Left {
    /// As any connection may end.
    Stopped(Stop),
    /// Its application is gone, and took nothing of the last request.
    Untaken,
}

impl<S: Into<Stop>> From<S> for Left {
    fn from(stop: S) -> Self {
        Self::Stopped(stop.into())
    }
}

impl Left {
    /// The same, to whom that makes no difference.
    pub(super) fn stop(self) -> Stop {
        match self {
            Self::Stopped(stop) => stop,
            Self::Untaken => Failure::DestinationReset.into(),
        }
    }
}

/// Whether what begins so is read as HTTP. Where it need not be, only what certainly is; else all but TLS, of which nobody
/// could read anything.
fn is_read(first: &[u8], reads: Reads) -> bool {
    match reads {
        Reads::Enforce => first.first() != Some(&HANDSHAKE),
        Reads::No | Reads::Audit => is_http(first),
    }
}

/// A method, a space, and how a target begins; or the preface of HTTP/2 (RFC 9113, section 3.4), which is made to look so.
fn is_http(first: &[u8]) -> bool {
    let of_method = |byte: &u8| byte.is_ascii_uppercase() || matches!(byte, b'-' | b'_');
    let method = first.iter().take_while(|byte| of_method(byte)).count();
    method > 0 && matches!(first[method..], [b' ', b'/' | b'*' | b'h', ..])
}

/// Bytes that are no requests.
async fn carry(mut arriving: Arriving, app: ResetOnDrop) -> Result<(), Stop> {
    let mut app = Socket::from(app);
    match tokio::io::copy_bidirectional(&mut arriving, &mut app).await {
        Ok(_) => Ok(()),
        Err(_) => Err(Failure::DestinationReset.into()),
    }
}

/// Who asks, and who is asked.
#[derive(Debug)]
struct Guest {
    node: Node,
    source: Party,
    destination: Party,
    at: At,
    proved: Option<Proved>,
    application: Application,
    /// What its last request has counted.
    before: Arc<Before>,
    /// What goes on in another protocol.
    upgraded: TaskTracker,
    /// The application's connections.
    applications: TaskTracker,
    /// Cancelled when the connection must end.
    ended: CancellationToken,
    /// The application has not answered, and will not: why the connection ends.
    gone: Mutex<Option<Left>>,
}

impl Guest {
    fn ends(&self) -> Ends {
        Ends {
            recorder: self.node.inner.recorder.clone(),
            direction: Direction::Inbound,
            source: self.source.clone(),
            destination: self.destination.clone(),
            port: self.at.original.port(),
            before: self.before.clone(),
        }
    }
}

/// One request after another, or many at once; then the application's connections are ended as its client ended its own.
async fn visited(arriving: Arriving, guest: &Arc<Guest>) -> Result<(), Left> {
    let each = |request| {
        let guest = guest.clone();
        async move { Box::pin(answer(&guest, request)).await }
    };
    let mut ours = arriving.clone();
    let ended = converse(arriving, guest.node.drain(), each).await;
    if let Some(left) = guest.gone.lock().unwrap_or_else(PoisonError::into_inner).take() {
        return Err(left);
    }
    let wait = guest.node.limits().ready_wait;
    if ended.is_ok() {
        guest.upgraded.close();
        guest.upgraded.wait().await;
        // In order, if they can be; else with the guest.
        guest.application.close();
        guest.applications.close();
        let _ = tokio::time::timeout(wait, guest.applications.wait()).await;
    }
    if matches!(ended, Ok(()) | Err(Stop::Refused(_))) {
        // Our end is said, also after a 400. Fails for a source that is gone.
        let _ = tokio::time::timeout(wait, ours.shutdown()).await;
    }
    Ok(ended?)
}

/// The application is gone: its client is told as it would be without us.
#[derive(Debug, thiserror::Error)]
enum Gone {
    #[error("the application ended its connection before it answered: {0}")]
    Broke(Refusal),
    /// In HTTP/2, where a stream can end with that word (RFC 9113, section 8.7).
    #[error("the application took nothing: {0}")]
    Untaken(Box<Refusal>, #[source] h2::Error),
}

/// The story of a request.
async fn answer(guest: &Arc<Guest>, request: Request<Incoming>) -> Result<Response<Body>, Gone> {
    let mut exchange = Exchange::begin(guest.ends(), &request);
    let (form, many) = (heads::form(&request), request.version() == Version::HTTP_2);
    let told = match tell(guest, request, &mut exchange).await {
        Ok(answered) => Ok(answered),
        Err(Ended::Declined(declined)) => Err(declined),
        Err(Ended::Gone(unanswered)) => {
            let (gone, left) = match unanswered {
                Unanswered::Untaken(refusal) if many => {
                    (Gone::Untaken(refusal.into(), h2::Reason::REFUSED_STREAM.into()), None)
                }
                Unanswered::Untaken(refusal) => (Gone::Broke(refusal), Some(Left::Untaken)),
                Unanswered::Broke(refusal) => (Gone::Broke(refusal), Some(Failure::DestinationReset.into())),
            };
            exchange.refused(gone.refusal().clone());
            if let Some(left) = left {
                *guest.gone.lock().unwrap_or_else(PoisonError::into_inner) = Some(left);
            }
            return Err(gone);
        }
    };
    Ok(respond(told, form, exchange))
}

impl Gone {
    fn refusal(&self) -> &Refusal {
        match self {
            Self::Broke(refusal) => refusal,
            Self::Untaken(refusal, _) => refusal,
        }
    }
}

/// Why a request is not answered by the application.
enum Ended {
    /// It was not asked.
    Declined(Declined),
    /// It did not answer.
    Gone(Unanswered),
}

/// Why the application does not answer.
enum Unanswered {
    /// It certainly took nothing.
    Untaken(Refusal),
    /// It may have.
    Broke(Refusal),
}

impl From<Declined> for Ended {
    fn from(declined: Declined) -> Self {
        Self::Declined(declined)
    }
}

async fn tell(
    guest: &Arc<Guest>,
    mut request: Request<Incoming>,
    exchange: &mut Exchange,
) -> Result<Answered, Ended> {
    heads::check(&request).map_err(|refusal| Declined::new(StatusCode::BAD_REQUEST, refusal))?;
    websocket::take_in(&mut request)?;
    let extended = websocket::is_extended(&request);

    // Whose is it, and may it?
    let unready = |reason: Reason| Declined::new(StatusCode::SERVICE_UNAVAILABLE, reason);
    let view = guest.node.view().map_err(unready)?;
    exchange.decided(view.shared_version());
    let port = guest.at.original.port();
    let limits = view.intake(&guest.at.workload.name).filter(|it| it.ports.contains_key(&port)).cloned();
    // As it came, with the token that may be taken away of it; said to those alone who may ask.
    let measured = limits.as_ref().map_or(Ok(()), |limits| {
        let asked = Asked { method: request.method(), uri: request.uri(), headers: request.headers() };
        intake::measure(limits, port, &asked)
    });
    let (user, no_user) = authentication::user(&view, &guest.at, &mut request)?;
    {
        let asked = Asked { method: request.method(), uri: request.uri(), headers: request.headers() };
        let reading = Reading::of(&asked).of_user(user.claims.as_ref());
        let may = may(&view, &guest.at, guest.proved.as_ref(), Stage::GoesOn, Content::Request(&reading));
        let Allowed { rule, would_refuse } =
            may.map_err(|refusal| Declined::new(StatusCode::FORBIDDEN, refusal))?;
        exchange.allowed(rule, no_user.or(would_refuse));
    }
    measured.map_err(intake::larger)?;

    // To the application, with who asks.
    let upgrade =
        heads::wants_upgrade(&request).then(|| request.headers().get(header::UPGRADE).cloned()).flatten();
    let from_client = upgrade.is_some().then(|| hyper::upgrade::on(&mut request));
    heads::take_hop(request.headers_mut(), upgrade);
    // What a client says to be of its connection alone is none of what we say.
    user.tell(request.headers_mut());
    if let Some(limits) = &limits {
        // As the application sees it: nobody is somebody else by a header that is taken away.
        let asked = Asked { method: request.method(), uri: request.uri(), headers: request.headers() };
        let reading = Reading::of(&asked).of_user(user.claims.as_ref());
        let source = guest.proved.as_ref().map(|it| &it.identity);
        let metrics = &guest.node.inner.connector.metrics;
        intake::count(limits, &guest.at, source, (asked.headers, &reading), metrics)?;
    }
    exchange.goes_on(request.headers_mut());
    request.headers_mut().remove(CLIENT_CERT);
    if let Some(proved) = &guest.proved {
        let own = view.identity(&guest.at.workload.name).map(ToString::to_string).unwrap_or_default();
        // Identities are of letters, digits and signs that headers may have.
        if let Ok(value) = HeaderValue::try_from(format!("By={own};URI={}", proved.identity)) {
            request.headers_mut().insert(CLIENT_CERT, value);
        }
    }
    drop(view);
    let most = limits.and_then(|it| it.ports.get(&port)?.sizes.body);
    let measured = most.map(|most| (most, exchange.is_measured()));
    let request = request.map(|body| match &measured {
        Some((most, longer)) => Body::measured(body, *most, longer),
        None => Body::Carried(body),
    });
    let response = match guest.application.send(guest, request).await {
        Ok(response) => response,
        Err(_) if measured.as_ref().is_some_and(|(_, longer)| longer.is()) => {
            return Err(intake::longer().into());
        }
        Err(unanswered) => return Err(Ended::Gone(unanswered)),
    };

    // And back.
    let (mut parts, incoming) = response.into_parts();
    if websocket::goes_over(&parts, extended)? {
        return Ok(switched((&guest.upgraded, &guest.ended), parts, from_client, ())?);
    }
    heads::take_hop(&mut parts.headers, None);
    Ok(Answered::Backend(parts, incoming.into(), None))
}

/// The application's end: one connection at a time, as its client has one.
#[derive(Debug)]
struct Application {
    /// Connected before the first request was there.
    first: Mutex<Option<ResetOnDrop>>,
    /// What requests are sent on. Asynchronous: it is held while a connection is opened, and while one of HTTP/1.1 waits
    /// for its answer.
    sender: tokio::sync::Mutex<Option<Sender>>,
}

#[derive(Debug)]
enum Sender {
    One(http1::SendRequest<Body>, Owed),
    Many(http2::SendRequest<Body>, Takes),
}

impl Application {
    fn new(app: ResetOnDrop) -> Self {
        Self { first: Mutex::new(Some(app)), sender: tokio::sync::Mutex::new(None) }
    }

    /// Nothing is asked any more.
    fn close(&self) {
        if let Ok(mut sender) = self.sender.try_lock() {
            *sender = None;
        }
    }

    /// Sends a request, and waits for the head of its answer. One that was certainly not taken, since the application has
    /// closed an idle connection, is sent on another.
    async fn send(
        &self,
        guest: &Guest,
        mut request: Request<Body>,
    ) -> Result<Response<Incoming>, Unanswered> {
        let many = request.version() == Version::HTTP_2;
        let extended = websocket::is_extended(&request);
        loop {
            let mut place = self.sender.lock().await;
            let kept = match place.take() {
                Some(Sender::One(mut one, owed)) => {
                    one.ready().await.is_ok().then_some(Sender::One(one, owed))
                }
                Some(Sender::Many(many, takes)) => (!many.is_closed()).then_some(Sender::Many(many, takes)),
                None => None,
            };
            let (sender, fresh) = match kept {
                Some(sender) => (sender, false),
                None => (self.open(guest, many).await.map_err(Unanswered::Untaken)?, true),
            };
            let mut error = match sender {
                Sender::One(mut one, owed) => {
                    owed.ask();
                    match one.try_send_request(request).await {
                        Ok(response) => {
                            *place = Some(Sender::One(one, owed));
                            return Ok(response);
                        }
                        Err(error) => error,
                    }
                }
                Sender::Many(mut many, takes) => {
                    *place = Some(Sender::Many(many.clone(), takes.clone()));
                    drop(place);
                    let mut way = Way::Stream;
                    if extended {
                        if !takes.websockets().await {
                            return self.beside(guest, request).await;
                        }
                        way = websocket::as_stream(&mut request);
                    }
                    match many.try_send_request(request).await {
                        Ok(mut response) => {
                            if extended {
                                websocket::answered(&mut response, &way);
                            }
                            return Ok(response);
                        }
                        Err(error) => error,
                    }
                }
            };
            let untaken = match error.take_message() {
                Some(unsent) if !fresh => {
                    request = unsent;
                    continue;
                }
                unsent => unsent.is_some(),
            };
            let error = error.into_error();
            let refusal = Refusal::new(Reason::BackendReset, error.to_string());
            return Err(match untaken || upstream::is_declined(&error) {
                true => Unanswered::Untaken(refusal),
                false => Unanswered::Broke(refusal),
            });
        }
    }

    /// Asks for a WebSocket by a connection of its own, as the application does not take it beside other requests.
    async fn beside(
        &self,
        guest: &Guest,
        mut request: Request<Body>,
    ) -> Result<Response<Incoming>, Unanswered> {
        let way = websocket::as_upgrade(&mut request, rand::random());
        let app = guest.connect().await.map_err(Unanswered::Untaken)?;
        let spoken = upstream::http1().handshake(TokioIo::new(Socket::from(app))).await;
        let (mut sender, connection) = spoken.map_err(|error| Unanswered::Untaken(unspoken(error)))?;
        guest.drive(connection.with_upgrades());
        let sent = sender.send_request(request).await;
        let mut response = sent.map_err(|error| Unanswered::Broke(unspoken(error)))?;
        websocket::answered(&mut response, &way);
        Ok(response)
    }

    async fn open(&self, guest: &Guest, many: bool) -> Result<Sender, Refusal> {
        let first = self.first.lock().unwrap_or_else(PoisonError::into_inner).take();
        let app = match first {
            Some(app) => app,
            None => guest.connect().await?,
        };
        if many {
            let (stream, taken_in) = FirstFrame::of(Socket::from(app));
            let within = Within::default();
            let builder = upstream::http2(within.clone());
            let (sender, connection) = builder.handshake(TokioIo::new(stream)).await.map_err(unspoken)?;
            let (connection, takes) = settings::told(connection, taken_in, |_| {});
            guest.drive(within.run(connection));
            return Ok(Sender::Many(sender, takes));
        }
        let stream = Upstream::to_application(app);
        let owed = stream.owed();
        let spoken = upstream::http1().handshake(TokioIo::new(stream)).await;
        let (sender, connection) = spoken.map_err(unspoken)?;
        guest.drive(connection.with_upgrades());
        Ok(Sender::One(sender, owed))
    }
}

impl Guest {
    /// A connection to the application.
    async fn connect(&self) -> Result<ResetOnDrop, Refusal> {
        let client = self.proved.as_ref().map_or(self.at.from.ip(), |it| it.open.source.ip());
        let At { workload, original, .. } = &self.at;
        let timeout = self.node.limits().dial_timeout;
        let stream = connect::application(&workload.namespace, client, *original, timeout).await?;
        Ok(ResetOnDrop::new(stream))
    }

    /// Runs a connection of the application's until it ends, or its client's has.
    fn drive(&self, connection: impl Future<Output = Result<(), hyper::Error>> + Send + 'static) {
        let ended = self.ended.clone();
        self.applications.spawn(async move {
            tokio::select! {
                result = connection => if let Err(error) = result {
                    tracing::debug!(%error, "a connection to an application ended");
                },
                () = ended.cancelled() => {}
            }
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_http_is_told_by_its_first_bytes() {
        for (first, expected) in [
            (&b"GET / HTTP/1.1\r\n"[..], true),
            (b"GE", false),
            (b"GET ", false),
            (b"OPTIONS * HTTP/1.1", true),
            (b"M-SEARCH * HTTP/1.1", true),
            (b"GET http://a/ HTTP/1.1", true),
            (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", true),
            (b"", false),
            (b"get /", false),
            (b"EHLO mail", false),
            (b"SELECT 1", false),
            (b"\x16\x03\x01", false),
            (b"\0\0\0\x08", false),
        ] {
            assert_eq!(is_http(first), expected, "{}", String::from_utf8_lossy(first));
            assert_eq!(is_read(first, Reads::Audit), expected);
            assert_eq!(is_read(first, Reads::Enforce), first.first() != Some(&22));
        }
    }
}
