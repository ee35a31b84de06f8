//! What became of every object of ours and of every route, written where its author looks: into its status. One
//! controller of all writes; a burst of changes is one round, and what says the same already is not written again.
//!
//! | module | what |
//! |---|---|
//! | [`verdict`] | one condition, and whether it is said |
//! | [`route`] | the status of a route, which others write too |

mod route;
mod verdict;

use std::{collections::BTreeMap, fmt, sync::Arc, time::Duration};

use k8s_openapi::{apimachinery::pkg::apis::meta::v1::Condition, jiff::Timestamp};
use kube::{
    Api, Client, ResourceExt,
    api::{DynamicObject, Patch, PatchParams},
};
use serde_json::{Value, json};
use tokio::{
    sync::watch,
    time::{Instant, sleep_until, timeout},
};
use tokio_util::sync::CancellationToken;

use self::{
    route::Attached,
    verdict::{ACCEPTED, Verdict, conditions},
};
use super::{lease::Term, objects::Followed, resource};
use crate::{
    jwks::Keys,
    model::{KeysAt, Kind, Object},
    routes::{Outcome, Unread},
    source::{Presence, Refused},
    traffic,
};

/// Who writes, to the API server.
const WRITER: &str = "nodemesh-controller";
/// After a change, how long others are waited for, so that a burst is one round.
const BATCH: Duration = Duration::from_millis(200);
/// How long a write may take.
const WRITE: Duration = Duration::from_secs(2);
/// After a write failed, how long until it is tried again.
const RETRY: Duration = Duration::from_secs(2);

/// An object whose status is written.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Subject {
    of: Followed,
    /// `apiVersion`, as the cluster serves it.
    api_version: String,
    namespace: String,
    name: String,
    uid: String,
    /// `metadata.resourceVersion`.
    version: String,
    generation: i64,
    said: Said,
}

/// What its status says.
#[derive(Debug, Clone, PartialEq)]
enum Said {
    /// Of an object of ours: its conditions.
    Conditions(Vec<Condition>),
    /// Of a route.
    Route(Attached),
}

impl Subject {
    pub(super) fn new(of: Followed, object: &DynamicObject) -> Self {
        let served = object.types.as_ref().map(|it| it.api_version.as_str());
        let api_version = served.or_else(|| Some(of.defined()?.api_version())).unwrap_or_default();
        Self {
            of,
            api_version: api_version.to_owned(),
            namespace: object.namespace().unwrap_or_default(),
            name: object.name_any(),
            uid: object.uid().unwrap_or_default(),
            version: object.resource_version().unwrap_or_default(),
            generation: object.metadata.generation.unwrap_or_default(),
            said: match of.route() {
                Some(_) => Said::Route(Attached::of(object)),
                None => Said::Conditions(conditions(&object.data["status"])),
            },
        }
    }
}

/// Whether the newest keys of a policy's issuers are in force, where they are named by a URL.
const KEYS_FETCHED: &str = "KeysFetched";

/// What is said of them.
fn keys_fetched(object: &Object, keys: &Keys) -> Option<Verdict> {
    let Object::AuthenticationPolicy(policy) = object else { return None };
    if policy.elsewhere.is_empty() {
        return None;
    }
    let trouble = |at: &KeysAt| {
        let in_force = match keys.fetched.contains_key(at) {
            true => "the last good keys stay in force",
            false => "tokens of the issuer are refused until there are some",
        };
        keys.troubles.get(at).map(|it| format!("{}: {it}; {in_force}.", at.url))
    };
    let troubles: Vec<String> = policy.elsewhere.iter().filter_map(|(_, at)| trouble(at)).collect();
    let waits = policy.elsewhere.iter().any(|(_, at)| !keys.fetched.contains_key(at));
    Some(match (troubles.is_empty(), waits) {
        (false, _) => Verdict::new(KEYS_FETCHED, false, "FetchFailed", &troubles.join(" ")),
        (true, true) => Verdict::new(KEYS_FETCHED, false, "Pending", "The keys are being fetched."),
        (true, false) => Verdict::new(KEYS_FETCHED, true, "Fetched", "The newest keys are in force."),
    })
}

/// What became of an object.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Standing {
    subject: Subject,
    told: Told,
}

/// What its status has to say.
#[derive(Debug, Clone, PartialEq)]
enum Told {
    /// Of an object of ours.
    Own(Vec<Verdict>),
    /// Of a route, for each of its parents that is a Service, by their places.
    Route(Vec<(usize, Vec<Verdict>)>),
}

