//! Composition: what exists, who owns it, in which order it starts and stops.
//!
//! One task owns the desired state ([`Core`]): it alone hears the source, the reports and the roots, and publishes the
//! next [`World`]. Everything else reads what was published.

use std::{
    io,
    net::SocketAddr,
    path::PathBuf,
    sync::Arc,
    time::{Duration, SystemTime},
};

use mesh_core::{identity::TrustDomain, view::Mesh};
use rustls::ServerConfig;
use tokio::{
    net::TcpListener,
    sync::{mpsc, watch},
    time::{MissedTickBehavior, interval, timeout},
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use crate::{
    admin,
    api::{self, Api, NodeReport, tls},
    ca::{self, Authority, CaError},
    config::Config,
    distribute::{Hub, World},
    metrics::{DocumentLabels, DocumentState, Metrics},
    project::Common,
    report::{ReportError, Reports},
    source::{
        files::{FilesError, Source},
        ledger::Ledger,
    },
    store::{self, StoreError},
    token::Tokens,
};

/// How often the certificate authority's file is looked at, for a root that was rotated.
const AUTHORITY_POLL: Duration = Duration::from_millis(500);
/// How often join tokens that have expired are removed.
const TOKEN_SWEEP: Duration = Duration::from_secs(60);
/// Reports that wait to be taken; agents wait beyond it.
const REPORT_QUEUE: usize = 256;
/// How long the servers may take to end.
const STOP_DEADLINE: Duration = Duration::from_secs(5);

/// Why the controller did not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The state cannot be used.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The certificate authority cannot be used.
    #[error(transparent)]
    Ca(#[from] CaError),
    /// What agents reported cannot be read.
    #[error(transparent)]
    Report(#[from] ReportError),
    /// The manifests cannot be read.
    #[error(transparent)]
    Files(#[from] FilesError),
    /// No TLS.
    #[error(transparent)]
    Tls(#[from] tls::TlsError),
    /// An address cannot be listened on.
    #[error("cannot listen on {address}: {error}; stop what holds it, or choose another with {option}")]
    Listen {
        /// The address.
        address: SocketAddr,
        /// The option that names it.
        option: &'static str,
        /// What the system said.
        error: io::Error,
    },
}

/// A running controller. Dropping it leaves it running; [`Controller::stop`] ends it.
#[derive(Debug)]
pub struct Controller {
    agents: SocketAddr,
    admin: SocketAddr,
    cancel: CancellationToken,
    tasks: TaskTracker,
}

impl Controller {
    /// Starts everything. When it returns, agents are served with what the directory says.
    pub async fn start(config: Config) -> Result<Self, StartError> {
        store::private_dir(&config.state_dir)?;
        let authority = Arc::new(Authority::open(&config.state_dir, SystemTime::now())?);
        let tokens = Tokens::open(&config.state_dir)?;
        let reports_file = config.state_dir.join("reports.json");
        let reports = Reports::load(&reports_file)?;
        let source = Source::open(&config.source, config.state_dir.join("kept.json"))?;
        let (tls_config, renew_at) =
            tls::server_config(&authority, &config.trust_domain, config.certificate_ttl, SystemTime::now())?;
        let agents = listen(config.listen, "--listen").await?;
        let admin = listen(config.admin_listen, "--admin-listen").await?;

        let metrics = Arc::new(Metrics::default());
        let (cancel, tasks) = (CancellationToken::new(), TaskTracker::new());
        let (roots, roots_seen) = watch::channel(roots(&authority));
        let (report_sender, report_queue) = mpsc::channel(REPORT_QUEUE);
        let (tls_sender, tls_seen) = watch::channel(tls_config);
        let core = Core {
            ledger: source.subscribe(),
            roots: roots_seen,
            queue: report_queue,
            reports,
            reports_file,
            trust_domain: config.trust_domain.clone(),
            metrics: metrics.clone(),
        };
        let hub = Hub::new(core.world());
        let api = Arc::new(Api {
            hub: hub.clone(),
            authority: authority.clone(),
            tokens: tokens.clone(),
            limits: Default::default(),
            reports: report_sender,
            metrics: metrics.clone(),
            trust_domain: config.trust_domain.clone(),
            certificate_ttl: config.certificate_ttl,
            watches: tasks.clone(),
            cancel: cancel.clone(),
        });
        let answers = Arc::new(admin::Admin {
            hub: hub.clone(),
            authority: authority.clone(),
            metrics,
            trust_domain: config.trust_domain.clone(),
        });
        let upkeep = Upkeep { authority, tokens, config, roots, tls: tls_sender, renew_at };
        let running =
            Self { agents: address(&agents), admin: address(&admin), cancel: cancel.clone(), tasks };

        running.spawn("source", source.follow(cancel.clone()));
        running.spawn("core", core.run(hub, cancel.clone()));
        running.spawn("upkeep", upkeep.run(cancel.clone()));
        running.spawn("admin", async move { said("admin", admin::serve(admin, answers, cancel).await) });
        running.spawn("api", async move { said("api", api::serve(agents, tls_seen, api).await) });
        tracing::info!(agents = %running.agents, admin = %running.admin, "controller is ready");
        Ok(running)
    }

    /// Where agents connect.
    pub fn agents_address(&self) -> SocketAddr {
        self.agents
    }

    /// Where metrics and `meshctl` connect.
    pub fn admin_address(&self) -> SocketAddr {
        self.admin
    }

    /// Ends when a part of the controller has ended by itself: the rest ends with it.
    pub async fn failed(&self) {
        self.cancel.cancelled().await;
    }

    /// Ends everything and waits for it, within a limit.
    pub async fn stop(self) {
        self.cancel.cancel();
        self.tasks.close();
        if timeout(STOP_DEADLINE, self.tasks.wait()).await.is_err() {
            tracing::warn!("some connections did not end in time and are cut");
        }
    }

    /// Runs a part; if it ends while nobody asked, all of the controller ends, rather than half of it going on.
    fn spawn(&self, part: &'static str, run: impl Future<Output = ()> + Send + 'static) {
        let cancel = self.cancel.clone();
        self.tasks.spawn(async move {
            let ended = tokio::spawn(run).await;
            if !cancel.is_cancelled() {
                tracing::error!(part, failed = ended.is_err(), "a part of the controller ended by itself");
                cancel.cancel();
            }
        });
    }
}

fn said(part: &str, ended: Result<(), impl std::error::Error>) {
    if let Err(error) = ended {
        tracing::error!(part, %error, "serving failed");
    }
}

async fn listen(address: SocketAddr, option: &'static str) -> Result<TcpListener, StartError> {
    TcpListener::bind(address).await.map_err(|error| StartError::Listen { address, option, error })
}

fn address(listener: &TcpListener) -> SocketAddr {
    listener.local_addr().expect("a bound socket has an address")
}

fn roots(authority: &Authority) -> Arc<Vec<Vec<u8>>> {
    Arc::new(authority.roots().iter().map(|root| root.to_vec()).collect())
}

/// The owner of the desired state.
struct Core {
    ledger: watch::Receiver<Arc<Ledger>>,
    roots: watch::Receiver<Arc<Vec<Vec<u8>>>>,
    queue: mpsc::Receiver<NodeReport>,
    reports: Reports,
    reports_file: PathBuf,
    trust_domain: TrustDomain,
    metrics: Arc<Metrics>,
}

impl Core {
    async fn run(mut self, hub: Arc<Hub>, cancel: CancellationToken) {
        loop {
            // Cancel-safe: a report that `recv` has taken is handled before the next turn.
            let report = tokio::select! {
                () = cancel.cancelled() => return,
                changed = self.ledger.changed() => match changed {
                    Ok(()) => None,
                    Err(_) => return,
                },
                changed = self.roots.changed() => match changed {
                    Ok(()) => None,
                    Err(_) => return,
                },
                report = self.queue.recv() => match report {
                    Some(report) => Some(report),
                    None => return,
                },
            };
            match report {
                None => hub.publish(self.world()),
                Some(report) => {
                    if self.take(report, &hub) {
                        hub.publish(self.world());
                        self.save().await;
                    }
                }
            }
        }
    }

    /// Takes a report and all that wait behind it, so that a burst is one change.
    fn take(&mut self, first: NodeReport, hub: &Hub) -> bool {
        let model = hub.world().model.clone();
        let mut changed = self.reports.take(&first.node, &first.words, &model);
        while let Ok(next) = self.queue.try_recv() {
            changed |= self.reports.take(&next.node, &next.words, &model);
        }
        changed
    }

    fn world(&self) -> World {
        let ledger = self.ledger.borrow().clone();
        let model = Arc::new(ledger.model());
        let roots = self.roots.borrow().to_vec();
        let mesh = Arc::new(Mesh { trust_domain: self.trust_domain.clone(), roots });
        let common = Arc::new(Common::new(&model, mesh, &self.reports.captured(&model)));
        let documents = |state| self.metrics.documents.get_or_create(&DocumentLabels { state });
        documents(DocumentState::accepted).set(ledger.documents_accepted() as u64);
        documents(DocumentState::refused).set(ledger.documents_refused() as u64);
        World { model, ledger, reports: Arc::new(self.reports.clone()), common }
    }

    async fn save(&self) {
        let (reports, file) = (self.reports.clone(), self.reports_file.clone());
        match tokio::task::spawn_blocking(move || reports.save(&file)).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => tracing::error!(%error, "reports of agents would not survive a restart"),
            Err(error) => tracing::error!(%error, "saving the reports of agents failed"),
        }
    }
}

/// What has to be done from time to time: certificates, roots, tokens.
struct Upkeep {
    authority: Arc<Authority>,
    tokens: Tokens,
    config: Config,
    roots: watch::Sender<Arc<Vec<Vec<u8>>>>,
    tls: watch::Sender<Arc<ServerConfig>>,
    renew_at: SystemTime,
}

impl Upkeep {
    async fn run(mut self, cancel: CancellationToken) {
        let mut poll = interval(AUTHORITY_POLL);
        let mut sweep = interval(TOKEN_SWEEP);
        for timer in [&mut poll, &mut sweep] {
            timer.set_missed_tick_behavior(MissedTickBehavior::Delay);
        }
        let mut last_error = String::new();
        loop {
            // Cancel-safe: ticks hold nothing.
            tokio::select! {
                () = cancel.cancelled() => return,
                _ = poll.tick() => {
                    let error = self.certificates(SystemTime::now()).err().map(|it| it.to_string());
                    let error = error.unwrap_or_default();
                    // Said once, not twice a second.
                    if !error.is_empty() && error != last_error {
                        tracing::error!(%error, "certificates; what was in force stays");
                    }
                    last_error = error;
                }
                _ = sweep.tick() => {
                    if let Err(error) = self.tokens.sweep(SystemTime::now()) {
                        tracing::warn!(%error, "removing expired join tokens");
                    }
                    if ca::ends_soon(&self.authority.roots(), SystemTime::now()) {
                        tracing::warn!("the root ends within a year: mesh-controller rotate-root");
                    }
                }
            }
        }
    }

    fn certificates(&mut self, now: SystemTime) -> Result<(), tls::TlsError> {
        let reloaded = self.authority.reload()?;
        let renewed = self.authority.renew_issuing(now)?;
        if reloaded || renewed {
            tracing::info!(roots = self.authority.roots().len(), "the certificate authority has changed");
            self.roots.send_replace(roots(&self.authority));
        }
        if reloaded || renewed || now >= self.renew_at {
            let (trust_domain, ttl) = (&self.config.trust_domain, self.config.certificate_ttl);
            let (config, renew_at) = tls::server_config(&self.authority, trust_domain, ttl, now)?;
            self.renew_at = renew_at;
            self.tls.send_replace(config);
        }
        Ok(())
    }
}
