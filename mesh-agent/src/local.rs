//! The enrolled workloads of this node, as the data path needs them.

use std::{
    net::IpAddr,
    sync::{
        Arc,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
    time::Duration,
};

use mesh_core::{model::Name, refusal::Reason};
use tokio::sync::Notify;
use tokio_util::sync::{CancellationToken, WaitForCancellationFuture};

use crate::{net::netns::Namespace, rates::Rates, refusal::Refusal};

/// An enrolled workload of this node.
#[derive(Debug)]
pub struct Local {
    /// Its name.
    pub name: Name,
    /// Its addresses.
    pub addresses: Vec<IpAddr>,
    /// Its network namespace, inside which the agent's sockets are.
    pub namespace: Namespace,
    /// How much is left of what it takes.
    pub(crate) rates: Rates,
    id: u64,
    connections: AtomicUsize,
    leaving: CancellationToken,
    left: Notify,
}

impl Local {
    /// A workload that was found in this namespace.
    pub fn new(name: Name, addresses: Vec<IpAddr>, namespace: Namespace) -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let id = NEXT.fetch_add(1, Ordering::Relaxed);
        let connections = AtomicUsize::new(0);
        Self {
            name,
            addresses,
            namespace,
            rates: Rates::default(),
            id,
            connections,
            leaving: CancellationToken::new(),
            left: Notify::new(),
        }
    }

    /// Different for every enrolment, even of the same name: a workload that comes back in a new namespace must not
    /// be given tunnels of the old one.
    pub fn id(&self) -> u64 {
        self.id
    }

    /// Done when the workload leaves the mesh: its connections end now. Cancel-safe.
    pub fn leaving(&self) -> WaitForCancellationFuture<'_> {
        self.leaving.cancelled()
    }

    /// Ends the workload's connections, and waits for that at most this long.
    pub async fn leave(&self, wait: Duration) {
        self.leaving.cancel();
        let emptied = async {
            loop {
                let left = self.left.notified();
                if self.connections.load(Ordering::Acquire) == 0 {
                    return;
                }
                left.await;
            }
        };
        if tokio::time::timeout(wait, emptied).await.is_err() {
            tracing::warn!(workload = %self.name, "connections did not end when their workload left the mesh");
        }
    }

    /// Takes one of `max` connections for as long as the result lives.
    pub fn admit(self: &Arc<Self>, max: usize) -> Result<Admission, Refusal> {
        let admission = Admission(self.clone());
        if self.connections.fetch_add(1, Ordering::Relaxed) >= max {
            return Err(Refusal::new(Reason::LimitConnections, format!("{} has {max}", self.name)));
        }
        Ok(admission)
    }
}

/// A connection's place among those that its workload may have.
#[derive(Debug)]
pub struct Admission(Arc<Local>);

impl Drop for Admission {
    fn drop(&mut self) {
        self.0.connections.fetch_sub(1, Ordering::Release);
        self.0.left.notify_waiters();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_workload_has_no_more_connections_than_it_may() {
        let namespace = Namespace::of_agent().unwrap();
        let local = Arc::new(Local::new(Name::new("shop", "web"), vec![], namespace));
        let first = local.admit(1).unwrap();
        assert_eq!(local.admit(1).unwrap_err().reason, Reason::LimitConnections);
        drop(first);
        assert!(local.admit(1).is_ok());
    }

    #[tokio::test]
    async fn leaving_waits_for_the_last_connection() {
        let local = Arc::new(Local::new(Name::new("shop", "web"), vec![], Namespace::of_agent().unwrap()));
        let admission = local.admit(1).unwrap();
        let ends = local.clone();
        tokio::spawn(async move {
            ends.leaving().await;
            drop(admission);
        });
        local.leave(Duration::from_secs(60)).await;
        assert_eq!(local.connections.load(Ordering::Acquire), 0);
    }
}
