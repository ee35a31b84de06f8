//! The keys of issuers that publish them by a URL: fetched, kept, and fetched again before they are old.
//!
//! Agents open no connections of their own, so it is done here, once for all of them, and views have the keys. What was
//! fetched last stays in force for as long as a new set cannot be had, however long that is; it says so in the log, in the
//! metrics and in the policy's status. It is on disk too, so that a start needs no issuer.
//!
//! Whoever may write a policy decides what is asked for, and learns of the answer only whether it is a set of keys: by https
//! alone, to a server whose certificate is verified, without being redirected.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use axum::http::{HeaderMap, Uri, header};
use http_body_util::{BodyExt, Empty, Limited};
use hyper::{Request, StatusCode, body::Bytes, client::conn::http1};
use hyper_util::rt::TokioIo;
use mesh_core::{authentication::jwks, model::VerifyingKey};
use rustls::{ClientConfig, RootCertStore};
use rustls_pki_types::{CertificateDer, ServerName};
use tokio::{
    net::TcpStream,
    sync::watch,
    task::{AbortHandle, JoinSet},
    time::{Instant, sleep_until, timeout},
};
use tokio_rustls::TlsConnector;
use tokio_util::sync::CancellationToken;

use crate::{
    metrics::Metrics,
    model::{Fetched, KeysAt},
    store::{self, Part},
};

/// Most URLs that are followed; what is more is said and counted.
const MAX_URLS: usize = 1024;
/// Most that are asked at a time.
const MOST_AT_ONCE: usize = 8;

/// When keys are fetched.
#[derive(Debug, Clone, Copy)]
pub struct Times {
    /// How long all of one fetch may take.
    pub limit: Duration,
    /// After how long they are fetched again where the answer does not say it (`Cache-Control: max-age`).
    pub usual: Duration,
    /// The least and the most of what an answer may say.
    pub bounds: (Duration, Duration),
    /// After the first failure; twice as long after each further one, and never longer than `usual`.
    pub retry: Duration,
}

impl Default for Times {
    fn default() -> Self {
        let seconds = Duration::from_secs;
        Self {
            limit: seconds(10),
            usual: seconds(300),
            bounds: (seconds(60), seconds(3600)),
            retry: seconds(5),
        }
    }
}

/// What is known of all URLs that policies name.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Keys {
    /// The last good set of each.
    pub fetched: Fetched,
    /// Why there is no newer one.
    pub troubles: BTreeMap<KeysAt, String>,
}

/// Nothing, for good.
pub fn nothing() -> watch::Receiver<Arc<Keys>> {
    watch::channel(Arc::default()).1
}

/// Whether keys can be fetched from there at all.
pub fn is_url(text: &str) -> bool {
    let Ok(uri) = text.parse::<Uri>() else { return false };
    let authority = uri.authority().map_or("", |it| it.as_str());
    uri.scheme_str() == Some("https")
        && server(&uri).is_ok()
        && !authority.contains('@')
        && !text.contains('#')
        && uri.port_u16() != Some(0)
}

/// Certificates in PEM, each of which a certificate may lead to.
pub fn roots(text: &str) -> Result<RootCertStore, String> {
    let blocks = pem::parse_many(text).map_err(|error| format!("it is not PEM: {error}"))?;
    let mut store = RootCertStore::empty();
    for block in blocks.iter().filter(|block| block.tag() == "CERTIFICATE") {
        let added = store.add(CertificateDer::from(block.contents().to_vec()));
        added.map_err(|error| format!("it has no certificate of a root: {error}"))?;
    }
    if store.is_empty() { Err("it has no certificate".into()) } else { Ok(store) }
}

fn server(uri: &Uri) -> Result<ServerName<'static>, String> {
    let host = uri.host().unwrap_or_default().trim_start_matches('[').trim_end_matches(']');
    ServerName::try_from(host.to_owned()).map_err(|_| format!("'{host}' is not a host"))
}

/// One that is followed.
#[derive(Debug)]
struct Followed {
    due: Instant,
    failures: u32,
    /// While it is asked.
    asks: Option<AbortHandle>,
}

