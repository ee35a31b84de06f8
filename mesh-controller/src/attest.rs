//! Which node an agent runs on, by Kubernetes' word: its pod's service-account token, which the kubelet made for that pod
//! and our audience, and which the API server reviews.
//!
//! Stands apart from [`token`](crate::token): nothing of these is kept here, and none is used up. Invariant: nothing is
//! believed that is only in the token; what is read there beforehand can refuse it with a better reason, and spares the
//! API server the review.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
use k8s_openapi::api::{
    authentication::v1::{TokenReview, TokenReviewSpec, TokenReviewStatus, UserInfo},
    core::v1::Pod,
};
use kube::{Api, Client, api::PostParams};
use mesh_core::model::Name;
use serde::Deserialize;

/// What tokens have to be made for: one for the API server, or for somebody else, makes nobody a node.
pub const AUDIENCE: &str = "nodemesh";
/// How long the API server may take; below an agent's limit for a call.
const REVIEW_TIMEOUT: Duration = Duration::from_secs(8);
/// Longest token that is looked at, characters: ten times what the API server makes.
const MAX_LEN: usize = 16 * 1024;
/// Longest text of the API server or of a token that is repeated, characters.
const MAX_SHOWN: usize = 300;

/// What a review says of the pod and its node; the last since Kubernetes 1.30.
const POD_NAME: &str = "authentication.kubernetes.io/pod-name";
const POD_UID: &str = "authentication.kubernetes.io/pod-uid";
const NODE_NAME: &str = "authentication.kubernetes.io/node-name";

/// Why a service-account token does not make its bearer a node.
#[derive(Debug, thiserror::Error)]
pub enum AttestError {
    /// No such joins.
    #[error(
        "this controller takes no service-account tokens: start it with --join-service-account, or join with a token of \
         mesh-controller token"
    )]
    Off,
    /// Not a token.
    #[error("not a service-account token: mount a projected one, with the audience {AUDIENCE}")]
    Malformed,
    /// Its time has passed.
    #[error("the service-account token expired {0} s ago: read the file again, the kubelet renews it there")]
    Expired(u64),
    /// Made for somebody else.
    #[error(
        "the service-account token is for the audience {found}, not {AUDIENCE}: set audience: {AUDIENCE} in the projected \
         volume"
    )]
    Audience {
        /// For whom it was made.
        found: String,
    },
    /// Another account.
    #[error(
        "the token is of the service account {found}, agents run as {expected}: compare --join-service-account"
    )]
    Account {
        /// Whose it is.
        found: String,
        /// Whose it has to be.
        expected: Name,
    },
    /// No pod.
    #[error(
        "the service-account token is bound to no pod on a node: use a projected one, mounted into the agent's pod"
    )]
    Unbound,
    /// The pod is gone, or another has its name.
    #[error("the pod {pod} of the service-account token is gone: use the token of a pod that runs")]
    PodGone {
        /// Which.
        pod: String,
    },
    /// Another node's.
    #[error(
        "the token's pod runs on node {found}, and the node {claimed} was claimed: compare the agent's --node"
    )]
    OtherNode {
        /// Where it runs.
        found: String,
        /// Where the agent says that it runs.
        claimed: String,
    },
    /// The API server does not take it.
    #[error(
        "the API server does not take the service-account token: {0}; a token of a pod that is gone is never taken again"
    )]
    Refused(String),
    /// We may not ask.
    #[error(
        "the controller may not ask the API server about tokens: {0}; let its service account create \
         tokenreviews.authentication.k8s.io and get pods of its namespace, as its ClusterRole and Role in the chart do"
    )]
    Forbidden(String),
    /// The API server cannot be asked.
    #[error("the API server cannot be asked about the service-account token: {0}; it is tried again")]
    Unreachable(String),
}

/// What reviews tokens.
#[derive(Clone)]
pub struct Attestor {
    client: Client,
    account: Name,
}

impl std::fmt::Debug for Attestor {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Attestor").field("account", &self.account).finish_non_exhaustive()
    }
}

impl Attestor {
    /// Believes this service account's pods, by the word of this API server.
    pub fn new(client: Client, account: Name) -> Self {
        Self { client, account }
    }

