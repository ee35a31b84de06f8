//! What a node may ask for, by the certificate that its connection showed: its own renewal, certificates of its own
//! workloads, its own view.

use std::{
    net::IpAddr,
    time::{Duration, SystemTime},
};

use mesh_core::{
    identity::SpiffeId,
    wire::{
        addresses_of,
        proto::{Certificate, CertifyRequest, RenewRequest, ViewUpdate, WatchRequest, watch_request::Body},
    },
};
use prometheus_client::metrics::counter::Counter;
use tokio::{sync::mpsc, time::timeout};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};

use super::{Api, NodeReport, services::node_server::Node, tls::Peer};
use crate::{
    clock::Clock,
    distribute::{Acks, Subscription},
    metrics::CertificateKind,
};

/// How long an agent may take for its first word.
const HELLO_TIMEOUT: Duration = Duration::from_secs(10);
/// Updates that are on their way to an agent; what comes later is gathered into one.
const UPDATE_QUEUE: usize = 2;
/// How soon a node is heard again that has asked for addresses: each time costs its part of a lock that all nodes share.
/// What it says meanwhile waits on its own connection.
const ASKED_AGAIN: Duration = Duration::from_millis(10);

#[tonic::async_trait]
impl Node for Api {
    async fn renew(&self, request: Request<RenewRequest>) -> Result<Response<Certificate>, Status> {
        let (node, _) = Peer::node(&request, &self.trust_domain, self.clock.now())?;
        self.may_ask(&node)?;
        let id = SpiffeId::node(&self.trust_domain, &node)
            .map_err(|error| Status::invalid_argument(error.to_string()))?;
        let certificate = self.sign(&request.into_inner().csr_der, &id)?;
        self.count_certificate(CertificateKind::node);
        tracing::debug!(%node, "node certificate renewed");
        Ok(Response::new(certificate))
    }

    async fn certify(&self, request: Request<CertifyRequest>) -> Result<Response<Certificate>, Status> {
        let (node, _) = Peer::node(&request, &self.trust_domain, self.clock.now())?;
        self.may_ask(&node)?;
        let request = request.into_inner();
        let id = SpiffeId::parse(&request.identity)
            .map_err(|error| Status::invalid_argument(error.to_string()))?;
        if !self.hub.world().model.node_has_identity(&node, &id, &self.trust_domain) {
            tracing::warn!(%node, %id, "certificate refused: no enrolled workload of the node has this identity");
            return Err(Status::permission_denied(format!(
                "node {node} has no enrolled workload with the identity {id}; compare: meshctl get workloads"
            )));
        }
        let certificate = self.sign(&request.csr_der, &id)?;
        self.count_certificate(CertificateKind::workload);
        tracing::debug!(%node, %id, "workload certificate signed");
        Ok(Response::new(certificate))
    }

    type WatchStream = ReceiverStream<Result<ViewUpdate, Status>>;

    async fn watch(
        &self,
        request: Request<Streaming<WatchRequest>>,
    ) -> Result<Response<Self::WatchStream>, Status> {
        let (node, certified_until) = Peer::node(&request, &self.trust_domain, self.clock.now())?;
        self.may_ask(&node)?;
        let mut words = request.into_inner();
        let first = timeout(HELLO_TIMEOUT, words.message())
            .await
            .map_err(|_| Status::deadline_exceeded("the first word, Hello, did not come"))??;
        let Some(WatchRequest { body: Some(Body::Hello(hello)) }) = first else {
            return Err(Status::invalid_argument("the first word of a watch must be Hello"));
        };
        self.hear(&node, &hello.version).await;
        let asked = hello.by_demand.then(|| addresses_of(&hello.asked).collect());
        let subscription = self.hub.connect(&node, &hello.version, &hello.agent_version, asked);
        self.count_agents();
        tracing::info!(%node, has = hello.version, agent = hello.agent_version, "agent watches");
        let (sender, receiver) = mpsc::channel(UPDATE_QUEUE);
        let clock = self.clock.clone();
        let watch = Watch { node, certified_until, sender, reports: self.reports.clone(), clock };
        let cancel = self.cancel.clone();
        let (hub, metrics) = (self.hub.clone(), self.metrics.clone());
        self.watches.spawn(async move {
            let node = watch.node.clone();
            // Cancel-safe: whichever ends the watch, the agent connects again and resumes from its version.
            tokio::select! {
                () = cancel.cancelled() => {}
                ended = watch.run(subscription, words, &metrics.views_sent) => {
                    tracing::info!(%node, reason = ended, "agent's watch ended");
                }
            }
            metrics.agents_connected.set(hub.connected() as u64);
        });
        Ok(Response::new(ReceiverStream::new(receiver)))
    }
}

