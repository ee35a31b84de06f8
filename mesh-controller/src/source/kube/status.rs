//! What became of every object of ours, written where its author looks: the condition Accepted of its status. One
//! controller of all writes; a burst of changes is one round, and what says the same already is not written again.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use k8s_openapi::{
    apimachinery::pkg::apis::meta::v1::{Condition, Time},
    jiff::Timestamp,
};
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

use super::{lease::Term, objects::Followed, resource};
use crate::{
    model::Kind,
    source::{Presence, Refused},
};

/// The condition that is ours.
const ACCEPTED: &str = "Accepted";
/// Who writes, to the API server.
const WRITER: &str = "nodemesh-controller";
/// After a change, how long others are waited for, so that a burst is one round.
const BATCH: Duration = Duration::from_millis(200);
/// How long a write may take.
const WRITE: Duration = Duration::from_secs(2);
/// After a write failed, how long until it is tried again.
const RETRY: Duration = Duration::from_secs(2);
/// Longest message, characters; Kubernetes takes 32768 bytes.
const MAX_MESSAGE: usize = 4096;

/// An object of ours, and what its status says.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Own {
    kind: Kind,
    namespace: String,
    name: String,
    uid: String,
    generation: i64,
    /// The condition Accepted.
    said: Option<Condition>,
}

impl Own {
    pub(super) fn of(kind: Kind, object: &DynamicObject) -> Self {
        let conditions = &object.data["status"]["conditions"];
        let said = conditions.as_array().into_iter().flatten().find(|it| it["type"] == ACCEPTED);
        Self {
            kind,
            namespace: object.namespace().unwrap_or_default(),
            name: object.name_any(),
            uid: object.uid().unwrap_or_default(),
            generation: object.metadata.generation.unwrap_or_default(),
            said: said.and_then(|it| serde_json::from_value(it.clone()).ok()),
        }
    }
}

/// What became of an object.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Standing {
    own: Own,
    accepted: bool,
    message: String,
}

impl Standing {
    /// `problems`: all that was said of its document.
    pub(super) fn new(own: Own, problems: &[&Refused]) -> Self {
        let Some(first) = problems.first() else {
            return Self { own, accepted: true, message: "It is in force.".to_owned() };
        };
        let of = |it: &&Refused| {
            let field = if it.field.is_empty() { String::new() } else { format!("{}: ", it.field) };
            format!("{field}{}. Cure: {}.", it.reason, it.cure)
        };
        let mut lines: Vec<String> = problems.iter().map(of).collect();
        lines.push(match first.last_good_in_force {
            true => "The last good version stays in force.".to_owned(),
            false => "Nothing of it is in force.".to_owned(),
        });
        let message = lines.join(" ").chars().take(MAX_MESSAGE).collect();
        Self { own, accepted: false, message }
    }

    /// The condition that has to be written; nothing if it is there.
    fn missing(&self, now: Timestamp) -> Option<Condition> {
        let (status, reason) = if self.accepted { ("True", "Accepted") } else { ("False", "Invalid") };
        let said = self.own.said.as_ref();
        let told = said.is_some_and(|it| {
            (it.status.as_str(), it.reason.as_str(), &it.message) == (status, reason, &self.message)
                && it.observed_generation == Some(self.own.generation)
        });
        let since = said.filter(|it| it.status == status).map(|it| it.last_transition_time.clone());
        (!told).then(|| Condition {
            type_: ACCEPTED.to_owned(),
            status: status.to_owned(),
            reason: reason.to_owned(),
            message: self.message.clone(),
            observed_generation: Some(self.own.generation),
            last_transition_time: since.unwrap_or(Time(now)),
        })
    }

    /// What is sent; the uid makes the API server refuse it for another object of the same name.
    fn patch(&self, condition: &Condition) -> Value {
        json!({
            "apiVersion": self.own.kind.api_version(),
            "kind": self.own.kind.as_str(),
            "metadata": {"name": self.own.name, "namespace": self.own.namespace, "uid": self.own.uid},
            "status": {"conditions": [condition]},
        })
    }
}

