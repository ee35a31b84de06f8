//! The objects of the followed kinds, as they are now, and the documents that they make. Pure: events in, documents
//! out. While a kind is listed again, what it had stays.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, SocketAddr},
    path::PathBuf,
    sync::Arc,
};

use k8s_openapi::api::{
    core::v1::{Namespace, Node, Pod, Service},
    discovery::v1::{Endpoint, EndpointSlice},
};
use kube::{ResourceExt, api::DynamicObject, runtime::watcher};
use mesh_core::model::{Name, ZONE, http::RouteKind};
use serde_json::Value;

use super::{
    documents,
    status::{Became, Standing, Subject},
};
use crate::{
    conditions::{self, Conditions, PodCondition},
    jwks::Keys,
    model::{Kind, Object, ObjectKey},
    routes,
    source::{
        ledger::{FileContent, Ledger},
        manifest::SERVICE_NAME,
    },
    traffic,
};

/// Namespace, empty for a Namespace itself, and name.
type Key = (String, String);

/// What is followed, in the order in which two claims to one name count.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Followed {
    Nodes,
    Namespaces,
    Pods,
    Services,
    Slices,
    Workloads,
    Policies,
    Traffic,
    Authentications,
    HttpRoutes,
    GrpcRoutes,
    TlsRoutes,
    TcpRoutes,
    Grants,
}

impl Followed {
    pub(super) const ALL: [Self; 14] = [
        Self::Nodes,
        Self::Namespaces,
        Self::Pods,
        Self::Services,
        Self::Slices,
        Self::Workloads,
        Self::Policies,
        Self::Traffic,
        Self::Authentications,
        Self::HttpRoutes,
        Self::GrpcRoutes,
        Self::TlsRoutes,
        Self::TcpRoutes,
        Self::Grants,
    ];

    /// As Kubernetes has it in paths.
    pub(super) const fn plural(self) -> &'static str {
        match self {
            Self::Nodes => "nodes",
            Self::Namespaces => "namespaces",
            Self::Pods => "pods",
            Self::Services => "services",
            Self::Slices => "endpointslices",
            Self::Workloads => "workloads",
            Self::Policies => "authorizationpolicies",
            Self::Traffic => "trafficpolicies",
            Self::Authentications => "authenticationpolicies",
            Self::HttpRoutes => "httproutes",
            Self::GrpcRoutes => "grpcroutes",
            Self::TlsRoutes => "tlsroutes",
            Self::TcpRoutes => "tcproutes",
            Self::Grants => "referencegrants",
        }
    }

    /// No kind of every cluster: ours, or the Gateway API's.
    pub(super) const fn defined(self) -> Option<Kind> {
        match self {
            Self::Workloads => Some(Kind::Workload),
            Self::Policies => Some(Kind::AuthorizationPolicy),
            Self::Traffic => Some(Kind::TrafficPolicy),
            Self::Authentications => Some(Kind::AuthenticationPolicy),
            Self::HttpRoutes => Some(Kind::HttpRoute),
            Self::GrpcRoutes => Some(Kind::GrpcRoute),
            Self::TlsRoutes => Some(Kind::TlsRoute),
            Self::TcpRoutes => Some(Kind::TcpRoute),
            Self::Grants => Some(Kind::ReferenceGrant),
            Self::Nodes | Self::Namespaces | Self::Pods | Self::Services | Self::Slices => None,
        }
    }

    /// Routes of this kind.
    pub(super) const fn route(self) -> Option<RouteKind> {
        match self {
            Self::HttpRoutes => Some(RouteKind::Http),
            Self::GrpcRoutes => Some(RouteKind::Grpc),
            Self::TlsRoutes => Some(RouteKind::Tls),
            Self::TcpRoutes => Some(RouteKind::Tcp),
            _ => None,
        }
    }

    /// The name that stands for a file's.
    fn file(self, key: &Key) -> PathBuf {
        ["kubernetes", self.plural(), &key.0, &key.1].iter().collect()
    }
}

/// What happened to one kind.
#[derive(Debug)]
pub(super) struct Event {
    pub(super) of: Followed,
    pub(super) what: What,
}

/// As [`watcher::Event`], of any kind.
#[derive(Debug)]
pub(super) enum What {
    /// The cluster does not know the kind.
    Unknown,
    /// A list begins,
    List,
    /// has this,
    Listed(Key, Thing),
    /// and is complete.
    Complete,
    /// This is new or has changed.
    Is(Key, Thing),
    /// This is gone.
    Gone(Key),
}

