//! Which of all documents are in force. Pure: what the files say now, and what was in force before, give what is in
//! force next and what is refused.
//!
//! The invariant: an object leaves, or changes, only by a document that is good, or by its document's orderly removal.
//! As long as a refused document (or a file of which a part cannot be read) may be about an object, its last good
//! version stays.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    path::{Path, PathBuf},
    sync::Arc,
};

use serde::{Deserialize, Serialize};

use super::{Problem, Refused, document, manifest};
use crate::{
    digest::digest,
    model::{Kind, Model, Object, ObjectKey},
};

/// Most AuthorizationPolicies of a namespace, and so of a workload: each may have to be looked at for every connection.
const MAX_POLICIES: usize = 512;
/// Most AuthenticationPolicies of a namespace, and so of a workload: each brings keys into every view that has it.
const MAX_AUTHENTICATIONS: usize = 64;
/// Most routes of a kind of a namespace, and so of a service: each is in every agent that knows the service.
const MAX_ROUTES: usize = 256;

/// Most TrafficPolicies of a namespace.
const MAX_TRAFFIC: usize = 512;

/// Most objects of a kind that a namespace may have, and what they are called.
const fn most_of(kind: Kind) -> Option<(usize, &'static str)> {
    match kind {
        Kind::AuthorizationPolicy => Some((MAX_POLICIES, "AuthorizationPolicies")),
        Kind::TrafficPolicy => Some((MAX_TRAFFIC, "TrafficPolicies")),
        Kind::AuthenticationPolicy => Some((MAX_AUTHENTICATIONS, "AuthenticationPolicies")),
        Kind::HttpRoute => Some((MAX_ROUTES, "HTTPRoutes")),
        Kind::GrpcRoute => Some((MAX_ROUTES, "GRPCRoutes")),
        Kind::TlsRoute => Some((MAX_ROUTES, "TLSRoutes")),
        Kind::TcpRoute => Some((MAX_ROUTES, "TCPRoutes")),
        Kind::Namespace | Kind::Workload | Kind::Service | Kind::EndpointSlice | Kind::ReferenceGrant => None,
    }
}

fn too_many(object: &ObjectKey, (most, kinds): (usize, &str), line: usize) -> Problem {
    Problem {
        line,
        field: "metadata.namespace".into(),
        reason: format!("namespace {} has {most} {kinds} already", object.name.namespace),
        cure: "merge some of them: one can have many rules".into(),
    }
}

/// What one file says.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct FileContent {
    documents: Vec<Parsed>,
}

/// One document of a file.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Parsed {
    /// Of its text.
    digest: [u8; 32],
    /// The line at which its content starts.
    line: usize,
    /// What it turned out to be; nothing if it has only comments.
    entry: Option<Entry>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Entry {
    Accepted { key: ObjectKey, object: Arc<Object> },
    Refused { object: Option<ObjectKey>, problems: Vec<Problem> },
}

impl Parsed {
    fn parse(document: &document::Document<'_>, digest: [u8; 32]) -> Self {
        let entry = match manifest::parse(document) {
            manifest::Outcome::Empty => None,
            manifest::Outcome::Accepted(object) => {
                Some(Entry::Accepted { key: object.key(), object: Arc::new(object) })
            }
            manifest::Outcome::Refused(object, problems) => Some(Entry::Refused { object, problems }),
        };
        Self { digest, line: document.line(), entry }
    }

    /// The same text at another line.
    fn moved(&self, line: usize) -> Self {
        let mut moved = Self { line, ..self.clone() };
        if let Some(Entry::Refused { problems, .. }) = &mut moved.entry {
            for problem in problems {
                problem.line = problem.line + line - self.line;
            }
        }
        moved
    }
}

impl FileContent {
    /// Reads and checks a file's text.
    pub fn parse(text: &str) -> Self {
        Self::default().next(text)
    }

