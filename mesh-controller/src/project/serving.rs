//! Who serves a service: what EndpointSlices say, and which workloads its selector names.

use std::{
    collections::{BTreeMap, HashMap},
    net::IpAddr,
    sync::Arc,
};

use mesh_core::model::{Choice, Distribution, Endpoint, Name, Place, Service, ServicePort};

use super::checked::Checked;
use crate::{
    model::{self, Model},
    routes, traffic,
};

/// The workloads that are ready, by namespace and label, so that a service looks only at those that may be its own.
pub(super) struct Ready<'a>(HashMap<(&'a str, &'a str, &'a str), Vec<&'a model::Workload>>);

impl<'a> Ready<'a> {
    pub(super) fn new(model: &'a Model) -> Self {
        let mut by_label: HashMap<_, Vec<&model::Workload>> = HashMap::new();
        for workload in model.workloads.values().filter(|workload| workload.ready) {
            for (key, value) in &workload.labels {
                let label = (workload.name.namespace.as_str(), key.as_str(), value.as_str());
                by_label.entry(label).or_default().push(workload);
            }
        }
        Self(by_label)
    }

    /// The workloads that serve a service, by name.
    fn of(&self, service: &model::Service) -> Vec<&'a model::Workload> {
        let namespace = service.name.namespace.as_str();
        let labels = service.selector.iter().map(|(key, value)| (namespace, key.as_str(), value.as_str()));
        let with = labels.map(|label| self.0.get(&label).map_or(&[][..], Vec::as_slice));
        let rarest = with.min_by_key(|workloads| workloads.len()).unwrap_or_default();
        rarest.iter().copied().filter(|workload| service.selects(&workload.labels)).collect()
    }
}

/// The EndpointSlices, by the Service that each belongs to.
pub(super) struct Slices<'a> {
    workloads: &'a BTreeMap<Name, Arc<model::Workload>>,
    by_service: HashMap<(&'a str, &'a str), Vec<&'a model::EndpointSlice>>,
}

impl<'a> Slices<'a> {
    pub(super) fn new(model: &'a Model) -> Self {
        let mut by_service: HashMap<_, Vec<&model::EndpointSlice>> = HashMap::new();
        for slice in model.slices.values() {
            let service = (slice.name.namespace.as_str(), slice.service.as_str());
            by_service.entry(service).or_default().push(slice);
        }
        Self { workloads: &model.workloads, by_service }
    }

    /// Those of a service; none if nobody says more of its endpoints than its selector does.
    fn of<'s>(&'s self, service: &'s Name) -> Option<&'s [&'s model::EndpointSlice]> {
        self.by_service.get(&(service.namespace.as_str(), service.name.as_str())).map(Vec::as_slice)
    }

    /// Where the endpoints of a service are: what a workload says of itself is better than what its slice says.
    fn places(
        &self,
        slices: &[&model::EndpointSlice],
        serving: &[&model::Workload],
    ) -> BTreeMap<IpAddr, Place> {
        let at = |workload: &model::Workload| {
            let place = workload.place();
            workload.addresses.clone().into_iter().map(move |address| (address, place.clone()))
        };
        let of_slices = slices.iter().flat_map(|slice| &slice.endpoints);
        let mut places: BTreeMap<IpAddr, Place> =
            of_slices.clone().map(|it| (it.address, it.place.clone())).collect();
        let named = of_slices.filter_map(|it| self.workloads.get(it.workload.as_ref()?)).map(|it| &**it);
        places.extend(named.chain(serving.iter().copied()).flat_map(at));
        places
    }

    /// The endpoints of a port; while none is ready those that are ending and serve still, as kube-proxy has it. One that
    /// is said to be a workload which does not have the address is left out: who is there cannot be told.
    fn endpoints(&self, slices: &[&model::EndpointSlice], port: &str) -> Vec<Endpoint> {
        let known = |it: &&model::SliceEndpoint| match &it.workload {
            None => true,
            Some(name) => self.workloads.get(name).is_some_and(|known| known.addresses.contains(&it.address)),
        };
        let of_slice = |slice: &&model::EndpointSlice| {
            let (_, number) = *slice.ports.iter().find(|(name, _)| name == port)?;
            Some((slice.endpoints.clone(), number))
        };
        let all: Vec<(Vec<model::SliceEndpoint>, u16)> = slices.iter().filter_map(of_slice).collect();
        let with = |ending: bool| -> Vec<Endpoint> {
            let each = all.iter().flat_map(|(endpoints, number)| endpoints.iter().map(|it| (it, *number)));
            each.filter(|(it, _)| it.ending == ending && known(it))
                .map(|(it, port)| Endpoint { workload: it.workload.clone(), address: it.address, port })
                .collect()
        };
        let ready = with(false);
        if ready.is_empty() { with(true) } else { ready }
    }
}

/// A service with its ready endpoints, less those that are unhealthy: what its EndpointSlices say, where it has some, and one per matching workload and
/// address. Of pods the slices alone decide, as whoever writes them knows more than labels say.
pub(super) fn service(
    wanted: &model::Service,
    ready: &Ready<'_>,
    slices: &Slices<'_>,
    traffic: &traffic::Resolved,
    checked: &mut Checked<'_>,
    routes: &routes::Resolved,
) -> Service {
    let slices_of = slices.of(&wanted.name);
    let mut serving = ready.of(wanted);
    serving.retain(|workload| slices_of.is_none() || workload.uid.is_empty());
    let mut port = |port: &model::Port| {
        let of_workload = |workload: &&model::Workload| {
            let (name, target) = (workload.name.clone(), port.target);
            let at = workload.addresses.clone().into_iter();
            target.map(|port| at.map(move |address| Endpoint { workload: Some(name.clone()), address, port }))
        };
        let mut endpoints: Vec<Endpoint> = serving.iter().filter_map(of_workload).flatten().collect();
        endpoints.extend(slices_of.iter().flat_map(|of| slices.endpoints(of, &port.name)));
        endpoints.sort();
        endpoints.dedup();
        if let Some(check) = traffic.check_of(&wanted.name, port.port) {
            checked.port(&wanted.name, port.port, check, &mut endpoints);
        }
        let traffic = traffic.of_port(&wanted.name, port.port);
        let of_port = routes.connections.get(&(wanted.name.clone(), port.port));
        let routes = of_port.cloned().unwrap_or_default();
        ServicePort { name: port.name.clone(), port: port.port, endpoints, traffic, routes }
    };
    let ports: Vec<ServicePort> = wanted.ports.iter().map(&mut port).collect();
    let places = match wanted.distribution {
        Distribution::Any => BTreeMap::new(),
        _ => slices.places(slices_of.unwrap_or_default(), &serving),
    };
    let choice = Choice { distribution: wanted.distribution, affinity: wanted.affinity, places };
    Service { name: wanted.name.clone(), addresses: wanted.addresses.clone(), ports, choice }
}
