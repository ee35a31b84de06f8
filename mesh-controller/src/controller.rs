//! Composition: what exists, who owns it, in which order it starts and stops.
//!
//! One task owns the desired state ([`Core`]): it alone hears the source, the reports and the roots, and publishes the
//! next [`World`]. Everything else reads what was published.

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    net::SocketAddr,
    path::PathBuf,
    pin::Pin,
    sync::Arc,
    time::{Duration, SystemTime},
};

use mesh_core::{
    identity::TrustDomain,
    model::{Mode, Name},
    view::Mesh,
};
use mesh_settings::{InForce, log::LogFilter};
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
    clock::Clock,
    config::Config,
    digest::{digest, hex},
    distribute::{Hub, SETTLE, World},
    generation::Generation,
    metrics::{DocumentLabels, DocumentState, Metrics},
    project::Common,
    report::{ReportError, Reports},
    source::{
        files::{FilesError, Source},
        ledger::Ledger,
    },
    store::{self, Part, StoreError},
    token::Tokens,
};

/// How often the certificate authority's file is looked at, for a root that was rotated.
const AUTHORITY_POLL: Duration = Duration::from_millis(500);
/// How often join tokens that have expired are removed.
const TOKEN_SWEEP: Duration = Duration::from_secs(60);
/// How often what could not be saved is tried again.
const SAVE_RETRY: Duration = Duration::from_secs(10);
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
    pub async fn start(config: Config, log: LogFilter) -> Result<Self, StartError> {
        Self::start_by(config, log, Clock::default()).await
    }

    /// The same by another clock.
    pub async fn start_by(config: Config, log: LogFilter, clock: Clock) -> Result<Self, StartError> {
        let source = {
            store::private_dir(&config.state_dir)?;
            Source::open(&config.source, config.state_dir.join("kept.json"))?
        };
        let agents = listen(config.listen, "--listen").await?;
        let admin = listen(config.admin_listen, "--admin-listen").await?;
        let (at, admin_at) = (address(&agents), address(&admin));
        let parts = Parts::assemble(Settings::from(&config), source.subscribe(), clock)?;
        let running =
            Self { agents: at, admin: admin_at, cancel: parts.cancel.clone(), tasks: parts.tasks.clone() };
        let source = source.telling(parts.metrics.unsaved.clone());
        let (answers, cancel) = (parts.answers(config.in_force, log), parts.cancel.clone());
        running.spawn("source", source.follow(cancel.clone()));
        running.spawn("admin", admin::serve(admin, answers, cancel));
        for (part, run) in parts.run(agents) {
            running.spawn(part, run);
        }
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

/// What the parts beside the source are started with.
#[derive(Debug, Clone)]
pub struct Settings {
    /// The state: authority, tokens, reports, the count of starts.
    pub state_dir: PathBuf,
    /// The trust domain of every identity.
    pub trust_domain: TrustDomain,
    /// How long certificates live.
    pub certificate_ttl: Duration,
    /// The mode where neither workload nor namespace says one.
    pub default_mode: Mode,
}

impl From<&Config> for Settings {
    fn from(config: &Config) -> Self {
        Self {
            state_dir: config.state_dir.clone(),
            trust_domain: config.trust_domain.clone(),
            certificate_ttl: config.certificate_ttl,
            default_mode: config.default_mode,
        }
    }
}

/// Everything but the source of manifests and the listeners: what a simulation runs as it is.
#[derive(Debug)]
pub struct Parts {
    /// Views and who watches them.
    pub hub: Arc<Hub>,
    /// Signs.
    pub authority: Arc<Authority>,
    /// Counted.
    pub metrics: Arc<Metrics>,
    /// Ends them.
    pub cancel: CancellationToken,
    tasks: TaskTracker,
    core: Core,
    upkeep: Upkeep,
    api: Arc<Api>,
    tls: watch::Receiver<Arc<ServerConfig>>,
}

/// A part's work, until it is cancelled.
pub type Running = Pin<Box<dyn Future<Output = ()> + Send>>;

impl Parts {
    /// Opens the state, and puts together what runs on it.
    pub fn assemble(
        settings: Settings,
        ledger: watch::Receiver<Arc<Ledger>>,
        clock: Clock,
    ) -> Result<Self, StartError> {
        let Settings { state_dir, trust_domain, certificate_ttl, default_mode } = settings;
        store::private_dir(&state_dir)?;
        let authority = Arc::new(Authority::open(&state_dir, clock.now())?);
        let (generation, trouble) = Generation::begin(&state_dir);
        let metrics = Arc::new(Metrics::default());
        if let Some(error) = trouble {
            tracing::error!(%error, "the count of starts");
            metrics.unsaved.tried(Part::Generation, &Err::<(), _>(error));
        }
        let generation = Arc::new(generation);
        let tokens = Tokens::open(&state_dir)?;
        let reports_file = state_dir.join("reports.json");
        let reports = Reports::load(&reports_file)?;
        let (tls_config, renew_at) = tls::server_config(&authority, &trust_domain, certificate_ttl, &clock)?;

        let (cancel, tasks) = (CancellationToken::new(), TaskTracker::new());
        let (roots, roots_seen) = watch::channel(roots(&authority));
        let (report_sender, queue) = mpsc::channel(REPORT_QUEUE);
        let (tls_sender, tls) = watch::channel(tls_config);
        let core = Core {
            ledger,
            roots: roots_seen,
            queue,
            reports,
            reports_file,
            trust_domain: trust_domain.clone(),
            default_mode,
            metrics: metrics.clone(),
        };
        let hub = Hub::new(core.world(None), generation.clone());
        let api = Arc::new(Api {
            hub: hub.clone(),
            authority: authority.clone(),
            generation: generation.clone(),
            tokens: tokens.clone(),
            limits: Default::default(),
            reports: report_sender,
            metrics: metrics.clone(),
            trust_domain: trust_domain.clone(),
            clock: clock.clone(),
            certificate_ttl,
            watches: tasks.clone(),
            cancel: cancel.clone(),
        });
        let upkeep = Upkeep {
            authority: authority.clone(),
            tokens,
            trust_domain,
            certificate_ttl,
            clock,
            roots,
            tls: tls_sender,
            renew_at,
            generation,
            metrics: metrics.clone(),
        };
        upkeep.count_roots();
        Ok(Self { hub, authority, metrics, cancel, tasks, core, upkeep, api, tls })
    }

    /// What the admin server answers from.
    fn answers(&self, settings: Vec<InForce>, log: LogFilter) -> Arc<admin::Admin> {
        Arc::new(admin::Admin {
            hub: self.hub.clone(),
            authority: self.authority.clone(),
            metrics: self.metrics.clone(),
            trust_domain: self.api.trust_domain.clone(),
            settings,
            log,
        })
    }

    /// The parts, each with its name; they end when they are cancelled.
    pub fn run(self, agents: impl tls::Listen) -> Vec<(&'static str, Running)> {
        let Self { hub, cancel, core, upkeep, api, tls, .. } = self;
        vec![
            ("core", Box::pin(core.run(hub, cancel.clone()))),
            ("upkeep", Box::pin(upkeep.run(cancel))),
            ("api", Box::pin(async move { said("api", api::serve(agents, tls, api).await) })),
        ]
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
#[derive(Debug)]
struct Core {
    ledger: watch::Receiver<Arc<Ledger>>,
    roots: watch::Receiver<Arc<Vec<Vec<u8>>>>,
    queue: mpsc::Receiver<NodeReport>,
    reports: Reports,
    reports_file: PathBuf,
    trust_domain: TrustDomain,
    default_mode: Mode,
    metrics: Arc<Metrics>,
}

impl Core {
    async fn run(mut self, hub: Arc<Hub>, cancel: CancellationToken) {
        let settle = tokio::time::sleep(SETTLE);
        tokio::pin!(settle);
        let mut settled = false;
        let mut again = interval(SAVE_RETRY);
        again.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            // Cancel-safe: a report that `recv` has taken is handled before the next turn.
            let report = tokio::select! {
                () = cancel.cancelled() => return,
                () = &mut settle, if !settled => {
                    hub.settle();
                    settled = true;
                    continue;
                }
                _ = again.tick() => {
                    if self.metrics.unsaved.has(Part::Reports) {
                        self.save().await;
                    }
                    continue;
                }
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
                None => hub.publish(self.world(Some(&hub))),
                Some(report) => {
                    let (changed, heard) = self.take(report, &hub);
                    if changed {
                        hub.publish(self.world(Some(&hub)));
                    }
                    for (node, workloads) in heard {
                        hub.heard(&node, &workloads);
                    }
                    if changed {
                        self.save().await;
                    }
                }
            }
        }
    }

    /// Takes a report and all that wait behind it, so that a burst is one change. Whether it is one, and whose.
    fn take(&mut self, first: NodeReport, hub: &Hub) -> (bool, BTreeMap<String, BTreeSet<Name>>) {
        let model = hub.world().model.clone();
        let mut next = Some(first);
        let (mut changed, mut heard) = (false, BTreeMap::<String, BTreeSet<Name>>::new());
        while let Some(NodeReport { node, words }) = next {
            changed |= self.reports.take(&node, &words, &model);
            let names = words.iter().filter_map(|word| word.workload.parse().ok());
            heard.entry(node).or_default().extend(names);
            next = self.queue.try_recv().ok();
        }
        (changed, heard)
    }

    /// The next state of the world, which shares with the hub's what has not changed.
    fn world(&self, hub: Option<&Arc<Hub>>) -> World {
        let ledger = self.ledger.borrow().clone();
        let model = Arc::new(ledger.model());
        let roots = self.roots.borrow().to_vec();
        let mesh = Arc::new(Mesh { trust_domain: self.trust_domain.clone(), roots });
        let captured = self.reports.captured(&model);
        let common = Arc::new(match hub {
            None => Common::new(&model, mesh, &captured, self.default_mode),
            Some(hub) => Common::after(&hub.world().common, &model, mesh, &captured, self.default_mode),
        });
        let documents = |state| self.metrics.documents.get_or_create(&DocumentLabels { state });
        documents(DocumentState::accepted).set(ledger.documents_accepted() as u64);
        documents(DocumentState::refused).set(ledger.documents_refused() as u64);
        World { model, ledger, reports: Arc::new(self.reports.clone()), common }
    }

    async fn save(&self) {
        let (reports, file) = (self.reports.clone(), self.reports_file.clone());
        let saved = match tokio::task::spawn_blocking(move || reports.save(&file)).await {
            Ok(saved) => saved.map_err(|error| error.to_string()),
            Err(error) => Err(error.to_string()),
        };
        let news = self.metrics.unsaved.tried(Part::Reports, &saved);
        if let Err(error) = saved
            && news
        {
            tracing::error!(%error, "reports of agents would not survive a restart");
        }
    }
}

/// What has to be done from time to time: certificates, roots, tokens.
#[derive(Debug)]
struct Upkeep {
    authority: Arc<Authority>,
    tokens: Tokens,
    trust_domain: TrustDomain,
    certificate_ttl: Duration,
    clock: Clock,
    roots: watch::Sender<Arc<Vec<Vec<u8>>>>,
    tls: watch::Sender<Arc<ServerConfig>>,
    renew_at: SystemTime,
    generation: Arc<Generation>,
    metrics: Arc<Metrics>,
}

impl Upkeep {
    fn count_roots(&self) {
        let roots = self.authority.roots();
        let ends = roots.iter().filter_map(|root| {
            let (_, until) = ca::validity(root).ok()?;
            Some((hex(&digest(root)[..8]), until))
        });
        self.metrics.roots(ends);
    }

    async fn run(mut self, cancel: CancellationToken) {
        let mut poll = interval(AUTHORITY_POLL);
        let mut sweep = interval(TOKEN_SWEEP);
        for timer in [&mut poll, &mut sweep] {
            timer.set_missed_tick_behavior(MissedTickBehavior::Delay);
        }
        loop {
            // Cancel-safe: ticks hold nothing.
            tokio::select! {
                () = cancel.cancelled() => return,
                _ = poll.tick() => {
                    let done = self.certificates();
                    // Said once, not twice a second.
                    let news = self.metrics.unsaved.tried(Part::Authority, &done);
                    if let Err(error) = done && news {
                        tracing::error!(%error, "certificates; what was in force stays");
                    }
                }
                _ = sweep.tick() => {
                    if let Err(error) = self.tokens.sweep(self.clock.now()) {
                        tracing::warn!(%error, "removing expired join tokens");
                    }
                    if self.metrics.unsaved.has(Part::Generation) {
                        let kept = self.generation.keep(self.generation.number());
                        self.metrics.unsaved.tried(Part::Generation, &kept);
                    }
                    if ca::ends_soon(&self.authority.roots(), self.clock.now()) {
                        tracing::warn!("the root ends within a year: mesh-controller rotate-root");
                    }
                }
            }
        }
    }

    fn certificates(&mut self) -> Result<(), tls::TlsError> {
        let now = self.clock.now();
        let reloaded = self.authority.reload()?;
        let renewed = self.authority.renew_issuing(now)?;
        if reloaded || renewed {
            tracing::info!(roots = self.authority.roots().len(), "the certificate authority has changed");
            self.roots.send_replace(roots(&self.authority));
            self.count_roots();
        }
        if reloaded || renewed || now >= self.renew_at {
            let (config, renew_at) =
                tls::server_config(&self.authority, &self.trust_domain, self.certificate_ttl, &self.clock)?;
            self.renew_at = renew_at;
            self.tls.send_replace(config);
        }
        Ok(())
    }
}