/// What became of an object that refers to others.
#[derive(Debug, Clone, Copy)]
pub(super) enum Became<'a> {
    /// Of a route.
    Route(&'a Outcome),
    /// Of a policy on traffic, with what it says of requests that are not read.
    Traffic(&'a traffic::Outcome, &'a [Unread]),
    /// Of a policy on end users, which is in force: itself, and what is known of its issuers' keys.
    OfUsers(&'a Object, &'a Keys),
}

impl Standing {
    /// `problems`: all that was said of its document.
    pub(super) fn new(subject: Subject, problems: &[&Refused], became: Option<Became<'_>>) -> Self {
        let outcome = match became {
            Some(Became::Route(outcome)) => Some(outcome),
            _ => None,
        };
        let told = match (&subject.said, became) {
            (Said::Route(attached), _) => Told::Route(attached.verdicts(problems, outcome)),
            (Said::Conditions(_), Some(Became::Traffic(outcome, unread))) if problems.is_empty() => {
                Told::Own(
                    [Some(of_traffic(outcome, unread)), requests_read(unread)]
                        .into_iter()
                        .flatten()
                        .collect(),
                )
            }
            (Said::Conditions(_), became) => {
                let accepted = match problems.is_empty() {
                    true => Verdict::new(ACCEPTED, true, "Accepted", "It is in force."),
                    false => Verdict::refused("Invalid", problems),
                };
                let keys = match became {
                    Some(Became::OfUsers(policy, keys)) => keys_fetched(policy, keys),
                    _ => None,
                };
                Told::Own([Some(accepted), keys].into_iter().flatten().collect())
            }
        };
        Self { subject, told }
    }

    /// What has to be written, if anything has.
    fn missing(&self, now: Timestamp) -> Option<Patch<Value>> {
        let Subject { api_version, namespace, name, uid, version, generation, said, .. } = &self.subject;
        match (said, &self.told) {
            (Said::Conditions(said), Told::Own(verdicts)) => {
                // What is said no more is taken away by leaving it out: the field is ours.
                let told = verdicts.iter().all(|it| it.is_told(said, *generation));
                let left_over = said.iter().any(|it| {
                    let comes_and_goes = [KEYS_FETCHED, REQUESTS_READ].contains(&it.type_.as_str());
                    comes_and_goes && verdicts.iter().all(|verdict| verdict.of != it.type_)
                });
                (!told || left_over).then(|| {
                    let conditions: Vec<Condition> =
                        verdicts.iter().map(|it| it.condition(said, *generation, now)).collect();
                    Patch::Apply(json!({
                        "apiVersion": api_version,
                        "kind": self.kind().as_str(),
                        // The uid makes the API server refuse it for another object of the same name.
                        "metadata": {"name": name, "namespace": namespace, "uid": uid},
                        "status": {"conditions": conditions},
                    }))
                })
            }
            (Said::Route(attached), Told::Route(verdicts)) => {
                let parents = attached.missing(verdicts, *generation, now)?;
                Some(Patch::Merge(json!({
                    "metadata": {"uid": uid, "resourceVersion": version},
                    "status": {"parents": parents},
                })))
            }
            _ => None,
        }
    }

    /// The `apiVersion` in which it is written.
    #[cfg(test)]
    pub(super) fn served(&self) -> &str {
        &self.subject.api_version
    }

    fn kind(&self) -> Kind {
        self.subject.of.defined().expect("only kinds that somebody defined have standings")
    }
}

/// Whether a policy is in force for all that it is for, and if not, for what and why.
fn of_traffic(outcome: &traffic::Outcome, unread: &[Unread]) -> Verdict {
    let not = outcome.targets.iter().filter_map(|(target, why)| Some((target, why.as_ref()?)));
    let says: Vec<String> = not.clone().map(|(target, why)| format!("{target}: {why}.")).collect();
    let rest = if unread.is_empty() { "" } else { ", but for what RequestsRead says" };
    let Some((_, first)) = not.into_iter().next() else {
        return Verdict::new(ACCEPTED, true, "Accepted", &format!("It is in force{rest}."));
    };
    let rest = format!("Whatever else it says is in force{rest}.");
    Verdict::new(ACCEPTED, false, first.reason(), &format!("{} {rest}", says.join(" ")))
}

/// That not all requests of which a policy says something are read; nothing where they are.
const REQUESTS_READ: &str = "RequestsRead";

/// What is said of them.
fn requests_read(unread: &[Unread]) -> Option<Verdict> {
    let says: Vec<String> = unread.iter().map(|it| format!("{it}. Cure: {}.", it.cure())).collect();
    (!says.is_empty()).then(|| Verdict::new(REQUESTS_READ, false, "ConnectionsRouted", &says.join(" ")))
}