    /// Checks that a token is of an agent's pod on this node.
    pub async fn check(&self, token: &str, node: &str, now: SystemTime) -> Result<(), AttestError> {
        Claims::read(token)?.check(&self.account, now)?;
        let found = tokio::time::timeout(REVIEW_TIMEOUT, self.node_of(token))
            .await
            .map_err(|_| AttestError::Unreachable(format!("no answer within {REVIEW_TIMEOUT:?}")))??;
        if found == node { Ok(()) } else { Err(AttestError::OtherNode { found, claimed: shown(node) }) }
    }

    /// The node of the token's pod.
    async fn node_of(&self, token: &str) -> Result<String, AttestError> {
        let spec =
            TokenReviewSpec { audiences: Some(vec![AUDIENCE.to_owned()]), token: Some(token.to_owned()) };
        let review = TokenReview { spec, ..TokenReview::default() };
        let reviews: Api<TokenReview> = Api::all(self.client.clone());
        let status = reviews.create(&PostParams::default(), &review).await.map_err(unreachable)?.status;
        let user = reviewed(status.unwrap_or_default())?;
        let account = user.username.as_deref().unwrap_or_default();
        if account != username(&self.account) {
            return Err(AttestError::Account { found: shown(account), expected: self.account.clone() });
        }
        let (Some(pod), Some(uid)) = (extra(&user, POD_NAME), extra(&user, POD_UID)) else {
            return Err(AttestError::Unbound);
        };
        match extra(&user, NODE_NAME) {
            Some(node) => Ok(node.to_owned()),
            None => self.node_of_pod(pod, uid).await,
        }
    }

    /// The node of the pod with this name, if it still is the one with this uid.
    async fn node_of_pod(&self, name: &str, uid: &str) -> Result<String, AttestError> {
        let pods: Api<Pod> = Api::namespaced(self.client.clone(), &self.account.namespace);
        let gone = || AttestError::PodGone { pod: shown(name) };
        let pod = pods.get_opt(name).await.map_err(unreachable)?.ok_or_else(gone)?;
        if pod.metadata.uid.as_deref() != Some(uid) {
            return Err(gone());
        }
        pod.spec.and_then(|spec| spec.node_name).ok_or(AttestError::Unbound)
    }
}

/// Whom a review says that the token is of.
fn reviewed(status: TokenReviewStatus) -> Result<UserInfo, AttestError> {
    if status.authenticated != Some(true) {
        return Err(AttestError::Refused(shown(
            &status.error.unwrap_or_else(|| "it says no more".to_owned()),
        )));
    }
    // A server that does not know of audiences says yes to a token for anybody, and names none.
    let audiences = status.audiences.unwrap_or_default();
    if !audiences.iter().any(|it| it == AUDIENCE) {
        return Err(AttestError::Audience { found: shown(&audiences.join(", ")) });
    }
    Ok(status.user.unwrap_or_default())
}

fn extra<'a>(user: &'a UserInfo, key: &str) -> Option<&'a str> {
    user.extra.as_ref()?.get(key)?.first().map(String::as_str)
}

fn username(account: &Name) -> String {
    format!("system:serviceaccount:{}:{}", account.namespace, account.name)
}

fn unreachable(error: kube::Error) -> AttestError {
    match error {
        kube::Error::Api(status) if matches!(status.code, 401 | 403) => {
            AttestError::Forbidden(shown(&status.message))
        }
        kube::Error::Api(status) => AttestError::Unreachable(shown(&status.message)),
        other => AttestError::Unreachable(shown(&other.to_string())),
    }
}

fn shown(text: &str) -> String {
    text.chars().take(MAX_SHOWN).filter(|c| !c.is_control()).collect()
}

/// What a token says of itself (RFC 7519 §4.1); not to be believed.
#[derive(Debug, Deserialize)]
struct Claims {
    sub: String,
    aud: Audience,
    exp: u64,
}

/// One or several.
#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum Audience {
    One(String),
    Several(Vec<String>),
}