    /// Reads and checks a file's text that was this before: only documents that are new or have changed are parsed,
    /// as one file may have ten thousand of them.
    pub fn next(&self, text: &str) -> Self {
        let known: HashMap<&[u8; 32], &Parsed> =
            self.documents.iter().map(|parsed| (&parsed.digest, parsed)).collect();
        let parsed = |document: document::Document<'_>| {
            let digest = digest(document.text().as_bytes());
            match known.get(&digest) {
                Some(parsed) => parsed.moved(document.line()),
                None => Parsed::parse(&document, digest),
            }
        };
        Self { documents: document::split(text).into_iter().map(parsed).collect() }
    }

    fn entries(&self) -> impl Iterator<Item = (usize, &Entry)> {
        self.documents.iter().filter_map(|parsed| Some((parsed.line, parsed.entry.as_ref()?)))
    }

    /// A file that cannot be read at all.
    pub fn unreadable(reason: String, cure: String) -> Self {
        let problem = Problem { line: 1, field: String::new(), reason, cure };
        let entry = Some(Entry::Refused { object: None, problems: vec![problem] });
        Self { documents: vec![Parsed { digest: [0; 32], line: 1, entry }] }
    }

    /// How many documents it has.
    pub fn len(&self) -> usize {
        self.entries().count()
    }

    /// Whether it has none.
    pub fn is_empty(&self) -> bool {
        self.entries().next().is_none()
    }
}

/// An object in force, and where it came from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct InForce {
    /// The object.
    pub object: Arc<Object>,
    /// The file of its document.
    pub file: PathBuf,
    /// The line at which the document starts, from 1.
    pub line: usize,
    /// It is the last good version: its document is refused now.
    pub kept: bool,
}

/// What is in force, and what is refused.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Ledger {
    in_force: BTreeMap<ObjectKey, InForce>,
    refused: Vec<Refused>,
    documents_refused: usize,
}

impl Ledger {
    /// A ledger that remembers objects from before a restart.
    pub fn remembering(objects: impl IntoIterator<Item = InForce>) -> Self {
        let in_force = objects.into_iter().map(|entry| (entry.object.key(), entry)).collect();
        Self { in_force, ..Self::default() }
    }

    /// What is in force once the files say this.
    pub fn next(&self, files: &BTreeMap<PathBuf, Arc<FileContent>>) -> Self {
        let mut next = Self::default();
        let mut unclear = Unclear::default();
        next.accept(self, files);
        for (file, content) in files {
            for (_, entry) in content.entries() {
                if let Entry::Refused { object, problems } = entry {
                    next.refuse(file, object.as_ref(), problems);
                    unclear.note(file, object.as_ref());
                }
            }
        }
        for (key, entry) in &self.in_force {
            if !next.in_force.contains_key(key) && unclear.covers(key, &entry.file) {
                next.in_force.insert(key.clone(), InForce { kept: true, ..entry.clone() });
            }
        }
        if !next.refused.is_empty() {
            let in_force: BTreeSet<String> = next.in_force.keys().map(ToString::to_string).collect();
            for refused in &mut next.refused {
                refused.last_good_in_force = refused.object.as_ref().is_some_and(|it| in_force.contains(it));
            }
        }
        next.refused.sort_by(|a, b| (&a.file, a.line).cmp(&(&b.file, b.line)));
        next
    }

    /// Takes every accepted document; of two about one object, that of the file which had it before, else the first.
    fn accept(&mut self, before: &Self, files: &BTreeMap<PathBuf, Arc<FileContent>>) {
        let mut candidates: BTreeMap<&ObjectKey, Vec<Claim<'_>>> = BTreeMap::new();
        for (file, content) in files {
            for (line, entry) in content.entries() {
                if let Entry::Accepted { key, object } = entry {
                    candidates.entry(key).or_default().push((file, line, object));
                }
            }
        }
        // What was in force comes first, so that a new policy or route never pushes an old one out.
        let (known, new): (Vec<_>, Vec<_>) =
            candidates.into_iter().partition(|(key, _)| before.in_force.contains_key(*key));
        let mut counts: BTreeMap<(Kind, &str), usize> = BTreeMap::new();
        for (key, mut claims) in known.into_iter().chain(new) {
            if let Some(limit) = most_of(key.kind) {
                let count = counts.entry((key.kind, key.name.namespace.as_str())).or_default();
                if *count == limit.0 {
                    for (file, line, _) in claims {
                        self.refuse(file, Some(key), &[too_many(key, limit, line)]);
                    }
                    continue;
                }
                *count += 1;
            }
            let incumbent = || before.in_force.get(key).map(|entry| entry.file.as_path());
            let of_incumbent = |incumbent| claims.iter().position(|(file, ..)| Some(*file) == incumbent);
            let place = if claims.len() == 1 { 0 } else { of_incumbent(incumbent()).unwrap_or(0) };
            let (file, line, object) = claims.remove(place);
            for (other, other_line, _) in claims {
                let problem = Problem {
                    line: other_line,
                    field: "metadata.name".into(),
                    reason: format!("{key} is already defined at {}:{line}", file.display()),
                    cure: "remove one of the two, or give it another name".into(),
                };
                self.refuse(other, Some(key), &[problem]);
            }
            let entry = InForce { object: object.clone(), file: file.to_owned(), line, kept: false };
            self.in_force.insert(key.clone(), entry);
        }
    }

