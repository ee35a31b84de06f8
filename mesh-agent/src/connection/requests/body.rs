//! The bodies of requests and answers: carried as they come, a frame at a time, and never gathered, but for small ones of
//! requests that may have to be sent more than once, and of their answers.

use std::{
    future::poll_fn,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll, ready},
};

use bytes::{Bytes, BytesMut};
use http::{HeaderMap, StatusCode};
use http_body_util::{BodyExt, Limited};
use hyper::body::{Body as HttpBody, Frame, Incoming, SizeHint};

use super::{attempt::has_failed, exchange::Exchange, upstream::Used};

/// Most bytes of a request that are kept to be sent again, and of an answer that are kept until all of it is there: 64 KiB.
const MOST_KEPT: u64 = 64 * 1024;

/// A body that is sent.
#[derive(Debug)]
pub(in crate::connection) enum Body {
    /// As it comes from the other side.
    Carried(Incoming),
    /// The same, whose end somebody waits for: it shares this until then.
    Sending(Incoming, #[allow(dead_code, reason = "it goes with the body")] Arc<()>),
    /// As it comes, as long as it is not longer than it may be.
    Measured(Measured),
    /// This, then the end.
    Whole(Option<Bytes>),
    /// An answer's, with what has to be told when it ends.
    Answer(Box<Answer>),
}

/// A body that is broken off if it is longer than it may be.
#[derive(Debug)]
pub(in crate::connection) struct Measured {
    body: Incoming,
    left: u64,
    longer: Longer,
}

/// Whether a body was longer than it may be, for whoever has to tell.
#[derive(Debug, Clone, Default)]
pub(in crate::connection) struct Longer(Arc<AtomicBool>);

impl Longer {
    pub(in crate::connection) fn is(&self) -> bool {
        self.0.load(Ordering::Acquire)
    }
}

/// Why a body ends before its end.
#[derive(Debug, thiserror::Error)]
pub(in crate::connection) enum Broken {
    /// Whoever sends it has broken it off.
    #[error(transparent)]
    Off(#[from] hyper::Error),
    /// We have.
    #[error("the body is longer than it may be")]
    Longer,
}

impl Measured {
    fn poll_frame(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Broken>>> {
        let frame = ready!(Pin::new(&mut self.body).poll_frame(cx));
        if let Some(Ok(frame)) = &frame {
            let came = frame.data_ref().map_or(0, |data| data.len() as u64);
            match self.left.checked_sub(came) {
                Some(left) => self.left = left,
                None => {
                    self.longer.0.store(true, Ordering::Release);
                    return Poll::Ready(Some(Err(Broken::Longer)));
                }
            }
        }
        Poll::Ready(frame.map(|frame| frame.map_err(Broken::Off)))
    }
}

/// The body of an answer that is on its way to us, of which something may be here.
#[derive(Debug)]
pub(in crate::connection) struct Coming {
    rest: Incoming,
    /// What has come first; as a rule that is all of it.
    first: Option<Bytes>,
    /// What has come since.
    more: BytesMut,
}

impl From<Incoming> for Coming {
    fn from(rest: Incoming) -> Self {
        Self { rest, first: None, more: BytesMut::new() }
    }
}

impl Coming {
    /// Whether all of it can be kept: its head has said how long it is.
    pub(super) fn is_short(&self) -> bool {
        self.rest.size_hint().exact().is_some_and(|len| (1..=MOST_KEPT).contains(&len))
    }

    /// Waits until all of a short one is here. Cancel-safe: what has come is still to be read.
    pub(super) async fn gather(&mut self, by: &mut Used) -> Result<(), hyper::Error> {
        while self.is_short() {
            let Self { rest, .. } = self;
            let frame = poll_fn(|cx| by.poll(cx, |cx| Pin::new(&mut *rest).poll_frame(cx))).await;
            // hyper says neither that it ends nor its trailers before it is as long as its head has said.
            let Some(Ok(data)) = frame.transpose()?.map(Frame::into_data) else { break };
            match &self.first {
                None => self.first = Some(data),
                Some(_) => self.more.extend_from_slice(&data),
            }
        }
        Ok(())
    }