impl Api {
    fn count_agents(&self) {
        self.metrics.agents_connected.set(self.hub.connected() as u64);
    }
}

/// One agent's watch.
struct Watch {
    node: String,
    certified_until: SystemTime,
    sender: mpsc::Sender<Result<ViewUpdate, Status>>,
    reports: mpsc::Sender<NodeReport>,
    clock: Clock,
}

impl Watch {
    /// Carries updates one way and words the other, until either ends; says why.
    async fn run(self, mut updates: Subscription, words: Streaming<WatchRequest>, sent: &Counter) -> String {
        let certified_for = self.certified_until.duration_since(self.clock.now()).unwrap_or_default();
        let acks = updates.acks();
        // Cancel-safe: the first that ends, ends the watch.
        let status = tokio::select! {
            ended = self.tell(&mut updates, sent) => ended,
            ended = self.listen(&acks, words) => ended,
            () = tokio::time::sleep(certified_for) => {
                Status::unauthenticated("the node's certificate has ended; connect with the renewed one")
            }
        };
        let reason = status.message().to_owned();
        // An agent that is gone does not hear it, and one that does not read must not hold us.
        let _ = self.sender.try_send(Err(status));
        reason
    }

    async fn tell(&self, updates: &mut Subscription, sent: &Counter) -> Status {
        while let Some(mut update) = updates.next().await {
            update.now_unix_ms = self.clock.unix_ms();
            if self.sender.send(Ok(update)).await.is_err() {
                return Status::cancelled("the agent went away");
            }
            sent.inc();
        }
        Status::aborted("a newer connection of this node took over")
    }

    async fn listen(&self, acks: &Acks, mut words: Streaming<WatchRequest>) -> Status {
        loop {
            match words.message().await {
                Ok(Some(WatchRequest { body: Some(Body::Ack(ack)) })) => {
                    if !ack.error.is_empty() {
                        tracing::warn!(
                            node = self.node,
                            version = ack.version,
                            error = ack.error,
                            "agent cannot use its view"
                        );
                    }
                    acks.take(&ack.version, &ack.error);
                }
                Ok(Some(WatchRequest { body: Some(Body::Report(report)) })) => {
                    let report = NodeReport { node: self.node.clone(), words: report.workloads };
                    if self.reports.send(report).await.is_err() {
                        return Status::unavailable("the controller is stopping");
                    }
                }
                Ok(Some(WatchRequest { body: Some(Body::Condition(said)) })) => acks.condition(said),
                Ok(Some(WatchRequest { body: Some(Body::Wants(wants)) })) => {
                    let less: Vec<IpAddr> = addresses_of(&wants.given_up).collect();
                    acks.wants(addresses_of(&wants.asked).collect(), &less);
                    tokio::time::sleep(ASKED_AGAIN).await;
                }
                // A second Hello, or a word of a later version, says nothing here.
                Ok(Some(WatchRequest { body: Some(Body::Hello(_)) | None })) => {}
                Ok(None) => return Status::cancelled("the agent ended the watch"),
                Err(status) => return status,
            }
        }
    }
}