/// Writes, while it is this controller's turn.
pub(super) struct Writer {
    client: Client,
    standings: watch::Receiver<Arc<Vec<Standing>>>,
    term: Term,
    presence: watch::Sender<Presence>,
    /// What was written and has not been heard of again, by uid.
    written: BTreeMap<String, Condition>,
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
        self.written.retain(|uid, _| standings.iter().any(|it| it.own.uid == *uid));
        let mut again = false;
        for standing in standings.iter() {
            let uid = &standing.own.uid;
            let Some(condition) = standing.missing(Timestamp::now()) else {
                self.written.remove(uid);
                continue;
            };
            let same = |it: &Condition| {
                (&it.status, &it.message, it.observed_generation)
                    == (&condition.status, &condition.message, condition.observed_generation)
            };
            if self.written.get(uid).is_some_and(same) {
                continue;
            }
            if self.term.due() <= Instant::now() {
                self.keep().await;
            }
            if cancel.is_cancelled() || !self.term.holds_for(WRITE) {
                return true;
            }
            let name = format!("{} {}/{}", standing.own.kind, standing.own.namespace, standing.own.name);
            match timeout(WRITE, self.write_one(standing, &condition)).await {
                Ok(Ok(())) => {
                    tracing::debug!(object = name, accepted = standing.accepted, "status written");
                    self.written.insert(uid.clone(), condition);
                }
                // It is gone, or another one has its name: its own events tell.
                Ok(Err(kube::Error::Api(status))) if matches!(status.code, 404 | 409) => {}
                Ok(Err(error)) => {
                    let name =
                        format!("{} {}/{}", standing.own.kind, standing.own.namespace, standing.own.name);
                    tracing::warn!(%error, "the status of {name} cannot be written; it is tried again");
                    again = true;
                }
                Err(_) => again = true,
            }
        }
        again
    }

    async fn write_one(&self, standing: &Standing, condition: &Condition) -> kube::Result<()> {
        let own = &standing.own;
        let of = Followed::ALL.into_iter().find(|of| of.own() == Some(own.kind));
        let plural = of.expect("only kinds that are followed have standings").plural();
        let resource = resource(own.kind, plural);
        let objects = Api::<DynamicObject>::namespaced_with(self.client.clone(), &own.namespace, &resource);
        let patch = Patch::Apply(standing.patch(condition));
        objects.patch_status(&own.name, &PatchParams::apply(WRITER).force(), &patch).await.map(drop)
    }
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use super::*;

    fn own(generation: i64, said: Option<Condition>) -> Own {
        Own {
            kind: Kind::AuthorizationPolicy,
            namespace: "shop".into(),
            name: "p".into(),
            uid: "u".into(),
            generation,
            said,
        }
    }

    fn refused(last_good_in_force: bool) -> Refused {
        Refused {
            file: PathBuf::from("kubernetes/authorizationpolicies/shop/p"),
            line: 1,
            object: Some("AuthorizationPolicy shop/p".into()),
            field: "spec.rules[0].to[0].ports[0]".into(),
            reason: "'x' is not a port".into(),
            cure: "write a number".into(),
            last_good_in_force,
        }
    }

    #[test]
    fn the_message_names_field_reason_and_cure_and_says_what_is_in_force() {
        let message = |last_good| Standing::new(own(1, None), &[&refused(last_good)]).message;
        assert_eq!(
            message(true),
            "spec.rules[0].to[0].ports[0]: 'x' is not a port. Cure: write a number. The last good version stays in \
             force."
        );
        assert!(message(false).ends_with("Nothing of it is in force."));
    }

    #[test]
    fn what_is_said_is_not_written_again_until_the_object_or_the_verdict_changes() {
        let (then, now) = (Timestamp::UNIX_EPOCH, Timestamp::now());
        let good = Standing::new(own(1, None), &[]);
        let condition = good.missing(then).expect("nothing is said yet");
        assert_eq!((condition.status.as_str(), condition.observed_generation), ("True", Some(1)));

        let said = |generation| own(generation, Some(condition.clone()));
        assert_eq!(Standing::new(said(1), &[]).missing(now), None);
        let newer = Standing::new(said(2), &[]).missing(now).expect("another generation");
        assert_eq!(newer.last_transition_time, Time(then), "it was accepted before, too");
        let bad = Standing::new(said(2), &[&refused(true)]).missing(now).expect("another verdict");
        assert_eq!((bad.status.as_str(), bad.reason.as_str()), ("False", "Invalid"));
        assert_eq!(bad.last_transition_time, Time(now));
    }
}
