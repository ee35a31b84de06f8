//! A network between agents and one controller: what is sent arrives late, in order, once; a line that is cut holds
//! everything back, as TCP does that goes on trying; a controller that is down refuses, and one that dies resets.

use std::{
    collections::BTreeMap,
    io,
    net::SocketAddr,
    sync::{Arc, Mutex},
    time::Duration,
};

use mesh_agent::surroundings::{Dial, Dialling, Stream};
use mesh_controller::api::tls::Listen;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt, DuplexStream, ReadHalf, WriteHalf, duplex, split},
    sync::{mpsc, watch},
    task::AbortHandle,
    time::{Instant, sleep_until},
};

use crate::chances::Chances;

/// What a line has under way.
const WINDOW: usize = 256 * 1024;
/// Connections that wait to be accepted.
const BACKLOG: usize = 64;

/// The network.
#[derive(Debug, Clone)]
pub(crate) struct Net(Arc<Mutex<Inner>>);

#[derive(Debug)]
struct Inner {
    chances: Chances,
    /// Whether each node's line is cut.
    lines: BTreeMap<String, watch::Sender<bool>>,
    controller: Option<mpsc::Sender<Accepted>>,
    /// What carries the connections of the controller that runs.
    carrying: Vec<AbortHandle>,
}

type Accepted = (DuplexStream, SocketAddr);

impl Net {
    pub(crate) fn new(nodes: &[&str], chances: Chances) -> Self {
        let lines = nodes.iter().map(|node| ((*node).to_owned(), watch::Sender::new(false))).collect();
        Self(Arc::new(Mutex::new(Inner { chances, lines, controller: None, carrying: vec![] })))
    }

    /// Cuts a node's line, or mends it.
    pub(crate) fn cut(&self, node: &str, cut: bool) {
        self.0.lock().unwrap().lines[node].send_replace(cut);
    }

    /// A controller listens from now on.
    pub(crate) fn listen(&self) -> Inbox {
        let (sender, receiver) = mpsc::channel(BACKLOG);
        self.0.lock().unwrap().controller = Some(sender);
        Inbox(receiver)
    }

    /// It dies: nobody listens, and what it had open is reset.
    pub(crate) fn reset_controller(&self) {
        let mut inner = self.0.lock().unwrap();
        inner.controller = None;
        for carrying in inner.carrying.drain(..) {
            carrying.abort();
        }
    }

    /// How a node's agent gets to the controller.
    pub(crate) fn dial_from(&self, node: &str) -> Dial {
        let (net, node) = (self.clone(), node.to_owned());
        Dial::new(move |_host, _port| -> Dialling {
            let (net, node) = (net.clone(), node.clone());
            Box::pin(async move { net.connect(&node).await })
        })
    }

    async fn connect(&self, node: &str) -> io::Result<Box<dyn Stream>> {
        let mut line = self.0.lock().unwrap().lines[node].subscribe();
        // A SYN is sent again until somebody answers, or the caller has had enough.
        let _ = line.wait_for(|cut| !cut).await;
        let delay = self.delay();
        sleep_until(Instant::now() + delay).await;
        let refused = || io::Error::from(io::ErrorKind::ConnectionRefused);
        let controller = self.0.lock().unwrap().controller.clone().ok_or_else(refused)?;
        let (agent, near) = duplex(WINDOW);
        let (far, accepted) = duplex(WINDOW);
        let ((near_in, near_out), (far_in, far_out)) = (split(near), split(far));
        let out = tokio::spawn(carry(near_in, far_out, line.clone(), delay));
        let back = tokio::spawn(carry(far_in, near_out, line, delay));
        self.0.lock().unwrap().carrying.extend([out.abort_handle(), back.abort_handle()]);
        controller.send((accepted, ([127, 0, 0, 1], 1).into())).await.map_err(|_| refused())?;
        Ok(Box::new(agent))
    }

    fn delay(&self) -> Duration {
        let chances = self.0.lock().unwrap().chances.clone();
        // Mostly a rack, sometimes a continent.
        Duration::from_millis(if chances.once_in(5) {
            chances.between(50, 400)
        } else {
            chances.between(1, 10)
        })
    }
}

async fn carry(
    mut from: ReadHalf<DuplexStream>,
    mut to: WriteHalf<DuplexStream>,
    mut line: watch::Receiver<bool>,
    delay: Duration,
) {
    let mut buffer = vec![0; WINDOW];
    loop {
        let read = from.read(&mut buffer).await;
        let _ = line.wait_for(|cut| !cut).await;
        sleep_until(Instant::now() + delay).await;
        // Cut while it was under way.
        let _ = line.wait_for(|cut| !cut).await;
        match read {
            Ok(n @ 1..) if to.write_all(&buffer[..n]).await.is_ok() => {}
            _ => return drop(to.shutdown().await),
        }
    }
}

/// Where the controller's connections come in.
#[derive(Debug)]
pub(crate) struct Inbox(mpsc::Receiver<Accepted>);

impl Listen for Inbox {
    async fn next(&mut self) -> io::Result<(Box<dyn mesh_controller::api::tls::Stream>, SocketAddr)> {
        match self.0.recv().await {
            Some((stream, from)) => Ok((Box::new(stream), from)),
            // Nobody can connect any more; the controller is about to end.
            None => std::future::pending().await,
        }
    }
}