    /// Bytes that are here.
    fn here(&self) -> u64 {
        (self.first.as_ref().map_or(0, Bytes::len) + self.more.len()) as u64
    }
}

impl HttpBody for Coming {
    type Data = Bytes;
    type Error = hyper::Error;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, hyper::Error>>> {
        let Self { rest, first, more } = self.get_mut();
        let here = first.take().or_else(|| (!more.is_empty()).then(|| std::mem::take(more).freeze()));
        match here {
            Some(data) => Poll::Ready(Some(Ok(Frame::data(data)))),
            None => Pin::new(rest).poll_frame(cx),
        }
    }

    fn is_end_stream(&self) -> bool {
        self.here() == 0 && self.rest.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        let (rest, here) = (self.rest.size_hint(), self.here());
        let mut hint = SizeHint::new();
        hint.set_lower(rest.lower() + here);
        if let Some(upper) = rest.upper() {
            hint.set_upper(upper + here);
        }
        hint
    }
}

/// The body of a backend's answer.
#[derive(Debug)]
pub(in crate::connection) struct Answer {
    body: Coming,
    used: Option<Used>,
    exchange: Exchange,
    /// That it was broken off, which is said after what came before has been sent.
    broken: Option<hyper::Error>,
}

impl Body {
    pub(super) const fn empty() -> Self {
        Self::Whole(None)
    }

    /// As it comes, and no more than so many bytes of it.
    pub(in crate::connection) fn measured(body: Incoming, most: u64, longer: &Longer) -> Self {
        Self::Measured(Measured { body, left: most, longer: longer.clone() })
    }

    /// Whether all of it is there.
    pub(super) fn is_whole(&self) -> bool {
        matches!(self, Self::Whole(_))
    }

    /// The same, that shares this until it has been sent, if that takes time.
    pub(super) fn sending(self, until: &Arc<()>) -> Self {
        match self {
            Self::Carried(body) => Self::Sending(body, until.clone()),
            other => other,
        }
    }

    /// An answer's. Once it has ended, the connection that it came by, if it was one of many, can be used again.
    pub(super) fn answer(body: Coming, used: Option<Used>, exchange: Exchange) -> Self {
        let mut answer = Answer { body, used, exchange, broken: None };
        if answer.body.is_end_stream() {
            answer.ended();
        }
        Self::Answer(Box::new(answer))
    }
}

impl Answer {
    fn poll_frame(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Broken>>> {
        if let Some(error) = self.broken.take() {
            return Poll::Ready(Some(Err(Broken::Off(error))));
        }
        let Self { body, used, .. } = self;
        let frame = ready!(match used {
            Some(used) => used.poll(cx, |cx| Pin::new(&mut *body).poll_frame(cx)),
            None => Pin::new(body).poll_frame(cx),
        });
        match frame {
            Some(Ok(frame)) => {
                self.take_in(&frame);
                if self.body.is_end_stream() {
                    self.ended();
                }
                Poll::Ready(Some(Ok(frame)))
            }
            // The endpoint broke it off: an error of the client's is none of this body's. hyper drops what it has not sent yet when
            // it hears of it, and sends before it asks once more.
            Some(Err(error)) => {
                self.used.iter().for_each(|used| used.ended(true));
                self.broken = Some(error);
                cx.waker().wake_by_ref();
                Poll::Pending
            }
            None => {
                self.ended();
                Poll::Ready(None)
            }
        }
    }

    fn ended(&mut self) {
        if let Some(used) = self.used.take() {
            used.give_back();
        }
        self.exchange.complete();
    }

    fn take_in(&mut self, frame: &Frame<Bytes>) {
        if let Some(data) = frame.data_ref() {
            self.exchange.received(data.len());
        }
        if let Some(trailers) = frame.trailers_ref() {
            if let (Some(status), Some(used)) = (grpc_status(trailers), &self.used) {
                used.ended(has_failed(StatusCode::OK, Some(status)));
            }
            self.exchange.trailers(trailers);
        }
    }
}

impl HttpBody for Body {
    type Data = Bytes;
    type Error = Broken;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Broken>>> {
        match self.get_mut() {
            Self::Carried(body) | Self::Sending(body, _) => {
                Pin::new(body).poll_frame(cx).map_err(Broken::Off)
            }
            Self::Measured(measured) => measured.poll_frame(cx),
            Self::Whole(bytes) => Poll::Ready(bytes.take().map(|bytes| Ok(Frame::data(bytes)))),
            Self::Answer(answer) => answer.poll_frame(cx),
        }
    }

