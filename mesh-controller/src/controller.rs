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
    attest::Attestor,
    bundle::Bundle,
    ca::{self, Authority, CaError, Place},
    clock::Clock,
    conditions::{Conditions, Pods},
    config::Config,
    digest::{digest, hex},
    distribute::{Hub, SETTLE, World},
    generation::Generation,
    jwks::{self, Follower, Keys},
    kubernetes::{self, KubernetesError},
    metrics::{DocumentLabels, DocumentState, Metrics},
    model::{KeysAt, Object},
    others::Others,
    project::Common,
    report::{ReportError, Reports},
    source::{Presence, Source, SourceError, ledger::Ledger},
    store::{self, Part, StoreError},
    token::Tokens,
    writeback::{Wishes, Writer},
};

/// How often the certificate authority's file is looked at, for a root that was rotated.
const AUTHORITY_POLL: Duration = Duration::from_millis(500);
/// The same where it, or the roots, are in Kubernetes.
const SHARED_POLL: Duration = Duration::from_secs(2);
/// How often join tokens that have expired are removed.
const TOKEN_SWEEP: Duration = Duration::from_secs(60);
/// How often what could not be saved is tried again.
const SAVE_RETRY: Duration = Duration::from_secs(10);
/// Reports that wait to be taken; agents wait beyond it.
const REPORT_QUEUE: usize = 256;
/// How often a controller that is cut off looks for another one.
const ELSEWHERE: Duration = Duration::from_secs(5);
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
    /// What is wanted cannot be read.
    #[error(transparent)]
    Source(#[from] SourceError),
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
    /// There is no API server to ask.
    #[error(transparent)]
    Kubernetes(#[from] KubernetesError),
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
    /// Starts everything. When it returns, agents are served with what the source says.
    pub async fn start(config: Config, log: LogFilter) -> Result<Self, StartError> {
        Self::start_by(config, log, Clock::default()).await
    }

    /// The same by another clock.
    pub async fn start_by(config: Config, log: LogFilter, clock: Clock) -> Result<Self, StartError> {
        let source = {
            store::private_dir(&config.state_dir)?;
            Source::open(&config.source, config.state_dir.join("kept.json")).await?
        };
        let agents = listen(config.listen, "--listen").await?;
        let admin = listen(config.admin_listen, "--admin-listen").await?;
        let (at, admin_at) = (address(&agents), address(&admin));
        let settings = Settings { pods: source.pods(), ..Settings::of(&config, &clock).await? };
        let metrics = settings.metrics.clone();
        let ledger = (source.subscribe(), wanted_keys as fn(&Ledger) -> BTreeSet<KeysAt>);
        let mut keys = Follower::open(&config.state_dir, ledger, metrics, jwks::Times::default());
        keys.first().await;
        let source = source.knowing(keys.known());
        let settings = Settings { keys: keys.known(), ..settings };
        let parts = Parts::assemble(settings, source.subscribe(), clock)?;
        let running =
            Self { agents: at, admin: admin_at, cancel: parts.cancel.clone(), tasks: parts.tasks.clone() };
        let source = source.telling(parts.metrics.unsaved.clone()).among(config.controllers);
        let (presence, others) = (source.presence(), Others::new(source.others()));
        let answers = parts.answers(config.in_force, log, presence.clone(), others.clone());
        let (hub, elsewhere) = (parts.hub.clone(), parts.api.elsewhere.clone());
        let cancel = parts.cancel.clone();
        running.spawn("elsewhere", send_elsewhere(presence, others, hub, elsewhere, cancel.clone()));
        if let Some(write) = source.write(cancel.clone()) {
            running.spawn("status", write);
        }
        running.spawn("keys", keys.run(cancel.clone()));
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
    /// How many workloads and services a mesh may have for whole views.
    pub whole_views_up_to: usize,
    /// Signs.
    pub authority: Arc<Authority>,
    /// Where the roots are published.
    pub bundle: Option<Bundle>,
    /// Who may join by Kubernetes' word.
    pub attestor: Option<Attestor>,
    /// The pods, which keep what is said of them; without, we keep it.
    pub pods: Option<Pods>,
    /// The keys of issuers that are elsewhere.
    pub keys: watch::Receiver<Arc<Keys>>,
    /// Counted.
    pub metrics: Arc<Metrics>,
}

impl Settings {
    async fn of(config: &Config, clock: &Clock) -> Result<Self, StartError> {
        let in_kubernetes = [&config.ca_secret, &config.roots_config_map, &config.join_service_account];
        let client = match in_kubernetes.iter().any(|it| it.is_some()) {
            true => Some(kubernetes::client().await?),
            false => None,
        };
        let with_client = |name: &Option<Name>| client.clone().zip(name.clone());
        let place = match (with_client(&config.ca_secret), &config.issuer_dir) {
            (Some((client, name)), _) => Place::Secret(client, name),
            (None, Some(dir)) => Place::Mounted(dir.clone()),
            (None, None) => Place::Directory(config.state_dir.clone()),
        };
        Ok(Self {
            state_dir: config.state_dir.clone(),
            trust_domain: config.trust_domain.clone(),
            certificate_ttl: config.certificate_ttl,
            default_mode: config.default_mode,
            whole_views_up_to: config.whole_views_up_to,
            authority: Arc::new(Authority::open(place, clock.now()).await?),
            bundle: with_client(&config.roots_config_map).map(|(client, name)| Bundle::new(client, name)),
            attestor: with_client(&config.join_service_account)
                .map(|(client, account)| Attestor::new(client, account)),
            pods: None,
            keys: jwks::nothing(),
            metrics: Arc::default(),
        })
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
    writer: Option<Writer>,
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
        let Settings {
            state_dir,
            trust_domain,
            certificate_ttl,
            default_mode,
            whole_views_up_to,
            authority,
            bundle,
            attestor,
            pods,
            keys,
            metrics,
        } = settings;
        store::private_dir(&state_dir)?;
        // What else a start would have to be told from, join tokens and reports, is then with the API server, or nowhere.
        let (generation, trouble) = match authority.is_shared() && pods.is_some() {
            true => (Generation::of_replica(), None),
            false => Generation::begin(&state_dir),
        };
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
            keys,
            queue,
            reports,
            reports_file,
            pods: pods.as_ref().map(|pods| (pods.conditions.clone(), Wishes::default())),
            trust_domain: trust_domain.clone(),
            default_mode,
            metrics: metrics.clone(),
        };
        let hub = Hub::new(core.world(None), generation.clone(), whole_views_up_to);
        metrics.views_by_demand.set(hub.by_demand().into());
        let wishes = core.pods.as_ref().map(|(_, wishes)| wishes.clone());
        let writer = pods.zip(wishes).map(|(Pods { client, conditions }, wishes)| {
            Writer::new(client, wishes, conditions, metrics.clone())
        });
        let api = Arc::new(Api {
            hub: hub.clone(),
            authority: authority.clone(),
            generation: generation.clone(),
            tokens: tokens.clone(),
            attestor,
            limits: Default::default(),
            reports: report_sender,
            metrics: metrics.clone(),
            trust_domain: trust_domain.clone(),
            clock: clock.clone(),
            certificate_ttl,
            watches: tasks.clone(),
            cancel: cancel.clone(),
            elsewhere: tls::Elsewhere::default(),
        });
        let upkeep = Upkeep {
            authority: authority.clone(),
            tokens,
            trust_domain,
            certificate_ttl,
            clock,
            roots,
            bundle,
            tls: tls_sender,
            renew_at,
            generation,
            metrics: metrics.clone(),
        };
        upkeep.count_roots();
        Ok(Self { hub, authority, metrics, cancel, tasks, core, writer, upkeep, api, tls })
    }

    /// What the admin server answers from.
    fn answers(
        &self,
        settings: Vec<InForce>,
        log: LogFilter,
        presence: watch::Receiver<Presence>,
        others: Others,
    ) -> Arc<admin::Admin> {
        Arc::new(admin::Admin {
            hub: self.hub.clone(),
            authority: self.authority.clone(),
            metrics: self.metrics.clone(),
            trust_domain: self.api.trust_domain.clone(),
            settings,
            log,
            presence,
            others,
        })
    }

    /// The parts, each with its name; they end when they are cancelled.
    pub fn run(self, agents: impl tls::Listen) -> Vec<(&'static str, Running)> {
        let Self { hub, cancel, core, writer, upkeep, api, tls, .. } = self;
        let writer = writer.map(|it| ("writeback", Box::pin(it.run(hub.clone(), cancel.clone())) as Running));
        let mut parts: Vec<(&'static str, Running)> = vec![
            ("core", Box::pin(core.run(hub, cancel.clone()))),
            ("upkeep", Box::pin(upkeep.run(cancel))),
            ("api", Box::pin(async move { said("api", api::serve(agents, tls, api).await) })),
        ];
        parts.extend(writer);
        parts
    }
}

/// While the source cannot be asked and another controller is ready, ends our agents' connections: the Service leads them
/// there. Until its endpoints are right some come here again, and are served with what is known.
async fn send_elsewhere(
    presence: watch::Receiver<Presence>,
    others: Others,
    hub: Arc<Hub>,
    elsewhere: tls::Elsewhere,
    cancel: CancellationToken,
) {
    let mut looks = interval(ELSEWHERE);
    looks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        // Cancel-safe: neither holds anything.
        tokio::select! {
            () = cancel.cancelled() => return,
            _ = looks.tick() => {}
        }
        let cut_off = !presence.borrow().answered;
        if cut_off && hub.connected() > 0 && others.one_is_ready().await {
            tracing::warn!(agents = hub.connected(), "another controller is ready: agents are sent there");
            elsewhere.send();
        }
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

/// Where the keys are that policies name by a URL.
fn wanted_keys(ledger: &Ledger) -> BTreeSet<KeysAt> {
    let of = |object: &Object| match object {
        Object::AuthenticationPolicy(policy) => policy.elsewhere.iter().map(|(_, at)| at.clone()).collect(),
        _ => vec![],
    };
    ledger.objects().flat_map(of).collect()
}

/// Never, where nobody fetches any. Cancel-safe.
async fn keys_changed(keys: &mut watch::Receiver<Arc<Keys>>) {
    if keys.changed().await.is_err() {
        std::future::pending().await
    }
}

/// Never, without pods. Cancel-safe.
async fn conditions_changed(
    pods: &mut Option<(watch::Receiver<Arc<Conditions>>, Wishes)>,
) -> Result<(), watch::error::RecvError> {
    match pods {
        Some((conditions, _)) => conditions.changed().await,
        None => std::future::pending().await,
    }
}

/// The owner of the desired state.
#[derive(Debug)]
struct Core {
    ledger: watch::Receiver<Arc<Ledger>>,
    roots: watch::Receiver<Arc<Vec<Vec<u8>>>>,
    keys: watch::Receiver<Arc<Keys>>,
    queue: mpsc::Receiver<NodeReport>,
    reports: Reports,
    reports_file: PathBuf,
    /// What pods say, in the place of `reports`, and what they shall say.
    pods: Option<(watch::Receiver<Arc<Conditions>>, Wishes)>,
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
                () = keys_changed(&mut self.keys) => None,
                changed = conditions_changed(&mut self.pods) => match changed {
                    Ok(()) => None,
                    Err(_) => return,
                },
                report = self.queue.recv() => match report {
                    Some(report) => Some(report),
                    None => return,
                },
            };
            match report {
                None => self.publish(&hub),
                Some(report) => {
                    let (changed, heard) = self.take(report, &hub);
                    if changed {
                        self.publish(&hub);
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

    fn publish(&self, hub: &Arc<Hub>) {
        hub.publish(self.world(Some(hub)));
        self.metrics.views_by_demand.set(hub.by_demand().into());
    }

    /// Takes a report and all that wait behind it, so that a burst is one change. Whether it is one, and whose.
    fn take(&mut self, first: NodeReport, hub: &Hub) -> (bool, BTreeMap<String, BTreeSet<Name>>) {
        let model = hub.world().model.clone();
        let mut next = Some(first);
        let (mut changed, mut heard) = (false, BTreeMap::<String, BTreeSet<Name>>::new());
        while let Some(NodeReport { node, words }) = next {
            match &self.pods {
                None => changed |= self.reports.take(&node, &words, &model),
                // In force once the pods say it.
                Some((_, wishes)) => wishes.tell(&node, &words, &model),
            }
            let names = words.iter().filter_map(|word| word.workload.parse().ok());
            heard.entry(node).or_default().extend(names);
            next = self.queue.try_recv().ok();
        }
        (changed, heard)
    }

    /// The next state of the world, which shares with the hub's what has not changed.
    fn world(&self, hub: Option<&Arc<Hub>>) -> World {
        let ledger = self.ledger.borrow().clone();
        let mut model = ledger.model();
        model.put_in_keys(&self.keys.borrow().fetched);
        let model = Arc::new(model);
        let roots = self.roots.borrow().to_vec();
        let mesh = Arc::new(Mesh { trust_domain: self.trust_domain.clone(), roots });
        let reports = match &self.pods {
            None => self.reports.clone(),
            Some((conditions, _)) => Reports::of_pods(&conditions.borrow(), &model),
        };
        let heard = reports.heard(&model);
        let common = Arc::new(match hub {
            None => Common::new(&model, mesh, &heard, self.default_mode),
            Some(hub) => Common::after(&hub.world().common, &model, mesh, &heard, self.default_mode),
        });
        let asked = common.all_failing().filter(|it| it.asked).count();
        self.metrics.health(common.all_failing().count() - asked, asked, common.unchecked());
        let documents = |state| self.metrics.documents.get_or_create(&DocumentLabels { state });
        documents(DocumentState::accepted).set(ledger.documents_accepted() as u64);
        documents(DocumentState::refused).set(ledger.documents_refused() as u64);
        World { model, ledger, reports: Arc::new(reports), common }
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
    bundle: Option<Bundle>,
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
        let shared = self.bundle.is_some() || self.authority.is_shared();
        let mut poll = interval(if shared { SHARED_POLL } else { AUTHORITY_POLL });
        let mut sweep = interval(TOKEN_SWEEP);
        for timer in [&mut poll, &mut sweep] {
            timer.set_missed_tick_behavior(MissedTickBehavior::Delay);
        }
        loop {
            // Cancel-safe: ticks hold nothing.
            tokio::select! {
                () = cancel.cancelled() => return,
                _ = poll.tick() => self.certificates().await,
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

    async fn certificates(&mut self) {
        // Before the authority is read: see [`Bundle`].
        let published = match &self.bundle {
            Some(bundle) => Some(bundle.read().await),
            None => None,
        };
        let now = self.clock.now();
        let followed = self.follow(now).await;
        let changed = matches!(followed, Ok(true));
        if changed {
            tracing::info!(roots = self.authority.roots().len(), "the certificate authority has changed");
            self.roots.send_replace(roots(&self.authority));
            self.count_roots();
        }
        let is_current = followed.is_ok();
        let mut done = followed.map(drop).map_err(tls::TlsError::from);
        // However it is with the authority: without a certificate of ours nobody reaches us.
        if changed || now >= self.renew_at {
            done = done.and(self.renew_own());
        }
        self.tell(Part::Authority, done);
        if let (Some(bundle), Some(published)) = (&self.bundle, published) {
            let written = match published {
                Ok(published) if is_current => bundle.write(published, &self.authority.roots()).await,
                other => other.map(drop),
            };
            self.tell(Part::Roots, written);
        }
    }

    /// Takes over what others have changed, and renews what is due; whether anything is new.
    async fn follow(&self, now: SystemTime) -> Result<bool, CaError> {
        let reloaded = self.authority.reload().await?;
        Ok(self.authority.renew_issuing(now).await? || reloaded)
    }

    fn renew_own(&mut self) -> Result<(), tls::TlsError> {
        let (config, renew_at) =
            tls::server_config(&self.authority, &self.trust_domain, self.certificate_ttl, &self.clock)?;
        self.renew_at = renew_at;
        self.tls.send_replace(config);
        Ok(())
    }

    /// Said once, not twice a second.
    fn tell(&self, part: Part, done: Result<(), impl std::error::Error>) {
        let news = self.metrics.unsaved.tried(part, &done);
        if let Err(error) = done
            && news
        {
            tracing::error!(part = part.label(), %error, "what was in force stays");
        }
    }
}