/// What is kept of an object.
#[derive(Debug, Clone)]
pub(super) enum Thing {
    /// A node, and its zone.
    Node(Option<String>),
    /// The text of its document, if it makes one.
    Plain(Option<String>),
    /// The same of a pod, still without the zone of its node, and what it says of its capture.
    Pod(Option<String>, Option<Box<PodCondition>>),
    /// A pod of its node's own network: none of ours, and no stranger either.
    OfItsNode,
    /// The text depends on which pods are such.
    Slice(Box<EndpointSlice>),
    /// One whose status is written.
    Subject(String, Box<Subject>),
}

/// A kind that is followed.
pub(super) trait Follow: ResourceExt {
    fn thing(self, of: Followed) -> Thing;
}

impl Follow for Node {
    fn thing(self, _: Followed) -> Thing {
        Thing::Node(self.metadata.labels.and_then(|mut labels| labels.remove(ZONE)))
    }
}

impl Follow for Namespace {
    fn thing(self, _: Followed) -> Thing {
        Thing::Plain(Some(documents::of_namespace(&self).to_string()))
    }
}

impl Follow for Pod {
    fn thing(self, _: Followed) -> Thing {
        if self.spec.as_ref().is_some_and(|spec| spec.host_network == Some(true)) {
            return Thing::OfItsNode;
        }
        let condition = conditions::of_pod(&self).map(|(_, condition)| Box::new(condition));
        Thing::Pod(documents::of_pod(&self).as_ref().map(Value::to_string), condition)
    }
}

impl Follow for Service {
    fn thing(self, _: Followed) -> Thing {
        Thing::Plain(documents::of_service(&self).as_ref().map(Value::to_string))
    }
}

impl Follow for EndpointSlice {
    fn thing(mut self, _: Followed) -> Thing {
        self.metadata.managed_fields = None;
        Thing::Slice(Box::new(self))
    }
}

impl Follow for DynamicObject {
    fn thing(self, of: Followed) -> Thing {
        let kind = of.defined().expect("only kinds that somebody defined are followed as such");
        let document = documents::of_defined(kind, &self).to_string();
        match kind {
            // A grant has no status.
            Kind::ReferenceGrant => Thing::Plain(Some(document)),
            _ => Thing::Subject(document, Box::new(Subject::new(of, &self))),
        }
    }
}

impl Event {
    pub(super) fn new<K: Follow>(of: Followed, event: watcher::Event<K>) -> Self {
        let key = |object: &K| (object.namespace().unwrap_or_default(), object.name_any());
        let what = match event {
            watcher::Event::Init => What::List,
            watcher::Event::InitApply(object) => What::Listed(key(&object), object.thing(of)),
            watcher::Event::InitDone => What::Complete,
            watcher::Event::Apply(object) => What::Is(key(&object), object.thing(of)),
            watcher::Event::Delete(object) => What::Gone(key(&object)),
        };
        Self { of, what }
    }
}

/// The objects of one kind.
#[derive(Debug, Default)]
struct Listed {
    things: BTreeMap<Key, Thing>,
    /// Those of a list that is not complete.
    coming: Option<BTreeMap<Key, Thing>>,
    /// There has been a complete list.
    complete: bool,
}

impl Listed {
    /// Returns what may have changed.
    fn apply(&mut self, what: What) -> BTreeSet<Key> {
        match what {
            // What was there stays: a kind that goes takes its objects with it, and each of them is told of.
            What::Unknown => self.complete = true,
            What::List => self.coming = Some(BTreeMap::new()),
            What::Listed(key, thing) => drop(self.coming.get_or_insert_default().insert(key, thing)),
            What::Complete => {
                self.complete = true;
                let before = std::mem::replace(&mut self.things, self.coming.take().unwrap_or_default());
                return self.things.keys().cloned().chain(before.into_keys()).collect();
            }
            What::Is(key, thing) => {
                self.things.insert(key.clone(), thing);
                return [key].into();
            }
            What::Gone(key) => {
                self.things.remove(&key);
                return [key].into();
            }
        }
        BTreeSet::new()
    }

    fn of_namespace<'a>(&'a self, namespace: &'a str) -> impl Iterator<Item = &'a Key> {
        let from = (namespace.to_owned(), String::new());
        self.things.range(from..).map(|(key, _)| key).take_while(move |key| key.0 == namespace)
    }
}