/// Where it is said which URLs are named, and how.
pub type Source<T> = (watch::Receiver<Arc<T>>, fn(&T) -> BTreeSet<KeysAt>);

/// Follows what policies name. What it knows is published.
#[derive(Debug)]
pub struct Follower<T> {
    source: watch::Receiver<Arc<T>>,
    /// What of the source is wanted.
    wants: fn(&T) -> BTreeSet<KeysAt>,
    known: watch::Sender<Arc<Keys>>,
    file: PathBuf,
    metrics: Arc<Metrics>,
    times: Times,
    followed: BTreeMap<KeysAt, Followed>,
    asked: JoinSet<(KeysAt, Result<Answer, String>)>,
}

impl<T> Follower<T> {
    /// With what was fetched before the last end, of what is wanted still.
    pub fn open(state_dir: &Path, (source, wants): Source<T>, metrics: Arc<Metrics>, times: Times) -> Self {
        let file = state_dir.join("keys.json");
        let read = std::fs::read(&file).ok();
        let kept: Vec<(KeysAt, Vec<VerifyingKey>)> =
            read.and_then(|text| serde_json::from_slice(&text).ok()).unwrap_or_default();
        let fetched = kept.into_iter().map(|(at, keys)| (at, Arc::new(keys))).collect();
        let known = watch::Sender::new(Arc::new(Keys { fetched, troubles: BTreeMap::new() }));
        let (followed, asked) = (BTreeMap::new(), JoinSet::new());
        let mut follower = Self { source, wants, known, file, metrics, times, followed, asked };
        follower.follow();
        follower
    }

    /// What is known.
    pub fn known(&self) -> watch::Receiver<Arc<Keys>> {
        self.known.subscribe()
    }

    /// Asks once where no keys are known, so that a start does not refuse whom it need not.
    pub async fn first(&mut self) {
        let is_there =
            |known: &Keys, at: &KeysAt| known.fetched.contains_key(at) || known.troubles.contains_key(at);
        let all_there = |follower: &Self| {
            let known = follower.known.borrow();
            follower.followed.keys().all(|at| is_there(&known, at))
        };
        let limit = self.times.limit;
        let all = async {
            while !all_there(self) {
                self.ask();
                let Some(answered) = self.asked.join_next().await else { break };
                self.take(answered).await;
            }
        };
        let _ = timeout(limit, all).await;
    }

    /// Until it is cancelled.
    pub async fn run(mut self, cancel: CancellationToken) {
        loop {
            self.ask();
            let idle = self.followed.values().filter(|it| it.asks.is_none());
            let due = match self.asked.len() < MOST_AT_ONCE {
                true => idle.map(|it| it.due).min(),
                false => None,
            };
            let next = async {
                match due {
                    Some(due) => sleep_until(due).await,
                    None => std::future::pending().await,
                }
            };
            // Cancel-safe: none of them holds anything.
            tokio::select! {
                () = cancel.cancelled() => return,
                changed = self.source.changed() => match changed {
                    Ok(()) => self.follow(),
                    Err(_) => return,
                },
                Some(answered) = self.asked.join_next() => self.take(answered).await,
                () = next => {}
            }
        }
    }

    /// What is wanted has changed.
    fn follow(&mut self) {
        let wanted = (self.wants)(&self.source.borrow_and_update());
        for (_, gone) in self.followed.extract_if(.., |at, _| !wanted.contains(at)) {
            if let Some(asks) = gone.asks {
                asks.abort();
            }
        }
        let mut left_out = vec![];
        for at in &wanted {
            if self.followed.contains_key(at) {
                continue;
            }
            if self.followed.len() >= MAX_URLS {
                left_out.push(at.clone());
                continue;
            }
            let new = Followed { due: Instant::now(), failures: 0, asks: None };
            self.followed.insert(at.clone(), new);
        }
        self.change(|known| {
            known.fetched.retain(|at, _| wanted.contains(at));
            known.troubles.retain(|at, _| wanted.contains(at));
            let trouble = format!("more than {MAX_URLS} URLs are named, and this one is not followed");
            known.troubles.extend(left_out.into_iter().map(|at| (at, trouble.clone())));
        });
    }