impl fmt::Display for Standing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}/{}", self.kind(), self.subject.namespace, self.subject.name)
    }
}

/// Writes, while it is this controller's turn.
pub(super) struct Writer {
    client: Client,
    standings: watch::Receiver<Arc<Vec<Standing>>>,
    term: Term,
    presence: watch::Sender<Presence>,
    /// What was written to which version of an object and has not been heard of again, by uid.
    written: BTreeMap<String, (String, Told)>,
}

impl Writer {
    pub(super) fn new(
        client: Client,
        standings: watch::Receiver<Arc<Vec<Standing>>>,
        presence: watch::Sender<Presence>,
    ) -> Self {
        // A controller that starts again is another one.
        let me = format!("{}_{:016x}", crate::kubernetes::own_pod(), rand::random::<u64>());
        Self { term: Term::new(client.clone(), me), client, standings, presence, written: BTreeMap::new() }
    }

    pub(super) async fn run(mut self, cancel: CancellationToken) {
        let mut round: Option<Instant> = Some(Instant::now());
        loop {
            let at =
                round.filter(|_| self.term.holds_for(WRITE)).unwrap_or(self.term.due()).min(self.term.due());
            // Cancel-safe: a mark that was seen is in `round`; times hold nothing.
            tokio::select! {
                () = cancel.cancelled() => break,
                changed = self.standings.changed() => match changed {
                    Ok(()) => {
                        round.get_or_insert(Instant::now() + BATCH);
                    }
                    // The source has ended, and the rest is about to.
                    Err(_) => break,
                },
                () = sleep_until(at) => {
                    if self.term.due() <= Instant::now() {
                        self.keep().await;
                    }
                    if round.is_some_and(|at| at <= Instant::now()) && self.term.holds_for(WRITE) {
                        round = self.write(&cancel).await.then_some(Instant::now() + RETRY);
                    }
                }
            }
        }
        self.term.release().await;
    }

    /// Keeps the lease, and says how we stand.
    async fn keep(&mut self) {
        self.term.keep().await;
        let now = self.term.standing();
        self.presence.send_if_modified(|before| {
            match (before.answered, now.answered) {
                (true, false) => tracing::warn!(
                    "the API server does not answer: what is known stays in force, and this controller is not ready"
                ),
                (false, true) => tracing::info!("the API server answers again"),
                _ => {}
            }
            std::mem::replace(before, now) != now
        });
    }

    /// Writes what is missing. Whether some of it has to be tried again.
    async fn write(&mut self, cancel: &CancellationToken) -> bool {
        let standings = self.standings.borrow_and_update().clone();
        self.written.retain(|uid, _| standings.iter().any(|it| it.subject.uid == *uid));
        let mut again = false;
        for standing in standings.iter() {
            let Subject { uid, version, .. } = &standing.subject;
            let Some(patch) = standing.missing(Timestamp::now()) else {
                self.written.remove(uid);
                continue;
            };
            let is_same = |(to, told): &(String, Told)| (to, told) == (version, &standing.told);
            if self.written.get(uid).is_some_and(is_same) {
                continue;
            }
            if self.term.due() <= Instant::now() {
                self.keep().await;
            }
            if cancel.is_cancelled() || !self.term.holds_for(WRITE) {
                return true;
            }
            match timeout(WRITE, self.write_one(standing, &patch)).await {
                Ok(Ok(())) => {
                    tracing::debug!(object = %standing, "status written");
                    self.written.insert(uid.clone(), (version.clone(), standing.told.clone()));
                }
                // It is gone, has changed, or another one has its name: its own events tell.
                Ok(Err(kube::Error::Api(status))) if matches!(status.code, 404 | 409) => {}
                Ok(Err(error)) => {
                    tracing::warn!(%error, "the status of {standing} cannot be written; it is tried again");
                    again = true;
                }
                Err(_) => again = true,
            }
        }
        again
    }

    async fn write_one(&self, standing: &Standing, patch: &Patch<Value>) -> kube::Result<()> {
        let Subject { of, api_version, namespace, name, .. } = &standing.subject;
        let resource = resource(standing.kind(), api_version, of.plural());
        let objects = Api::<DynamicObject>::namespaced_with(self.client.clone(), namespace, &resource);
        let params = match patch {
            Patch::Apply(_) => PatchParams::apply(WRITER).force(),
            _ => PatchParams { field_manager: Some(WRITER.to_owned()), ..PatchParams::default() },
        };
        objects.patch_status(name, &params, patch).await.map(drop)
    }
}