impl Claims {
    fn read(token: &str) -> Result<Self, AttestError> {
        let mut parts = token.split('.');
        let (Some(_), Some(claims), Some(_), None) = (parts.next(), parts.next(), parts.next(), parts.next())
        else {
            return Err(AttestError::Malformed);
        };
        if token.len() > MAX_LEN {
            return Err(AttestError::Malformed);
        }
        let bytes = URL_SAFE_NO_PAD.decode(claims).map_err(|_| AttestError::Malformed)?;
        serde_json::from_slice(&bytes).map_err(|_| AttestError::Malformed)
    }

    fn check(&self, account: &Name, now: SystemTime) -> Result<(), AttestError> {
        let audiences = match &self.aud {
            Audience::One(one) => std::slice::from_ref(one),
            Audience::Several(several) => several,
        };
        if !audiences.iter().any(|it| it == AUDIENCE) {
            return Err(AttestError::Audience { found: shown(&audiences.join(", ")) });
        }
        if self.sub != username(account) {
            return Err(AttestError::Account { found: shown(&self.sub), expected: account.clone() });
        }
        let now = now.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
        // Clocks differ; whether it is too old to the second is the API server's to say.
        match now.checked_sub(self.exp) {
            Some(ago) if ago > 60 => Err(AttestError::Expired(ago)),
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{
        convert::Infallible,
        sync::{Arc, Mutex},
    };

    use http_body_util::{BodyExt, Full};
    use hyper::{Request, Response, body::Bytes};
    use kube::client::Body;
    use serde_json::{Value, json};

    use super::*;

    fn now() -> SystemTime {
        UNIX_EPOCH + Duration::from_secs(1_800_000_000)
    }

    fn account() -> Name {
        Name::new("nodemesh-system", "nodemesh-agent")
    }

    fn token(change: impl FnOnce(&mut Value)) -> String {
        let mut claims = json!({
            "sub": "system:serviceaccount:nodemesh-system:nodemesh-agent", "aud": ["nodemesh"], "exp": 1_800_003_600_u64,
        });
        change(&mut claims);
        format!("e30.{}.c2ln", URL_SAFE_NO_PAD.encode(claims.to_string()))
    }

    /// What a review says of a token of a pod on `node-a`.
    fn good() -> Value {
        json!({
            "authenticated": true,
            "audiences": ["nodemesh"],
            "user": {
                "username": "system:serviceaccount:nodemesh-system:nodemesh-agent",
                "extra": {POD_NAME: ["agent-x"], POD_UID: ["u-1"], NODE_NAME: ["node-a"]},
            },
        })
    }

    /// An API server that answers reviews with a status, and pods with what it has; and what it was asked.
    fn server(review: (u16, Value), pod: Option<Value>) -> (Attestor, Arc<Mutex<Vec<String>>>) {
        let asked = Arc::new(Mutex::new(vec![]));
        let log = asked.clone();
        let service = tower::service_fn(move |request: Request<Body>| {
            let (review, pod, log) = (review.clone(), pod.clone(), log.clone());
            async move {
                let path = request.uri().path().to_owned();
                log.lock().unwrap().push(path.clone());
                let body = request.into_body().collect().await.unwrap().to_bytes();
                let (code, answer) = if path.ends_with("/tokenreviews") {
                    let mut object: Value = serde_json::from_slice(&body).unwrap();
                    assert_eq!(
                        object["spec"]["audiences"],
                        json!([AUDIENCE]),
                        "asked for our audience alone"
                    );
                    match review.0 {
                        201 => object["status"] = review.1,
                        _ => object = review.1,
                    }
                    (review.0, object)
                } else {
                    let missing =
                        json!({"kind": "Status", "status": "Failure", "reason": "NotFound", "code": 404});
                    (if pod.is_some() { 200 } else { 404 }, pod.unwrap_or(missing))
                };
                let answer = Full::new(Bytes::from(answer.to_string()));
                Ok::<_, Infallible>(Response::builder().status(code).body(answer).unwrap())
            }
        });
        (Attestor::new(Client::new(service, "default"), account()), asked)
    }

    async fn check(review: Value, node: &str) -> Result<(), String> {
        let (attestor, _) = server((201, review), None);
        attestor.check(&token(|_| {}), node, now()).await.map_err(|error| error.to_string())
    }

    #[tokio::test]
    async fn a_pods_token_makes_its_own_node_and_no_other() {
        check(good(), "node-a").await.unwrap();
        let other = check(good(), "node-b").await.unwrap_err();
        assert!(other.contains("runs on node node-a") && other.contains("node-b was claimed"), "{other}");
    }

    #[tokio::test]
    async fn what_the_review_says_is_what_counts() {
        for (change, expected) in [
            (json!({"authenticated": false, "error": "it has been invalidated"}), "has been invalidated"),
            (json!({"authenticated": true, "user": good()["user"]}), "for the audience"),
            (
                json!({"authenticated": true, "audiences": ["other"], "user": good()["user"]}),
                "for the audience other",
            ),
            (
                json!({"authenticated": true, "audiences": ["nodemesh"], "user": {"username": "system:serviceaccount:shop:web"}}),
                "system:serviceaccount:shop:web, agents run as nodemesh-system/nodemesh-agent",
            ),
            (
                json!({"authenticated": true, "audiences": ["nodemesh"], "user": {"username": username(&account())}}),
                "bound to no pod",
            ),
            (Value::Null, "does not take"),
        ] {
            let refused = check(change.clone(), "node-a").await.unwrap_err();
            assert!(refused.contains(expected), "{change}: {refused}");
        }
    }

    #[tokio::test]
    async fn what_a_token_says_itself_can_only_refuse_it_and_spares_the_review() {
        let (attestor, asked) = server((201, good()), None);
        for (token, expected) in [
            (String::new(), "not a service-account token"),
            ("nm1.a.b.c".into(), "not a service-account token"),
            ("a.b.c".into(), "not a service-account token"),
            ("x".repeat(MAX_LEN + 1), "not a service-account token"),
            (token(|it| it["aud"] = json!("https://kubernetes.default.svc")), "set audience: nodemesh"),
            (token(|it| it["aud"] = json!([])), "set audience: nodemesh"),
            (
                token(|it| it["sub"] = json!("system:serviceaccount:shop:web")),
                "compare --join-service-account",
            ),
            (token(|it| it["exp"] = json!(1_799_999_000)), "expired 1000 s ago"),
        ] {
            let refused = attestor.check(&token, "node-a", now()).await.unwrap_err().to_string();
            assert!(refused.contains(expected), "{token}: {refused}");
        }
        assert!(asked.lock().unwrap().is_empty());
    }

    #[tokio::test]
    async fn where_a_review_names_no_node_the_pod_does_and_only_the_one_with_its_uid() {
        let mut review = good();
        review["user"]["extra"].as_object_mut().unwrap().remove(NODE_NAME);
        let pod = |uid: &str| json!({"metadata": {"name": "agent-x", "uid": uid}, "spec": {"nodeName": "node-a", "containers": []}});
        for (pod, expected) in [
            (Some(pod("u-1")), None),
            (Some(pod("u-2")), Some("agent-x of the service-account token is gone")),
            (None, Some("agent-x of the service-account token is gone")),
        ] {
            let (attestor, asked) = server((201, review.clone()), pod);
            let checked =
                attestor.check(&token(|_| {}), "node-a", now()).await.map_err(|error| error.to_string());
            assert_eq!(
                checked.as_ref().err().map(|it| it.contains(expected.unwrap_or("-"))),
                expected.map(|_| true),
                "{checked:?}"
            );
            assert!(asked.lock().unwrap()[1].ends_with("/namespaces/nodemesh-system/pods/agent-x"));
        }
    }

    #[tokio::test]
    async fn an_api_server_that_fails_or_forbids_refuses_nobody_for_good() {
        let status = |code: u16, text: &str| json!({"kind": "Status", "status": "Failure", "message": text, "code": code});
        let (attestor, _) = server((500, status(500, "etcd is away")), None);
        let error = attestor.check(&token(|_| {}), "node-a", now()).await.unwrap_err();
        assert!(matches!(&error, AttestError::Unreachable(text) if text.contains("etcd is away")), "{error}");
        let (attestor, _) = server((403, status(403, "cannot create resource")), None);
        let error = attestor.check(&token(|_| {}), "node-a", now()).await.unwrap_err();
        assert!(
            matches!(&error, AttestError::Forbidden(_)) && error.to_string().contains("tokenreviews"),
            "{error}"
        );
    }
}
