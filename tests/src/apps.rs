//! Applications that know nothing of a mesh: what workloads run in tests and in the demo.

use std::{
    fmt,
    io::{self, BufRead, BufReader, Read, Write},
    net::{Shutdown, SocketAddr, TcpListener, TcpStream},
    sync::{Arc, Mutex, PoisonError},
    thread::{self, JoinHandle},
    time::Duration,
};

use anyhow::Result;
use sha2::{Digest, Sha256};
use socket2::SockRef;

/// What a server does with one connection.
pub type Handler = Arc<dyn Fn(TcpStream) -> io::Result<()> + Send + Sync>;

/// A server, a thread per connection, stopped on drop.
pub struct Server {
    listeners: Vec<Arc<TcpListener>>,
    accepting: Vec<JoinHandle<()>>,
    peers: Arc<Mutex<Vec<SocketAddr>>>,
}

impl fmt::Debug for Server {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Server").field("listeners", &self.listeners).finish_non_exhaustive()
    }
}

impl Server {
    /// Accepts on all listeners.
    pub fn start(listeners: Vec<TcpListener>, handler: Handler) -> Result<Self> {
        let listeners: Vec<_> = listeners.into_iter().map(Arc::new).collect();
        let peers = Arc::new(Mutex::new(vec![]));
        let mut accepting = vec![];
        for listener in &listeners {
            let (listener, handler, peers) = (listener.clone(), handler.clone(), peers.clone());
            let accept = move || accept_loop(&listener, &handler, &peers);
            accepting.push(thread::Builder::new().name("server".into()).spawn(accept)?);
        }
        Ok(Self { listeners, accepting, peers })
    }

    /// Whom the application saw: the peer address of every connection so far, in order.
    pub fn peers(&self) -> Vec<SocketAddr> {
        self.peers.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        for listener in &self.listeners {
            // Ends `accept` with an error (Linux); cannot fail for a listening socket.
            let _ = SockRef::from(listener.as_ref()).shutdown(Shutdown::Both);
        }
        for thread in self.accepting.drain(..) {
            let _ = thread.join();
        }
    }
}

fn accept_loop(listener: &TcpListener, handler: &Handler, peers: &Mutex<Vec<SocketAddr>>) {
    while let Ok((stream, peer)) = listener.accept() {
        peers.lock().unwrap_or_else(PoisonError::into_inner).push(peer);
        let handler = handler.clone();
        // A connection that fails is the client's to notice; the tests look at both ends.
        let serve = move || drop(handler(stream));
        if thread::Builder::new().name("connection".into()).stack_size(128 * 1024).spawn(serve).is_err() {
            return;
        }
    }
}

/// Sends back what it receives, and ends when the client ends.
pub fn echo() -> Handler {
    Arc::new(|mut stream| {
        let mut buffer = vec![0; 16 * 1024];
        loop {
            match stream.read(&mut buffer)? {
                0 => return stream.shutdown(Shutdown::Write),
                n => stream.write_all(&buffer[..n])?,
            }
        }
    })
}

/// Answers one HTTP request with `NAME saw PEER`.
pub fn http(name: &str) -> Handler {
    let name = name.to_owned();
    Arc::new(move |stream| {
        let peer = stream.peer_addr()?;
        let mut lines = BufReader::new(stream.try_clone()?);
        let mut line = String::new();
        while lines.read_line(&mut line)? > 2 {
            line.clear();
        }
        let body = format!("{name} saw {}\n", peer.ip());
        let length = body.len();
        // In one piece, so that a capture of plaintext has the text in one segment.
        let head = format!("HTTP/1.1 200 OK\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n");
        (&stream).write_all((head + &body).as_bytes())
    })
}

/// Speaks first, as SMTP and MySQL do, then says back one line.
pub fn greeter(greeting: &str) -> Handler {
    let greeting = greeting.to_owned();
    Arc::new(move |mut stream| {
        stream.write_all(greeting.as_bytes())?;
        let mut line = String::new();
        BufReader::new(stream.try_clone()?).read_line(&mut line)?;
        stream.write_all(format!("you said: {line}").as_bytes())
    })
}

/// Says its name and ends; for balancing.
pub fn namer(name: &str) -> Handler {
    let name = name.to_owned();
    Arc::new(move |mut stream| stream.write_all(name.as_bytes()))
}

/// Reads to the end, then answers with the SHA-256 of what it read.
pub fn hasher() -> Handler {
    Arc::new(|mut stream| {
        let sum = hash(&mut stream)?;
        stream.write_all(&sum)
    })
}

/// Sends `length` bytes of [`noise`] and ends.
pub fn source(length: usize) -> Handler {
    Arc::new(move |mut stream| {
        stream.write_all(&noise(length))?;
        stream.shutdown(Shutdown::Write)
    })
}

/// Accepts and is silent until the client ends.
pub fn silent() -> Handler {
    Arc::new(|mut stream| {
        stream.set_read_timeout(Some(Duration::from_secs(300)))?;
        io::copy(&mut stream, &mut io::sink()).map(drop)
    })
}

/// The SHA-256 of everything up to the end.
pub fn hash(stream: &mut impl Read) -> io::Result<[u8; 32]> {
    let mut sum = Sha256::new();
    let mut buffer = vec![0; 64 * 1024];
    loop {
        match stream.read(&mut buffer)? {
            0 => return Ok(sum.finalize().into()),
            n => sum.update(&buffer[..n]),
        }
    }
}

/// Bytes without a pattern, the same for the same length: xorshift64, so that a shifted or repeated block shows.
pub fn noise(length: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut bytes = Vec::with_capacity(length + 8);
    while bytes.len() < length {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend_from_slice(&state.to_le_bytes());
    }
    bytes.truncate(length);
    bytes
}