#[cfg(test)]
mod tests {
    use mesh_core::model::{Authentication, Enforcement, Name, Selector, http::RouteKind};

    use super::*;
    use crate::model::AuthenticationPolicy;

    #[test]
    fn a_policy_says_whether_its_keys_can_be_had_and_what_is_in_force_meanwhile() {
        let at = KeysAt { url: "https://id.example/keys".into(), ca_bundle: String::new() };
        let name = Name::new("shop", "users");
        let (selector, ports, issuers) = (Selector::default(), vec![], vec![]);
        let enforcement = Enforcement::Enforce;
        let said = Authentication { name, selector, ports, required: true, enforcement, issuers };
        let policy =
            |elsewhere| Object::AuthenticationPolicy(AuthenticationPolicy { said: said.clone(), elsewhere });
        let by_url = policy(vec![(0, at.clone())]);
        let with = |fetched: bool, trouble: Option<&str>| Keys {
            fetched: fetched.then(|| (at.clone(), Arc::default())).into_iter().collect(),
            troubles: trouble.map(|it| (at.clone(), it.to_owned())).into_iter().collect(),
        };
        let told = |keys: &Keys| {
            let verdict = keys_fetched(&by_url, keys).unwrap();
            let condition = verdict.condition(&[], 1, Timestamp::UNIX_EPOCH);
            assert!(verdict.is_told(std::slice::from_ref(&condition), 1));
            format!("{} {} {}", condition.status, condition.reason, condition.message)
        };
        assert_eq!(told(&with(false, None)), "False Pending The keys are being fetched.");
        assert_eq!(told(&with(true, None)), "True Fetched The newest keys are in force.");
        assert_eq!(
            told(&with(true, Some("no answer"))),
            "False FetchFailed https://id.example/keys: no answer; the last good keys stay in force."
        );
        let refused = "tokens of the issuer are refused until there are some.";
        assert!(told(&with(false, Some("no answer"))).ends_with(refused));
        assert_eq!(keys_fetched(&policy(vec![]), &with(true, None)), None);
    }

    fn traffic_policy(conditions: &Value) -> Subject {
        let object: DynamicObject = serde_json::from_value(json!({
            "metadata": {"name": "p", "namespace": "shop", "uid": "u", "generation": 1},
            "status": {"conditions": conditions},
        }))
        .unwrap();
        Subject::new(Followed::Traffic, &object)
    }

    /// The conditions that have to be written.
    fn written(subject: Subject, outcome: &traffic::Outcome, unread: &[Unread]) -> Option<Value> {
        let standing = Standing::new(subject, &[], Some(Became::Traffic(outcome, unread)));
        match standing.missing(Timestamp::now())? {
            Patch::Apply(patch) => Some(patch["status"]["conditions"].clone()),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_policy_says_where_what_it_says_of_requests_is_not_in_force_for_as_long_as_that_is_so() {
        let outcome = traffic::Outcome::default();
        let unread = |of_namespace| Unread {
            service: Name::new("shop", "db"),
            port: 5432,
            of_namespace,
            parts: vec!["retries", "timeouts"],
            by: vec![(RouteKind::Tcp, Name::new("shop", "split"))],
            clients: [].into(),
        };
        let said = written(traffic_policy(&json!([])), &outcome, &[unread(false)]).unwrap();
        let words = |at: usize, field: &str| said[at][field].as_str().unwrap().to_owned();
        assert_eq!(words(0, "message"), "It is in force, but for what RequestsRead says.");
        assert_eq!(
            [words(1, "type"), words(1, "status"), words(1, "reason")],
            ["RequestsRead", "False", "ConnectionsRouted"]
        );
        assert_eq!(
            words(1, "message"),
            "Service shop/db, port 5432: retries and timeouts are not in force, as TCPRoute shop/split routes its connections, of \
             which nothing is read. Cure: if requests to it can be read, route them by an HTTPRoute or GRPCRoute instead; if not, \
             name the other ports by sectionName, or say it of other Services."
        );
        let again = written(traffic_policy(&said), &outcome, &[unread(false)]);
        assert_eq!(again, None, "it is said already");
        let of_namespace = written(traffic_policy(&said), &outcome, &[unread(true)]).unwrap();
        let message = of_namespace[1]["message"].as_str().unwrap();
        assert!(message.ends_with("if not, nothing has to be done."), "{message}");
        let none = written(traffic_policy(&said), &outcome, &[]).unwrap();
        assert_eq!((none.as_array().unwrap().len(), &none[0]["message"]), (1, &json!("It is in force.")));
    }
}
