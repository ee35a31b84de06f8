//! Keys of issuers by URL, from real servers over TLS: when they are fetched, what is taken, and what stays in force while
//! nothing can be.

// A test's unwrap is its failure.
#![allow(clippy::unwrap_used)]

use std::{
    collections::BTreeSet,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use mesh_controller::{
    jwks::{Follower, Keys, Times},
    metrics::Metrics,
    model::KeysAt,
};
use mesh_core::model::{KeyMaterial, VerifyingKey};
use rcgen::{CertificateParams, KeyPair};
use rustls::ServerConfig;
use rustls_pki_types::PrivateKeyDer;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpListener,
    sync::watch,
    task::JoinHandle,
    time::timeout,
};
use tokio_rustls::TlsAcceptor;
use tokio_util::sync::CancellationToken;

const TIMES: Times = Times {
    limit: Duration::from_millis(500),
    usual: Duration::from_millis(40),
    bounds: (Duration::from_millis(20), Duration::from_secs(3600)),
    retry: Duration::from_millis(10),
};

/// A server that says what it is told to, to every request; nothing: it only listens.
struct Issuer {
    at: KeysAt,
    says: Arc<Mutex<Vec<u8>>>,
    asked: Arc<AtomicUsize>,
    task: JoinHandle<()>,
}

impl Issuer {
    async fn new(says: Vec<u8>) -> Self {
        let key = KeyPair::generate().unwrap();
        let params = CertificateParams::new(vec!["127.0.0.1".to_owned()]).unwrap();
        let certificate = params.self_signed(&key).unwrap();
        let config = ServerConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(
                vec![certificate.der().clone()],
                PrivateKeyDer::try_from(key.serialize_der()).unwrap(),
            )
            .unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("https://{}/keys?v=1", listener.local_addr().unwrap());
        let (says, asked) = (Arc::new(Mutex::new(says)), Arc::new(AtomicUsize::new(0)));
        let (answer, count) = (says.clone(), asked.clone());
        let task = tokio::spawn(async move {
            let acceptor = TlsAcceptor::from(Arc::new(config));
            while let Ok((stream, _)) = listener.accept().await {
                let (acceptor, answer, count) = (acceptor.clone(), answer.clone(), count.clone());
                tokio::spawn(async move {
                    let Ok(mut stream) = acceptor.accept(stream).await else { return };
                    let mut request = [0; 4096];
                    let read = stream.read(&mut request).await.unwrap_or_default();
                    assert!(request[..read].starts_with(b"GET /keys?v=1 HTTP/1.1\r\n"));
                    count.fetch_add(1, Ordering::Relaxed);
                    let answer = answer.lock().unwrap().clone();
                    if answer.is_empty() {
                        std::future::pending::<()>().await;
                    }
                    let _ = stream.write_all(&answer).await;
                    let _ = stream.shutdown().await;
                });
            }
        });
        Self { at: KeysAt { url, ca_bundle: certificate.pem() }, says, asked, task }
    }

    fn say(&self, answer: Vec<u8>) {
        *self.says.lock().unwrap() = answer;
    }

    fn asked(&self) -> usize {
        self.asked.load(Ordering::Relaxed)
    }
}

fn answer(status: &str, headers: &str, body: &str) -> Vec<u8> {
    format!("HTTP/1.1 {status}\r\ncontent-length: {}\r\n{headers}\r\n{body}", body.len()).into_bytes()
}

/// A set with one key, of which each byte is this one.
fn set(byte: u8) -> String {
    let x = match byte {
        1 => "AQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQE",
        2 => "AgICAgICAgICAgICAgICAgICAgICAgICAgICAgICAgI",
        _ => "AwMDAwMDAwMDAwMDAwMDAwMDAwMDAwMDAwMDAwMDAwM",
    };
    format!("{{\"keys\": [{{\"kty\": \"OKP\", \"crv\": \"Ed25519\", \"kid\": \"k\", \"x\": \"{x}\"}}]}}")
}

fn good(byte: u8) -> Vec<u8> {
    answer("200 OK", "", &set(byte))
}

fn of(byte: u8) -> Option<Arc<Vec<VerifyingKey>>> {
    let material = KeyMaterial::Ed25519(vec![byte; 32]);
    Some(Arc::new(vec![VerifyingKey { id: "k".into(), algorithm: None, material }]))
}

/// What follows some URLs.
struct Bed {
    wanted: watch::Sender<Arc<BTreeSet<KeysAt>>>,
    known: watch::Receiver<Arc<Keys>>,
    metrics: Arc<Metrics>,
    cancel: CancellationToken,
    dir: tempfile::TempDir,
}

impl Bed {
    fn follower(&self) -> Follower<BTreeSet<KeysAt>> {
        let wanted = (self.wanted.subscribe(), BTreeSet::clone as fn(&BTreeSet<KeysAt>) -> _);
        Follower::open(self.dir.path(), wanted, self.metrics.clone(), TIMES)
    }

    fn new(of: &[&Issuer]) -> Self {
        let wanted = watch::Sender::new(Arc::new(of.iter().map(|it| it.at.clone()).collect()));
        let known = watch::channel(Arc::default()).1;
        let dir = tempfile::tempdir().unwrap();
        let mut bed = Self { wanted, known, metrics: Arc::default(), cancel: CancellationToken::new(), dir };
        let follower = bed.follower();
        bed.known = follower.known();
        tokio::spawn(follower.run(bed.cancel.clone()));
        bed
    }