    /// Asks whoever is due, as many at a time as may be.
    fn ask(&mut self) {
        let (now, limit) = (Instant::now(), self.times.limit);
        for (at, followed) in &mut self.followed {
            if self.asked.len() >= MOST_AT_ONCE {
                return;
            }
            if followed.asks.is_none() && followed.due <= now {
                let at = at.clone();
                followed.asks = Some(self.asked.spawn(async move {
                    let fetched = timeout(limit, fetch(&at)).await;
                    let late = || Err(format!("no answer within {} s", limit.as_secs_f32()));
                    (at, fetched.unwrap_or_else(|_| late()))
                }));
            }
        }
    }

    async fn take(&mut self, answered: Result<(KeysAt, Result<Answer, String>), tokio::task::JoinError>) {
        // Whoever was aborted is not followed any more.
        let Ok((at, answer)) = answered else { return };
        let Some(followed) = self.followed.get_mut(&at) else { return };
        followed.asks = None;
        self.metrics.keys_fetched(answer.is_ok());
        match answer {
            Ok(Answer { keys, max_age }) => {
                let Times { usual, bounds: (least, most), .. } = self.times;
                let after = max_age.map_or(usual, |it| it.clamp(least, most));
                (followed.failures, followed.due) = (0, Instant::now() + after);
                let mut is_new = false;
                self.change(|known| {
                    is_new = known.fetched.get(&at).is_none_or(|before| **before != keys);
                    known.troubles.remove(&at);
                    if is_new {
                        known.fetched.insert(at.clone(), Arc::new(keys));
                    }
                });
                if is_new {
                    tracing::info!(url = at.url, "an issuer's keys were fetched, and are new");
                    self.save().await;
                }
            }
            Err(trouble) => {
                let pause = self.times.retry.saturating_mul(1 << followed.failures.min(10));
                followed.failures += 1;
                followed.due = Instant::now() + pause.min(self.times.usual);
                let has_some = self.known.borrow().fetched.contains_key(&at);
                if self.known.borrow().troubles.get(&at) != Some(&trouble) {
                    let in_force =
                        if has_some { "the last good ones stay in force" } else { "its tokens are refused" };
                    tracing::warn!(url = at.url, trouble, "an issuer's keys cannot be fetched: {in_force}");
                }
                self.change(|known| drop(known.troubles.insert(at, trouble)));
            }
        }
    }

    /// Published if it makes a difference.
    fn change(&self, change: impl FnOnce(&mut Keys)) {
        self.known.send_if_modified(|known| {
            let mut next = Keys::clone(known);
            change(&mut next);
            let changed = **known != next;
            if changed {
                *known = Arc::new(next);
            }
            changed
        });
        self.metrics.keys_failing(self.known.borrow().troubles.len());
    }

    async fn save(&self) {
        let known = self.known.borrow().clone();
        let all: Vec<(&KeysAt, &Vec<VerifyingKey>)> =
            known.fetched.iter().map(|(at, keys)| (at, keys.as_ref())).collect();
        let text = serde_json::to_vec(&all).unwrap_or_default();
        let file = self.file.clone();
        let saved = match tokio::task::spawn_blocking(move || store::replace(&file, &text)).await {
            Ok(saved) => saved.map_err(|error| error.to_string()),
            Err(error) => Err(error.to_string()),
        };
        if self.metrics.unsaved.tried(Part::Keys, &saved)
            && let Err(error) = saved
        {
            tracing::error!(%error, "issuers' keys would not survive a restart");
        }
    }
}

/// A set that was fetched.
#[derive(Debug)]
struct Answer {
    keys: Vec<VerifyingKey>,
    max_age: Option<Duration>,
}