/// All kinds.
#[derive(Debug, Default)]
pub(super) struct Objects {
    listed: BTreeMap<Followed, Listed>,
    documents: BTreeMap<PathBuf, Arc<FileContent>>,
    changed: bool,
    /// Pods that are [`Thing::OfItsNode`].
    of_nodes: BTreeSet<Key>,
    /// The zones of nodes that have one.
    zones: BTreeMap<String, String>,
    /// What pods say of their capture.
    conditions: Conditions,
    conditions_changed: bool,
}

impl Objects {
    /// There is a complete list of each kind, or the cluster does not know it.
    pub(super) fn all_listed(&self) -> bool {
        Followed::ALL.iter().all(|of| self.listed.get(of).is_some_and(|listed| listed.complete))
    }

    /// Takes what happened into account.
    pub(super) fn apply(&mut self, event: Event) {
        let Event { of, what } = event;
        for key in self.listed.entry(of).or_default().apply(what) {
            self.set(of, &key);
            match of {
                Followed::Nodes => self.note_node(key),
                Followed::Pods => {
                    self.set_condition(&key);
                    self.note_pod(key);
                }
                _ => {}
            }
        }
    }

    /// Pods are where their nodes are.
    fn note_node(&mut self, (_, node): Key) {
        let nodes = self.listed.get(&Followed::Nodes);
        let thing = nodes.and_then(|nodes| nodes.things.get(&(String::new(), node.clone())));
        let changed = match thing {
            Some(Thing::Node(Some(zone))) => {
                self.zones.insert(node.clone(), zone.clone()).as_ref() != Some(zone)
            }
            _ => self.zones.remove(&node).is_some(),
        };
        if changed && let Some(pods) = self.listed.get(&Followed::Pods) {
            let is_there = |thing: &Thing| match thing {
                Thing::Pod(_, Some(pod)) => pod.node == node,
                _ => true,
            };
            let there = pods.things.iter().filter(|(_, thing)| is_there(thing));
            let keys: Vec<Key> = there.map(|(key, _)| key.clone()).collect();
            keys.iter().for_each(|key| self.set(Followed::Pods, key));
        }
    }

    /// An endpoint that is a pod of its node's own network is no workload.
    fn note_pod(&mut self, key: Key) {
        let thing = self.listed.get(&Followed::Pods).and_then(|pods| pods.things.get(&key));
        let namespace = key.0.clone();
        let changed = match thing {
            Some(Thing::OfItsNode) => self.of_nodes.insert(key),
            _ => self.of_nodes.remove(&key),
        };
        if changed && let Some(slices) = self.listed.get(&Followed::Slices) {
            let keys: Vec<Key> = slices.of_namespace(&namespace).cloned().collect();
            keys.iter().for_each(|key| self.set(Followed::Slices, key));
        }
    }

    /// What pods say of their capture; nothing if that is as before.
    pub(super) fn conditions(&mut self) -> Option<Conditions> {
        std::mem::take(&mut self.conditions_changed).then(|| self.conditions.clone())
    }

    fn set_condition(&mut self, key: &Key) {
        let name = Name::new(&key.0, &key.1);
        let thing = self.listed.get(&Followed::Pods).and_then(|pods| pods.things.get(key));
        self.conditions_changed |= match thing {
            Some(Thing::Pod(_, Some(now))) => {
                self.conditions.insert(name, PodCondition::clone(now)).as_ref() != Some(&**now)
            }
            _ => self.conditions.remove(&name).is_some(),
        };
    }

    fn set(&mut self, of: Followed, key: &Key) {
        let thing = self.listed.get(&of).and_then(|listed| listed.things.get(key));
        let made;
        let text = match thing {
            None | Some(Thing::Node(_) | Thing::OfItsNode | Thing::Plain(None) | Thing::Pod(None, _)) => None,
            Some(Thing::Plain(Some(text)) | Thing::Subject(text, _)) => Some(text.as_str()),
            Some(Thing::Pod(Some(text), _)) if self.zones.is_empty() => Some(text.as_str()),
            Some(Thing::Pod(Some(text), _)) => {
                made = documents::in_zone(text, |node| self.zones.get(node).cloned());
                Some(made.as_deref().unwrap_or(text))
            }
            Some(Thing::Slice(slice)) => {
                let is_workload =
                    |namespace: &str, name: &str| !self.of_nodes.contains(&(namespace.into(), name.into()));
                made = Some(documents::of_slice(slice, is_workload).to_string());
                made.as_deref()
            }
        };
        let file = of.file(key);
        let Some(text) = text else {
            self.changed |= self.documents.remove(&file).is_some();
            return;
        };
        let before = self.documents.get(&file);
        let content = before.map_or_else(|| FileContent::parse(text), |before| before.next(text));
        if before.is_none_or(|before| **before != content) {
            self.documents.insert(file, Arc::new(content));
            self.changed = true;
        }
    }