    fn refuse(&mut self, file: &Path, object: Option<&ObjectKey>, problems: &[Problem]) {
        self.documents_refused += 1;
        self.refused.extend(problems.iter().map(|problem| Refused {
            file: file.to_owned(),
            line: problem.line,
            object: object.map(ToString::to_string),
            field: problem.field.clone(),
            reason: problem.reason.clone(),
            cure: problem.cure.clone(),
            last_good_in_force: false,
        }));
    }

    /// The desired state.
    pub fn model(&self) -> Model {
        self.objects().collect()
    }

    /// The objects in force, by kind and name.
    pub fn objects(&self) -> impl Iterator<Item = &Object> {
        self.in_force.values().map(|entry| &*entry.object)
    }

    /// The object with this key, and where it came from.
    pub fn in_force(&self, key: &ObjectKey) -> Option<&InForce> {
        self.in_force.get(key)
    }

    /// What is wrong, by file and line.
    pub fn refused(&self) -> &[Refused] {
        &self.refused
    }

    /// Documents that are refused; one may have several things wrong with it.
    pub fn documents_refused(&self) -> usize {
        self.documents_refused
    }

    /// Documents that are accepted.
    pub fn documents_accepted(&self) -> usize {
        self.in_force.values().filter(|entry| !entry.kept).count()
    }

    /// The objects whose last good version is in force, what has to survive a restart.
    pub fn kept(&self) -> impl Iterator<Item = &InForce> {
        self.in_force.values().filter(|entry| entry.kept)
    }
}

/// An accepted document that is about an object: its file, its line, and what it says.
type Claim<'a> = (&'a Path, usize, &'a Arc<Object>);

/// Objects that a refused document may be about.
#[derive(Default)]
struct Unclear<'a> {
    objects: BTreeSet<&'a ObjectKey>,
    files: BTreeSet<&'a Path>,
}

impl<'a> Unclear<'a> {
    fn note(&mut self, file: &'a Path, object: Option<&'a ObjectKey>) {
        match object {
            Some(key) => drop(self.objects.insert(key)),
            None => drop(self.files.insert(file)),
        }
    }

