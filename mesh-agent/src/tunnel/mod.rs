//! Tunnels: authenticated connections between two agents, each carrying one application connection at a time.
//!
//! | file | what |
//! |---|---|
//! | `buffers` | memory that connections borrow while bytes pass, and give back when idle |
//! | `handshake` | the TLS handshake, by rustls |
//! | `records` | TLS records after it, sealed and opened in place |
//! | `tls` | records over one TCP socket, both directions at once |
//! | `incoming` | decrypted bytes cut into frames |
//! | `link` | one tunnel: TLS, frames, the peer's identity |
//! | `lease` | OPEN, ACCEPT and REFUSE; the end of a lease until READY |
//! | `pool` | idle tunnels, by (source, destination) |
//!
//! A tunnel is never shared by two connections, so a stalled application holds up nobody else; READY says that
//! everything of the last one was delivered, so the next one does not queue behind it either.

pub(crate) mod buffers;
mod handshake;
mod incoming;
pub(crate) mod lease;
mod link;
pub(crate) mod pool;
mod records;
mod tls;

pub(crate) use incoming::{Event, Incoming};
pub(crate) use link::{Link, Unverified};
pub(crate) use tls::{LinkError, Tls, read_some, read_some_into};