    /// The documents, if they differ from those of the last time.
    pub(super) fn contents(&mut self) -> Option<BTreeMap<PathBuf, Arc<FileContent>>> {
        std::mem::take(&mut self.changed).then(|| self.documents.clone())
    }

    /// The addresses of a Service's endpoints at their port `admin`, ready or not, without those of one pod.
    pub(super) fn admin_addresses(&self, service: &Name, own: &str) -> Vec<SocketAddr> {
        let Some(slices) = self.listed.get(&Followed::Slices) else { return vec![] };
        let mut found = vec![];
        for key in slices.of_namespace(&service.namespace) {
            let Some(Thing::Slice(slice)) = slices.things.get(key) else { continue };
            let port = slice.ports.iter().flatten().find(|port| port.name.as_deref() == Some("admin"));
            let Some(port) = port.and_then(|it| u16::try_from(it.port?).ok()) else { continue };
            if slice.labels().get(SERVICE_NAME) != Some(&service.name) {
                continue;
            }
            let is_own =
                |it: &&Endpoint| it.target_ref.as_ref().and_then(|it| it.name.as_deref()) == Some(own);
            let others = slice.endpoints.iter().filter(|it| !is_own(it));
            let addresses = others.filter_map(|it| it.addresses.first()?.parse::<IpAddr>().ok());
            found.extend(addresses.map(|address| SocketAddr::new(address, port)));
        }
        found
    }

    /// What became of every object that has a status for it.
    pub(super) fn standings(&self, ledger: &Ledger, keys: &Keys) -> Vec<Standing> {
        let mut refused: BTreeMap<_, Vec<_>> = BTreeMap::new();
        for one in ledger.refused() {
            refused.entry(one.file.as_path()).or_default().push(one);
        }
        let (routes, traffic) = self.referring(ledger);
        let unread = |name: &Name| routes.unread.get(name).map_or(&[][..], Vec::as_slice);
        let all = self.listed.iter().flat_map(|(of, listed)| listed.things.iter().map(|it| (*of, it)));
        let standing = |(of, (key, thing)): (Followed, (&Key, &Thing))| {
            let Thing::Subject(_, subject) = thing else { return None };
            let problems = refused.get(of.file(key).as_path()).map_or(&[][..], Vec::as_slice);
            let name = Name::new(&key.0, &key.1);
            let key = ObjectKey { kind: Kind::AuthenticationPolicy, name: name.clone() };
            let became = match (of, of.route()) {
                (Followed::Traffic, _) => {
                    traffic.outcomes.get(&name).map(|it| Became::Traffic(it, unread(&name)))
                }
                (Followed::Authentications, _) => {
                    ledger.in_force(&key).map(|it| Became::OfUsers(&it.object, keys))
                }
                (_, Some(kind)) => routes.outcomes.get(&(kind, name)).map(Became::Route),
                _ => None,
            };
            Some(Standing::new(Subject::clone(subject), problems, became))
        };
        all.filter_map(standing).collect()
    }

    fn has(&self, of: Followed) -> bool {
        self.listed.get(&of).is_some_and(|it| !it.things.is_empty())
    }