    async fn wait(&mut self, what: &str, is: impl FnMut(&Arc<Keys>) -> bool) {
        let waited = timeout(Duration::from_secs(20), self.known.wait_for(is)).await;
        let in_time = waited.map(|is| drop(is.unwrap()));
        in_time.unwrap_or_else(|_| panic!("{what}: {:?}", self.known.borrow()));
    }

    async fn wait_for(&mut self, issuer: &Issuer, byte: u8) {
        let at = issuer.at.clone();
        let is = |known: &Arc<Keys>| {
            known.fetched.get(&at).cloned() == of(byte) && !known.troubles.contains_key(&at)
        };
        self.wait("the keys are fetched", is).await;
    }
}

impl Drop for Bed {
    fn drop(&mut self) {
        self.cancel.cancel();
    }
}

#[tokio::test]
async fn keys_rotate_and_the_last_good_ones_stay_in_force() {
    let issuer = Issuer::new(good(1)).await;
    let mut bed = Bed::new(&[&issuer]);
    bed.wait_for(&issuer, 1).await;
    issuer.say(good(2));
    bed.wait_for(&issuer, 2).await;
    let big = format!("{}{}", set(3), " ".repeat(64 * 1024));
    for (says, trouble) in [
        (answer("500 Internal Server Error", "", &set(3)), "it answers with 500"),
        (answer("302 Found", "location: https://127.0.0.1/\r\n", ""), "it answers with 302"),
        (answer("200 OK", "", "<html>"), "no set of keys"),
        (answer("200 OK", "", "{\"keys\": []}"), "none of its keys"),
        (answer("200 OK", "", &big), "cannot be read"),
        (format!("HTTP/1.1 200 OK\r\ncontent-length: 500\r\n\r\n{}", set(3)).into_bytes(), ""),
        (b"SSH-2.0\r\n\r\n".to_vec(), "no answer"),
        (vec![], "no answer within"),
    ] {
        issuer.say(says);
        let at = issuer.at.clone();
        let is = |known: &Arc<Keys>| {
            assert_eq!(known.fetched.get(&at).cloned(), of(2), "{trouble}");
            known.troubles.get(&at).is_some_and(|it| it.contains(trouble))
        };
        bed.wait(trouble, is).await;
        assert!(bed.metrics.text().contains("nodemesh_keys_failing 1\n"), "{}", bed.metrics.text());
        issuer.say(good(2));
        bed.wait_for(&issuer, 2).await;
    }
    issuer.say(good(3));
    bed.wait_for(&issuer, 3).await;
    assert!(bed.metrics.text().contains("nodemesh_keys_failing 0\n"));
    assert!(bed.metrics.text().contains("nodemesh_keys_fetched_total{result=\"failed\"}"));

    // What nobody names any more is not asked, and not known.
    bed.wanted.send_replace(Arc::default());
    bed.wait("it is gone", |known| known.fetched.is_empty() && known.troubles.is_empty()).await;
}

#[tokio::test]
async fn what_was_fetched_survives_a_restart_without_its_issuer() {
    let issuer = Issuer::new(good(1)).await;
    let mut bed = Bed::new(&[&issuer]);
    bed.wait_for(&issuer, 1).await;
    let saved = || std::fs::metadata(bed.dir.path().join("keys.json")).is_ok();
    timeout(Duration::from_secs(20), async {
        while !saved() {
            tokio::task::yield_now().await;
        }
    })
    .await
    .unwrap();
    issuer.task.abort();
    let mut again = bed.follower();
    again.first().await;
    assert_eq!(again.known().borrow().fetched.get(&issuer.at).cloned(), of(1));

    // Nor does a start wait for an issuer that never was there.
    let nobody = KeysAt { url: "https://127.0.0.1:1/keys".into(), ..issuer.at.clone() };
    bed.wanted.send_replace(Arc::new([nobody.clone(), issuer.at.clone()].into()));
    let mut again = bed.follower();
    timeout(Duration::from_secs(20), again.first()).await.unwrap();
    let known = again.known().borrow().clone();
    assert!(known.troubles[&nobody].contains("no connection"), "{known:?}");
    assert_eq!(known.fetched.get(&issuer.at).cloned(), of(1));
}

#[tokio::test]
async fn an_issuer_that_proves_nothing_is_not_believed() {
    let (issuer, other) = (Issuer::new(good(1)).await, Issuer::new(good(2)).await);
    let mut bed = Bed::new(&[]);
    for ca_bundle in [other.at.ca_bundle.clone(), String::new()] {
        let at = KeysAt { ca_bundle, ..issuer.at.clone() };
        bed.wanted.send_replace(Arc::new([at.clone()].into()));
        bed.wait("it is refused", |known| known.troubles.contains_key(&at)).await;
        assert!(!bed.known.borrow().fetched.contains_key(&at));
    }
    assert_eq!(issuer.asked(), 0);
}

#[tokio::test]
async fn an_answer_says_for_how_long_it_is_good() {
    let (long, short) = (
        Issuer::new(answer("200 OK", "cache-control: public, max-age=3000\r\n", &set(1))).await,
        Issuer::new(answer("200 OK", "cache-control: max-age=0\r\n", &set(2))).await,
    );
    let mut bed = Bed::new(&[&long, &short]);
    bed.wait_for(&long, 1).await;
    timeout(Duration::from_secs(20), async {
        while short.asked() < 6 {
            tokio::task::yield_now().await;
        }
    })
    .await
    .unwrap();
    assert_eq!(long.asked(), 1);
    assert_eq!(bed.known.borrow().fetched.len(), 2);
}
