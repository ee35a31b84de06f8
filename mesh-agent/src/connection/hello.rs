//! Waits for the beginning of TLS between a client and the server that it asks for. What was read is kept, and goes on to the
//! server as it came: nothing is decrypted, and nothing is answered.

use std::{io, time::Duration};

use mesh_core::refusal::Reason;
use tokio::net::TcpStream;

use super::server_name::Listening;
use crate::{
    connect::MAX_FIRST,
    refusal::{Failure, Refusal, Stop},
};

/// Bytes that are read at a time: more than a ClientHello has as a rule.
const CHUNK: usize = 4096;

/// What a client said first.
#[derive(Debug)]
pub(super) struct Hello {
    /// The name that it asks for, if it does.
    pub(super) name: Option<String>,
    /// All that was read of it, [`MAX_FIRST`] at most.
    pub(super) bytes: Vec<u8>,
}

/// Reads a client's hello, for this long at most.
pub(super) async fn read(stream: &TcpStream, limit: Duration) -> Result<Hello, Stop> {
    match tokio::time::timeout(limit, listen(stream)).await {
        Ok(heard) => heard,
        Err(_) => Err(Refusal::new(Reason::HelloTimeout, format!("within {limit:?}")).into()),
    }
}

async fn listen(stream: &TcpStream) -> Result<Hello, Stop> {
    let mut listening = Listening::to(MAX_FIRST);
    let mut chunk = [0; CHUNK];
    loop {
        stream.readable().await.map_err(|_| Failure::SourceReset)?;
        let heard = match stream.try_read(&mut chunk[..CHUNK.min(listening.room())]) {
            Ok(0) => Err(listening.end()),
            Ok(n) => listening.hear(&chunk[..n]),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(None),
            Err(_) => return Err(Failure::SourceReset.into()),
        };
        match heard {
            Ok(None) => {}
            Ok(Some(name)) => return Ok(Hello { name, bytes: listening.into_bytes() }),
            Err(no) => return Err(Refusal::new(Reason::BadHello, no.to_string()).into()),
        }
    }
}