    fn covers(&self, key: &ObjectKey, file: &Path) -> bool {
        self.objects.contains(key) || self.files.contains(file)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn workload(name: &str, address: &str) -> String {
        format!(
            "---\napiVersion: nodemesh.io/v1alpha1\nkind: Workload\nmetadata: {{name: {name}, namespace: \
             shop}}\nspec: {{node: n, addresses: [{address}]}}\n"
        )
    }

    /// What is in force after the files say this, as `name=address`, and how many documents are refused.
    fn step(ledger: &mut Ledger, files: &[(&str, String)]) -> (Vec<String>, usize) {
        let files = files
            .iter()
            .map(|(file, text)| (PathBuf::from(file), Arc::new(FileContent::parse(text))))
            .collect();
        *ledger = ledger.next(&files);
        let in_force = ledger
            .model()
            .workloads
            .values()
            .map(|workload| format!("{}={}", workload.name.name, workload.addresses[0]))
            .collect();
        (in_force, ledger.documents_refused())
    }

    #[test]
    fn a_bad_document_is_refused_alone_and_its_last_good_version_stays() {
        let mut ledger = Ledger::default();
        let good = workload("a", "10.0.0.1") + &workload("b", "10.0.0.2");
        assert_eq!(step(&mut ledger, &[("f", good)]).0, ["a=10.0.0.1", "b=10.0.0.2"]);
        let bad = workload("a", "nonsense") + &workload("b", "10.0.0.3");
        assert_eq!(step(&mut ledger, &[("f", bad)]), (vec!["a=10.0.0.1".to_owned(), "b=10.0.0.3".into()], 1));
        assert!(ledger.refused()[0].last_good_in_force);
        let gone = workload("b", "10.0.0.3");
        assert_eq!(step(&mut ledger, &[("f", gone)]), (vec!["b=10.0.0.3".to_owned()], 0));
    }

    #[test]
    fn a_namespace_has_no_more_policies_than_it_may_and_a_new_one_pushes_none_out() {
        let policy = |name: &str, namespace: &str| {
            format!(
                "---\napiVersion: nodemesh.io/v1alpha1\nkind: AuthorizationPolicy\nmetadata: {{name: {name}, \
                 namespace: {namespace}}}\nspec: {{action: Allow}}\n"
            )
        };
        let mut ledger = Ledger::default();
        let full: String = (0..MAX_POLICIES).map(|number| policy(&format!("p{number}"), "shop")).collect();
        assert_eq!(step(&mut ledger, &[("f", full.clone())]).1, 0);
        let more = policy("a-first-by-name", "shop") + &policy("of-another-namespace", "other");
        assert_eq!(step(&mut ledger, &[("a", more), ("f", full)]).1, 1);
        assert_eq!(ledger.model().policies.len(), MAX_POLICIES + 1);
        let refused = &ledger.refused()[0];
        assert_eq!(refused.object.as_deref(), Some("AuthorizationPolicy shop/a-first-by-name"));
        assert!(refused.cure.contains("merge") && !refused.last_good_in_force, "{refused}");
    }

    #[test]
    fn while_a_part_of_a_file_cannot_be_parsed_nothing_of_it_goes() {
        let mut ledger = Ledger::default();
        let good = workload("a", "10.0.0.1") + &workload("b", "10.0.0.2");
        step(&mut ledger, &[("f", good.clone()), ("g", workload("c", "10.0.0.3"))]);
        let broken = workload("a", "10.0.0.1") + "---\nkind: [Workload\n";
        let (in_force, refused) = step(&mut ledger, &[("f", broken)]);
        assert_eq!((in_force, refused), (vec!["a=10.0.0.1".to_owned(), "b=10.0.0.2".into()], 1));
        assert_eq!(step(&mut ledger, &[("f", good)]).1, 0);
    }

    #[test]
    fn a_duplicate_is_refused_and_the_incumbent_stays() {
        let mut ledger = Ledger::default();
        step(&mut ledger, &[("m", workload("a", "10.0.0.1"))]);
        let both = [("b", workload("a", "10.0.0.2")), ("m", workload("a", "10.0.0.1"))];
        assert_eq!(step(&mut ledger, &both), (vec!["a=10.0.0.1".to_owned()], 1));
        assert!(ledger.refused()[0].reason.contains("m:2"), "{:?}", ledger.refused());
        assert_eq!(step(&mut ledger, &both[..1]).0, ["a=10.0.0.2"]);
    }

    #[test]
    fn what_was_kept_survives_a_restart() {
        let mut ledger = Ledger::default();
        step(&mut ledger, &[("f", workload("a", "10.0.0.1"))]);
        step(&mut ledger, &[("f", workload("a", "x"))]);
        let saved = serde_json::to_string(&ledger.kept().collect::<Vec<_>>()).unwrap();
        let mut restarted = Ledger::remembering(serde_json::from_str::<Vec<InForce>>(&saved).unwrap());
        assert_eq!(step(&mut restarted, &[("f", workload("a", "x"))]), (vec!["a=10.0.0.1".to_owned()], 1));
        assert_eq!(step(&mut restarted, &[]).0, Vec::<String>::new());
    }

    #[test]
    fn a_document_that_only_moved_within_its_file_keeps_its_meaning_and_its_problems_move_along() {
        let (good, bad) = (workload("a", "10.0.0.1"), workload("b", "nonsense"));
        let before = FileContent::parse(&(good.clone() + &bad));
        let after = "# a comment\n\n".to_owned() + &bad + &workload("c", "10.0.0.3") + &good;
        assert_eq!(before.next(&after), FileContent::parse(&after));
        assert_eq!(before.next(""), FileContent::parse(""));
    }

    #[test]
    fn an_object_may_move_between_files() {
        let mut ledger = Ledger::default();
        step(&mut ledger, &[("f", workload("a", "10.0.0.1"))]);
        assert_eq!(
            step(&mut ledger, &[("g", workload("a", "10.0.0.1"))]),
            (vec!["a=10.0.0.1".to_owned()], 0)
        );
    }
}
