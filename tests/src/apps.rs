//! Applications that know nothing of a mesh: what workloads run in tests and in the demo.

use std::{
    fmt,
    io::{self, BufRead, BufReader, Read, Write},
    net::{Shutdown, SocketAddr, TcpListener, TcpStream, UdpSocket},
    sync::{Arc, Mutex, PoisonError},
    thread::{self, JoinHandle},
    time::Duration,
};

use anyhow::Result;
use sha2::{Digest, Sha256};
use socket2::SockRef;

/// What an echo says before it ends: whoever hears it goes elsewhere.
pub const BYE: &[u8] = b"bye\n";

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

/// Answers one question of DNS over TCP (RFC 1035 §4.2.2: two bytes of length before each message).
pub fn dns() -> Handler {
    Arc::new(|mut stream| {
        let mut length = [0; 2];
        stream.read_exact(&mut length)?;
        let mut question = vec![0; usize::from(u16::from_be_bytes(length))];
        stream.read_exact(&mut question)?;
        let answer = dns_answer(&question);
        let length = (answer.len() as u16).to_be_bytes();
        stream.write_all(&[&length[..], &answer].concat())
    })
}

/// The same over UDP, one question after the other, until the process ends.
pub fn dns_over_udp(socket: UdpSocket) -> Result<()> {
    let answer = move || {
        let mut question = [0; 512];
        while let Ok((length, peer)) = socket.recv_from(&mut question) {
            // A client that is gone asks again, or not.
            let _ = socket.send_to(&dns_answer(&question[..length]), peer);
        }
    };
    thread::Builder::new().name("dns".into()).spawn(answer)?;
    Ok(())
}

/// A question for the IPv4 address of a name.
pub fn dns_question(name: &str) -> Vec<u8> {
    let mut question = vec![0x4e, 0x4d, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0];
    for label in name.split('.') {
        question.push(label.len() as u8);
        question.extend(label.as_bytes());
    }
    question.extend([0, 0, 1, 0, 1]);
    question
}

/// The question again, as an answer, with [`DNS_ADDRESS`].
fn dns_answer(question: &[u8]) -> Vec<u8> {
    let mut answer = question.to_vec();
    if answer.len() >= 12 {
        (answer[2], answer[3], answer[7]) = (0x81, 0x80, 1);
    }
    // A pointer to the question's name, type A, class IN, a minute, four bytes.
    answer.extend([0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 60, 0, 4]);
    answer.extend(DNS_ADDRESS);
    answer
}

/// The address of every name.
pub const DNS_ADDRESS: [u8; 4] = [192, 0, 2, 7];

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