    /// What became of those that refer to others: the routes, and the policies on traffic.
    fn referring(&self, ledger: &Ledger) -> (routes::Resolved, traffic::Resolved) {
        let refers = |of: &Followed| of.route().is_some() || *of == Followed::Traffic;
        if !Followed::ALL.into_iter().filter(refers).any(|of| self.has(of)) {
            return Default::default();
        }
        let matters = |it: &&Object| {
            matches!(
                it,
                Object::Service(_) | Object::Route(_) | Object::ReferenceGrant(_) | Object::TrafficPolicy(_)
            )
        };
        let model = ledger.objects().filter(matters).collect();
        let traffic = traffic::resolve(&model);
        (routes::resolve(&model, &traffic), traffic)
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use k8s_openapi::api::core::v1::{PodIP, PodSpec, PodStatus};
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;
    use crate::model::Model;

    fn pod(name: &str, address: &str) -> Pod {
        let mut pod = Pod::default();
        (pod.metadata.namespace, pod.metadata.name) = (Some("shop".into()), Some(name.into()));
        pod.spec = Some(PodSpec { node_name: Some("node-a".into()), ..PodSpec::default() });
        let addresses = (!address.is_empty()).then(|| vec![PodIP { ip: address.into() }]);
        pod.status = Some(PodStatus { pod_ips: addresses, ..PodStatus::default() });
        pod
    }

    fn event(event: watcher::Event<Pod>) -> Event {
        Event::new(Followed::Pods, event)
    }

    fn listed(pods: &[Pod]) -> Vec<Event> {
        let events = pods.iter().cloned().map(watcher::Event::InitApply);
        let events = std::iter::once(watcher::Event::Init).chain(events).chain([watcher::Event::InitDone]);
        events.map(event).collect()
    }

    fn workloads(objects: &mut Objects) -> Option<Vec<String>> {
        let model: Model = Ledger::default().next(&objects.contents()?).model();
        Some(model.workloads.keys().map(ToString::to_string).collect())
    }

    #[test]
    fn nothing_is_listed_before_every_kind_is_or_is_known_not_to_be_there() {
        let mut objects = Objects::default();
        for of in Followed::ALL {
            assert!(!objects.all_listed());
            let what = if of.defined().is_some() { What::Unknown } else { What::Complete };
            objects.apply(Event { of, what });
        }
        assert!(objects.all_listed());
    }

    #[test]
    fn what_was_there_stays_until_a_new_list_is_complete_and_what_it_lacks_goes_then() {
        let mut objects = Objects::default();
        listed(&[pod("a", "10.1.0.1"), pod("b", "10.1.0.2")]).into_iter().for_each(|it| objects.apply(it));
        assert_eq!(workloads(&mut objects).expect("a change"), ["shop/a", "shop/b"]);

        let mut again = listed(&[pod("b", "10.1.0.2"), pod("c", "10.1.0.3")]).into_iter();
        again.by_ref().take(2).for_each(|event| objects.apply(event));
        assert_eq!(workloads(&mut objects), None);
        again.for_each(|event| objects.apply(event));
        assert_eq!(workloads(&mut objects).expect("a change"), ["shop/b", "shop/c"]);
    }

    #[test]
    fn what_a_kind_had_stays_when_the_cluster_says_that_it_does_not_know_it() {
        let mut objects = Objects::default();
        listed(&[pod("a", "10.1.0.1")]).into_iter().for_each(|it| objects.apply(it));
        assert!(objects.contents().is_some());
        objects.apply(Event { of: Followed::Pods, what: What::Unknown });
        assert_eq!(objects.contents(), None);
    }

    #[test]
    fn what_makes_the_same_document_changes_nothing() {
        let mut objects = Objects::default();
        listed(&[pod("a", "10.1.0.1")]).into_iter().for_each(|it| objects.apply(it));
        assert!(objects.contents().is_some());
        let mut same = pod("a", "10.1.0.1");
        same.metadata.resource_version = Some("2".into());
        objects.apply(event(watcher::Event::Apply(same)));
        assert_eq!(objects.contents(), None);
    }

    #[test]
    fn a_pod_is_a_workload_until_it_is_gone() {
        let mut objects = Objects::default();
        objects.apply(event(watcher::Event::Apply(pod("a", "10.1.0.1"))));
        let contents = objects.contents().expect("a change");
        assert!(contents.contains_key(Path::new("kubernetes/pods/shop/a")));
        objects.apply(event(watcher::Event::Delete(pod("a", "10.1.0.1"))));
        assert_eq!(objects.contents(), Some(BTreeMap::new()));
    }

    #[test]
    fn a_pod_is_in_the_zone_of_its_node_whichever_is_heard_of_first() {
        let node = |zone: Option<&str>| {
            let labels = zone.map(|zone| (ZONE.to_owned(), zone.to_owned()));
            let mut node = Node::default();
            node.metadata.name = Some("node-a".into());
            node.metadata.labels = Some(labels.into_iter().collect());
            Event::new(Followed::Nodes, watcher::Event::Apply(node))
        };
        let zones = |objects: &mut Objects| -> Vec<String> {
            let model = Ledger::default().next(&objects.contents().expect("a change")).model();
            model.workloads.values().map(|it| it.place().zone).collect()
        };
        let pods = || [pod("a", "10.1.0.1"), pod("b", "10.1.0.2")].map(watcher::Event::Apply).map(event);
        let mut objects = Objects::default();
        pods().into_iter().for_each(|it| objects.apply(it));
        objects.apply(node(Some("east")));
        assert_eq!(zones(&mut objects), ["east", "east"]);
        objects.apply(node(Some("east")));
        assert_eq!(objects.contents(), None);
        objects.apply(node(None));
        assert_eq!(zones(&mut objects), ["", ""]);

        let mut objects = Objects::default();
        objects.apply(node(Some("west")));
        let [mut own, other] = [pod("a", "10.1.0.1"), pod("b", "10.1.0.2")];
        own.metadata.labels = Some([(ZONE.to_owned(), "its-own".to_owned())].into());
        [own, other].map(watcher::Event::Apply).map(event).into_iter().for_each(|it| objects.apply(it));
        assert_eq!(zones(&mut objects), ["its-own", "west"]);
    }

    #[test]
    fn an_endpoint_that_is_a_pod_of_its_nodes_network_is_outside_whichever_is_heard_of_first() {
        let slice: EndpointSlice = serde_json::from_value(json!({
            "metadata": {"name": "web-x", "namespace": "shop", "labels": {"kubernetes.io/service-name": "web"}},
            "addressType": "IPv4",
            "endpoints": [{"addresses": ["192.0.2.1"], "targetRef": {"kind": "Pod", "namespace": "shop", "name": "h"}}],
            "ports": [{"port": 80}],
        }))
        .expect("a slice");
        let mut host = pod("h", "192.0.2.1");
        host.spec.as_mut().expect("a spec").host_network = Some(true);
        let slice = || Event::new(Followed::Slices, watcher::Event::Apply(slice.clone()));
        let host = || event(watcher::Event::Apply(host.clone()));
        for events in [[slice(), host()], [host(), slice()]] {
            let mut objects = Objects::default();
            events.into_iter().for_each(|event| objects.apply(event));
            let model = Ledger::default().next(&objects.contents().expect("a change")).model();
            let slice = model.slices.values().next().expect("a slice");
            assert_eq!(slice.endpoints[0].workload, None);
            assert!(model.workloads.is_empty());
        }
    }

    #[test]
    fn other_controllers_are_the_endpoints_of_their_service_ready_or_not_but_not_ourselves() {
        let endpoint = |address: &str, pod: &str, ready: bool| {
            let pod = json!({"kind": "Pod", "namespace": "shop", "name": pod});
            json!({"addresses": [address], "conditions": {"ready": ready}, "targetRef": pod})
        };
        let slice: EndpointSlice = serde_json::from_value(json!({
            "metadata": {"name": "web-x", "namespace": "shop", "labels": {"kubernetes.io/service-name": "web"}},
            "addressType": "IPv4",
            "endpoints": [
                endpoint("10.1.0.1", "a", true), endpoint("10.1.0.2", "b", false), endpoint("10.1.0.3", "c", true),
            ],
            "ports": [{"name": "grpc", "port": 15012}, {"name": "admin", "port": 15020}],
        }))
        .expect("a slice");
        let mut objects = Objects::default();
        objects.apply(Event::new(Followed::Slices, watcher::Event::Apply(slice)));
        let others = |service| objects.admin_addresses(&Name::new("shop", service), "c");
        assert_eq!(
            others("web"),
            ["10.1.0.1:15020", "10.1.0.2:15020"].map(|it| it.parse().expect("an address"))
        );
        assert_eq!(others("db"), []);
    }

    /// One of some texts, by its place.
    fn one_of(texts: &'static [&'static str]) -> impl Strategy<Value = &'static str> {
        prop::sample::select(texts)
    }

    fn labels() -> impl Strategy<Value = Value> {
        let label = (
            one_of(&["app", "nodemesh.io/enroll", "nodemesh.io/mode"]),
            one_of(&["true", "strict", "a", ""]),
        );
        prop::collection::vec(label, 0..3)
            .prop_map(|labels| json!(labels.into_iter().collect::<BTreeMap<&str, &str>>()))
    }

    fn metadata(name: &str, labels: &Value) -> Value {
        json!({"name": name, "namespace": "shop", "labels": labels})
    }

    fn address() -> impl Strategy<Value = &'static str> {
        one_of(&["10.1.0.1", "10.1.0.2", "fd01::1", "10.1.0.300", "127.0.0.1"])
    }

    /// A port as a Service or an EndpointSlice has it, some of them wrong.
    fn port() -> impl Strategy<Value = Value> {
        let target = prop_oneof![
            Just(Value::Null),
            one_of(&["http", "Not A Name"]).prop_map(Value::from),
            prop::sample::select(vec![0, 8080, 70_000]).prop_map(Value::from),
        ];
        let number = prop::sample::select(vec![0, 80, 443]);
        (one_of(&["", "http"]), number, target, one_of(&["TCP", "UDP", "ICMP"])).prop_map(
            |(name, number, target, protocol)| {
                json!({"name": name, "port": number, "targetPort": target, "protocol": protocol})
            },
        )
    }

    /// A document that can stand in a directory and in a cluster.
    fn document() -> impl Strategy<Value = Value> {
        let name = || one_of(&["a", "b"]);
        let namespace = (one_of(&["shop", "bank"]), labels()).prop_map(|(name, labels)| {
            json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": labels}})
        });
        let workload = (name(), labels(), address(), any::<Option<bool>>()).prop_map(
            |(name, labels, address, ready)| {
                let mut spec = json!({"node": "n", "addresses": [address]});
                if let Some(ready) = ready {
                    spec["ready"] = json!(ready);
                }
                json!({"apiVersion": "nodemesh.io/v1alpha1", "kind": "Workload",
                    "metadata": metadata(name, &labels), "spec": spec})
            },
        );
        let near = (
            one_of(&["None", "ClientIP"]),
            one_of(&["Cluster", "Local"]),
            one_of(&["PreferClose", "PreferSameNode"]),
        );
        let (addresses, ports) =
            (prop::collection::vec(address(), 0..3), || prop::collection::vec(port(), 0..3));
        let service = (name(), labels(), addresses, ports(), near).prop_map(
            |(name, labels, addresses, ports, (affinity, internal, preferred))| {
                let first = addresses.first().copied().unwrap_or("None");
                let addresses = if addresses.is_empty() { vec!["None"] } else { addresses };
                let spec = json!({"clusterIP": first, "clusterIPs": addresses, "selector": {"app": "a"},
                    "sessionAffinity": affinity, "internalTrafficPolicy": internal, "trafficDistribution": preferred,
                    "ports": ports});
                json!({"apiVersion": "v1", "kind": "Service", "metadata": metadata(name, &labels), "spec": spec})
            },
        );
        let flag = any::<Option<bool>>;
        let endpoint = (address(), flag(), flag(), flag(), prop::option::of(name())).prop_map(
            |(address, ready, serving, terminating, pod)| {
                let target = pod.map(|name| json!({"kind": "Pod", "name": name}));
                json!({"addresses": [address], "targetRef": target,
                    "conditions": {"ready": ready, "serving": serving, "terminating": terminating}})
            },
        );
        let number_only = |mut port: Value| {
            drop(port.as_object_mut().map(|it| it.remove("targetPort")));
            port
        };
        let slice_ports =
            ports().prop_map(move |ports| ports.into_iter().map(number_only).collect::<Vec<_>>());
        let slice =
            (name(), name(), one_of(&["IPv4", "FQDN"]), prop::collection::vec(endpoint, 0..3), slice_ports)
                .prop_map(|(name, service, of, endpoints, ports)| {
                    let labels = json!({"kubernetes.io/service-name": service, "x": "y"});
                    json!({"apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice",
                        "metadata": metadata(name, &labels), "addressType": of, "endpoints": endpoints, "ports": ports})
                });
        let policy = (name(), one_of(&["Allow", "Deny", "Audit"]), labels()).prop_map(|(name, action, labels)| {
            json!({"apiVersion": "nodemesh.io/v1alpha1", "kind": "AuthorizationPolicy",
                "metadata": metadata(name, &json!({})), "spec": {"action": action, "selector": {"matchLabels": labels},
                    "rules": [{"to": [{"ports": [8080, "1-2"]}]}]}})
        });
        let route = (
            name(),
            one_of(&["HTTPRoute", "GRPCRoute"]),
            one_of(&["", "gateway.networking.k8s.io", "other.example.com"]),
            one_of(&["2026-01-31T12:00:00Z", "1970-01-01T00:00:09Z"]),
            one_of(&["RequestHeaderModifier", "ExtensionRef"]),
        )
            .prop_map(|(name, kind, group, created, filter)| {
                let mut metadata = metadata(name, &json!({}));
                metadata["creationTimestamp"] = json!(created);
                json!({"apiVersion": "gateway.networking.k8s.io/v1", "kind": kind, "metadata": metadata, "spec": {
                    "parentRefs": [{"group": group, "kind": "Service", "name": "a"}],
                    "rules": [{"backendRefs": [{"name": "b", "port": 80}],
                        "filters": [{"type": filter, "requestHeaderModifier": {"remove": ["x-a"]}}]}]}})
            });
        let grant = (name(), one_of(&["", "a"])).prop_map(|(name, of)| {
            let mut to = json!({"group": "", "kind": "Service"});
            if !of.is_empty() {
                to["name"] = json!(of);
            }
            json!({"apiVersion": "gateway.networking.k8s.io/v1beta1", "kind": "ReferenceGrant",
                "metadata": metadata(name, &json!({})), "spec": {"to": [to],
                    "from": [{"group": "gateway.networking.k8s.io", "kind": "HTTPRoute", "namespace": "bank"}]}})
        });
        let of_connections = (
            name(),
            one_of(&["TLSRoute", "TCPRoute"]),
            one_of(&["", "other.example.com"]),
            one_of(&["a.example", "A.example"]),
        )
            .prop_map(|(name, kind, group, hostname)| {
                let mut metadata = metadata(name, &json!({}));
                metadata["creationTimestamp"] = json!("1970-01-01T00:00:09Z");
                let mut spec = json!({"parentRefs": [{"group": group, "kind": "Service", "name": "a"}],
                    "rules": [{"backendRefs": [{"name": "b", "port": 80}]}]});
                if kind == "TLSRoute" {
                    spec["hostnames"] = json!([hostname]);
                }
                json!({"apiVersion": "gateway.networking.k8s.io/v1", "kind": kind, "metadata": metadata, "spec": spec})
            });
        prop_oneof![namespace, workload, service, slice, policy, route, of_connections, grant]
    }

    /// As the API server would tell of it.
    fn told(document: &Value) -> Event {
        fn typed<K: Follow + serde::de::DeserializeOwned>(of: Followed, document: &Value) -> Event {
            let object: K = serde_json::from_value(document.clone()).expect("an object of Kubernetes");
            Event::new(of, watcher::Event::Apply(object))
        }
        match document["kind"].as_str() {
            Some("Namespace") => typed::<Namespace>(Followed::Namespaces, document),
            Some("Service") => typed::<Service>(Followed::Services, document),
            Some("EndpointSlice") => typed::<EndpointSlice>(Followed::Slices, document),
            Some("Workload") => typed::<DynamicObject>(Followed::Workloads, document),
            Some("HTTPRoute") => typed::<DynamicObject>(Followed::HttpRoutes, document),
            Some("GRPCRoute") => typed::<DynamicObject>(Followed::GrpcRoutes, document),
            Some("TLSRoute") => typed::<DynamicObject>(Followed::TlsRoutes, document),
            Some("TCPRoute") => typed::<DynamicObject>(Followed::TcpRoutes, document),
            Some("ReferenceGrant") => typed::<DynamicObject>(Followed::Grants, document),
            _ => typed::<DynamicObject>(Followed::Policies, document),
        }
    }

    proptest! {
        #[test]
        fn the_same_documents_in_a_directory_and_in_a_cluster_give_the_same_model(
            documents in prop::collection::vec(document(), 0..12),
        ) {
            // One document of an object: a cluster has no second one.
            let key = |it: &Value| format!("{} {}", it["kind"], it["metadata"]["name"]);
            let documents: BTreeMap<String, Value> = documents.into_iter().map(|it| (key(&it), it)).collect();
            let file = |(name, document): (&String, &Value)| {
                (PathBuf::from(name), Arc::new(FileContent::parse(&document.to_string())))
            };
            let directory = Ledger::default().next(&documents.iter().map(file).collect());
            let mut objects = Objects::default();
            documents.values().for_each(|document| objects.apply(told(document)));
            let cluster = Ledger::default().next(&objects.contents().unwrap_or_default());
            prop_assert_eq!(directory.model(), cluster.model());
            let refused = |ledger: &Ledger| -> BTreeSet<Option<String>> {
                ledger.refused().iter().map(|it| it.object.clone()).collect()
            };
            prop_assert_eq!(refused(&directory), refused(&cluster));
        }
    }
}
