//! What the control side takes from outside of its process: the time, chance, and the way to the controller.
//!
//! Stands apart so that a simulation can bring its own of all three, and a test a clock that is wrong. Everything else
//! of the control side follows from these and from its files.

use std::{fmt, io, pin::Pin, sync::Arc, time::Duration};

use rustls::time_provider::TimeProvider;
use rustls_pki_types::UnixTime;
use time::OffsetDateTime;
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::TcpStream,
};

/// Idle time after which TCP probes: for connections that HTTP/2's own probes do not cover yet.
const TCP_KEEPALIVE: Duration = Duration::from_secs(10);

/// The wall clock, by which certificates are valid. Durations are measured by tokio's clock, which nobody sets.
#[derive(Clone)]
pub struct Clock(Arc<dyn Fn() -> OffsetDateTime + Send + Sync>);

impl Clock {
    /// A clock that says what `now` says.
    pub fn new(now: impl Fn() -> OffsetDateTime + Send + Sync + 'static) -> Self {
        Self(Arc::new(now))
    }

    /// What time it is.
    pub fn now(&self) -> OffsetDateTime {
        (self.0)()
    }
}

impl Default for Clock {
    fn default() -> Self {
        Self::new(OffsetDateTime::now_utc)
    }
}

impl fmt::Debug for Clock {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Clock")
    }
}

impl TimeProvider for Clock {
    fn current_time(&self) -> Option<UnixTime> {
        let seconds = u64::try_from(self.now().unix_timestamp()).ok()?;
        Some(UnixTime::since_unix_epoch(Duration::from_secs(seconds)))
    }
}

/// Numbers that nobody can foresee, in 0..1: they spread out what many agents do.
#[derive(Clone)]
pub struct Chance(Arc<dyn Fn() -> f64 + Send + Sync>);

impl Chance {
    /// Chance that says what `draw` says.
    pub fn new(draw: impl Fn() -> f64 + Send + Sync + 'static) -> Self {
        Self(Arc::new(draw))
    }

    /// The next number.
    pub fn draw(&self) -> f64 {
        (self.0)()
    }
}

impl Default for Chance {
    fn default() -> Self {
        Self::new(rand::random)
    }
}

impl fmt::Debug for Chance {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Chance")
    }
}

/// A connection, of TCP or simulated.
pub trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Stream for T {}

/// A connection that is being made.
pub type Dialling = Pin<Box<dyn Future<Output = io::Result<Box<dyn Stream>>> + Send>>;

/// Makes connections to a host, by name or address, and a port.
#[derive(Clone)]
pub struct Dial(Arc<dyn Fn(String, u16) -> Dialling + Send + Sync>);

impl Dial {
    /// Connections as `dial` makes them.
    pub fn new(dial: impl Fn(String, u16) -> Dialling + Send + Sync + 'static) -> Self {
        Self(Arc::new(dial))
    }

    /// Connects. There is no limit of time: the caller has one.
    pub fn connect(&self, host: &str, port: u16) -> Dialling {
        (self.0)(host.to_owned(), port)
    }
}

impl Default for Dial {
    fn default() -> Self {
        Self::new(|host, port| {
            Box::pin(async move {
                let stream = TcpStream::connect((host.as_str(), port)).await?;
                stream.set_nodelay(true)?;
                let keepalive =
                    socket2::TcpKeepalive::new().with_time(TCP_KEEPALIVE).with_interval(TCP_KEEPALIVE);
                socket2::SockRef::from(&stream).set_tcp_keepalive(&keepalive)?;
                Ok(Box::new(stream) as Box<dyn Stream>)
            })
        })
    }
}

impl fmt::Debug for Dial {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Dial")
    }
}

/// All of it; `Default` is the machine's.
#[derive(Debug, Clone, Default)]
pub struct Surroundings {
    /// The time.
    pub clock: Clock,
    /// Chance.
    pub chance: Chance,
    /// The way to the controller.
    pub dial: Dial,
}