async fn fetch(at: &KeysAt) -> Result<Answer, String> {
    let uri: Uri = at.url.parse().map_err(|_| "it is no URL".to_owned())?;
    let server = server(&uri)?;
    let roots = if at.ca_bundle.is_empty() { of_system()? } else { self::roots(&at.ca_bundle)? };
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(|error| error.to_string())?
        .with_root_certificates(roots)
        .with_no_client_auth();
    let host = server.to_str().into_owned();
    let stream = TcpStream::connect((host.as_str(), uri.port_u16().unwrap_or(443))).await;
    let stream = stream.map_err(|error| format!("no connection: {error}"))?;
    let stream = TlsConnector::from(Arc::new(config)).connect(server, stream).await;
    let stream = stream.map_err(|error| format!("no TLS: {error}"))?;
    let unspoken = |error: hyper::Error| format!("no answer: {error}");
    let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await.map_err(unspoken)?;
    let request = Request::get(uri.path_and_query().map_or("/", |it| it.as_str()))
        .header(header::HOST, uri.authority().map_or(host.as_str(), |it| it.as_str()))
        .header(header::ACCEPT, "application/jwk-set+json, application/json")
        .header(header::USER_AGENT, concat!("nodemesh/", env!("CARGO_PKG_VERSION")))
        .body(Empty::<Bytes>::new())
        .map_err(|error| error.to_string())?;
    let asked = async {
        let response = sender.send_request(request).await.map_err(unspoken)?;
        if response.status() != StatusCode::OK {
            return Err(format!("it answers with {}", response.status()));
        }
        let max_age = max_age(response.headers());
        let body = Limited::new(response.into_body(), jwks::MAX_SET).collect().await;
        let body = body.map_err(|error| format!("its answer cannot be read: {error}"))?;
        let keys = jwks::parse(&body.to_bytes())
            .map_err(|error| format!("its answer is no set of keys: {error}"))?;
        Ok(Answer { keys, max_age })
    };
    // However the connection ends, what is asked by it ends then, too, and knows better how.
    let carried = async {
        let _ = connection.await;
        std::future::pending().await
    };
    tokio::select! {
        answer = asked => answer,
        never = carried => never,
    }
}

/// Variables by which whoever runs the controller says which roots its system has.
const NAMED: [&str; 2] = ["SSL_CERT_FILE", "SSL_CERT_DIR"];

fn of_system() -> Result<RootCertStore, String> {
    let found = rustls_native_certs::load_native_certs().certs;
    trusted(found, NAMED.into_iter().find(|name| std::env::var_os(name).is_some()))
}

/// What the system has; where it has nothing and nobody has said that it should, as in an image that has no files of roots, those
/// that browsers trust.
fn trusted(found: Vec<CertificateDer<'static>>, named: Option<&str>) -> Result<RootCertStore, String> {
    let mut store = RootCertStore::empty();
    store.add_parsable_certificates(found);
    match named {
        _ if !store.is_empty() => {}
        Some(named) => {
            return Err(format!("there are no roots where {named} says: mend that, or give caBundle"));
        }
        None => store.extend(webpki_roots::TLS_SERVER_ROOTS.iter().cloned()),
    }
    Ok(store)
}

/// RFC 9111, section 5.2.2.1; nothing where it must not be kept at all.
fn max_age(headers: &HeaderMap) -> Option<Duration> {
    let texts = headers.get_all(header::CACHE_CONTROL).iter().filter_map(|value| value.to_str().ok());
    let mut directives = texts.flat_map(|text| text.split(',')).map(str::trim);
    let seconds =
        directives.find_map(|it| it.to_ascii_lowercase().strip_prefix("max-age=").map(str::to_owned));
    seconds?.trim_matches('"').parse().ok().map(Duration::from_secs)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn without_roots_of_its_system_a_controller_trusts_those_of_browsers_unless_others_were_named() {
        assert!(trusted(vec![], None).unwrap().len() > 100);
        let error = trusted(vec![], Some("SSL_CERT_FILE")).unwrap_err();
        assert!(error.contains("SSL_CERT_FILE") && error.contains("caBundle"), "{error}");
        let key = rcgen::KeyPair::generate().unwrap();
        let own = rcgen::CertificateParams::default().self_signed(&key).unwrap();
        for named in [None, Some("SSL_CERT_FILE")] {
            let store = trusted(vec![own.der().clone()], named).unwrap();
            assert_eq!(store.len(), 1, "what there is is all that is trusted");
        }
    }
}