    fn is_end_stream(&self) -> bool {
        match self {
            Self::Carried(body) | Self::Sending(body, _) => body.is_end_stream(),
            Self::Measured(measured) => measured.body.is_end_stream(),
            Self::Whole(bytes) => bytes.is_none(),
            Self::Answer(answer) => answer.body.is_end_stream(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            Self::Carried(body) | Self::Sending(body, _) => body.size_hint(),
            Self::Measured(measured) => measured.body.size_hint(),
            Self::Whole(bytes) => SizeHint::with_exact(bytes.as_ref().map_or(0, |bytes| bytes.len() as u64)),
            Self::Answer(answer) => answer.body.size_hint(),
        }
    }
}

/// A request's body before it is sent.
#[derive(Debug)]
pub(super) enum Asking {
    /// It can be sent as often as need be.
    Kept(Option<Bytes>),
    /// It can be sent once.
    Once(Incoming),
    /// It was.
    Sent,
}

impl Asking {
    /// Keeps a small body. One whose length nobody says is not waited for: it may be one side of a conversation.
    pub(super) async fn of(body: Incoming) -> Result<Self, hyper::Error> {
        if body.is_end_stream() {
            return Ok(Self::Kept(None));
        }
        match body.size_hint().exact() {
            Some(len) if len <= MOST_KEPT => {
                let limited = Limited::new(body, MOST_KEPT as usize).collect().await;
                // It cannot be longer than its head says: hyper ends it there.
                let whole = limited.map_err(|error| match error.downcast::<hyper::Error>() {
                    Ok(error) => Some(*error),
                    Err(_) => None,
                });
                match whole {
                    Ok(whole) => Ok(Self::Kept(Some(whole.to_bytes()))),
                    Err(Some(error)) => Err(error),
                    Err(None) => Ok(Self::Sent),
                }
            }
            _ => Ok(Self::Once(body)),
        }
    }

    /// Whether it can be sent again.
    pub(super) fn is_kept(&self) -> bool {
        matches!(self, Self::Kept(_))
    }

    /// Whether it can be sent still.
    pub(super) fn is_left(&self) -> bool {
        matches!(self, Self::Kept(_) | Self::Once(_))
    }

    /// The body to send now; `None` if it was sent and not kept.
    pub(super) fn next(&mut self) -> Option<Body> {
        match self {
            Self::Kept(bytes) => Some(Body::Whole(bytes.clone())),
            Self::Once(_) => match std::mem::replace(self, Self::Sent) {
                Self::Once(body) => Some(Body::Carried(body)),
                Self::Kept(_) | Self::Sent => None,
            },
            Self::Sent => None,
        }
    }

    /// A request came back that was never sent: its body can be sent still.
    pub(super) fn put_back(&mut self, body: Option<Body>) {
        if let (Self::Sent, Some(Body::Carried(body) | Body::Sending(body, _))) = (&*self, body) {
            *self = Self::Once(body);
        }
    }
}

/// The status of a call, where its answer says it (gRPC over HTTP/2, "Responses").
pub(super) fn grpc_status(headers: &HeaderMap) -> Option<u16> {
    headers.get("grpc-status")?.to_str().ok()?.parse().ok()
}
