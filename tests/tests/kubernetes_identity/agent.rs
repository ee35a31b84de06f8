//! An agent's control side on a node of the cluster: real TLS and gRPC, and the test says how its workloads are.

use std::{
    net::SocketAddr,
    sync::{Arc, Mutex},
};

use mesh_agent::{
    config::{Config, Invocation},
    control::Control,
    rpc::Connection,
    surroundings::{Dial, Stream, Surroundings},
    view::{Enrolment, Role, report::HealthWord},
};
use mesh_core::{
    health::Health,
    model::{Name, health::CheckedEndpoint},
    view::Snapshot,
};
use mesh_tests::{until, wait::holds};
use tokio::{net::TcpStream, runtime::Runtime};
use tokio_util::sync::CancellationToken;

use crate::bed::{Bed, SOON};

/// An agent that reaches whichever controller it is sent to, as by a Service.
pub(crate) struct Agent {
    runtime: Runtime,
    control: Option<Control>,
    to: Arc<Mutex<SocketAddr>>,
    _files: tempfile::TempDir,
}

impl Agent {
    /// Joins with the token of a pod.
    pub(crate) fn start(bed: &Bed, node: &str, pod: &str, to: SocketAddr) -> Self {
        let files = tempfile::tempdir_in("/dev/shm").unwrap();
        let [token, roots, run] = ["token", "roots.pem", "run"].map(|name| files.path().join(name));
        std::fs::write(&token, bed.token(pod, "mesh")).unwrap();
        std::fs::copy(bed.roots(1), &roots).unwrap();
        let words = ["mesh-agent", "--node", node, "--controller", "controller:15012", "--run-dir"];
        let more =
            ["--join-service-account-token".into(), token.into_os_string(), "--roots".into(), roots.into()];
        let words = words.map(Into::into).into_iter().chain([run.into()]).chain(more);
        let Invocation::Run(config) = Invocation::parse::<std::ffi::OsString>(words).unwrap() else {
            panic!("not a run")
        };
        let to = Arc::new(Mutex::new(to));
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let control = runtime.block_on(control(&config, to.clone()));
        Self { runtime, control: Some(control), to, _files: files }
    }

    /// Where its next connection leads.
    pub(crate) fn send_to(&self, to: SocketAddr) {
        *self.to.lock().unwrap() = to;
    }

    fn control(&self) -> &Control {
        self.control.as_ref().unwrap()
    }

    /// What its node knows.
    pub(crate) fn view(&self) -> Option<Arc<Snapshot>> {
        self.control().snapshots.borrow().clone()
    }

    pub(crate) fn is_connected(&self) -> bool {
        *self.control().connection.borrow() == Connection::Open
    }

    /// No view was taken for one of a restored controller.
    pub(crate) fn views_restored(&self) -> u64 {
        self.control().condition.borrow().views_restored
    }

    /// Says how a workload of its node is, that is the pod which the view names.
    pub(crate) fn say(&self, workload: &Name, enrolment: Enrolment, reason: &str) {
        let uid = self.view().unwrap().workload(workload).unwrap().uid.clone();
        self.say_of(workload, &uid, enrolment, reason);
    }

    /// The same of a pod that may be another.
    pub(crate) fn say_of(&self, workload: &Name, uid: &str, enrolment: Enrolment, reason: &str) {
        self.control().reports.is_pod(workload, uid);
        self.control().reports.set(workload, enrolment, reason);
    }

    /// Says what came of the one check of a workload of its node.
    pub(crate) fn finds(&self, workload: &Name, of: &CheckedEndpoint, health: Health, reason: &str) {
        let reports = &self.control().reports;
        reports.is_pod(workload, &self.view().unwrap().workload(workload).unwrap().uid);
        reports.checked(workload, [of.clone()].into_iter());
        reports.health(workload, of, HealthWord { health, reason: reason.to_owned() });
    }

    /// Says that nothing is checked of a workload of its node.
    pub(crate) fn checks_nothing_of(&self, workload: &Name) {
        self.control().reports.checked(workload, std::iter::empty());
    }

    /// Waits until its view says of a workload whether it is captured.
    #[track_caller]
    pub(crate) fn until_captured(&self, workload: &Name, captured: bool) {
        until("the view says whether it is captured", SOON, || {
            let view = self.view().ok_or("no view")?;
            let known = view.workload(workload).ok_or_else(|| format!("{workload} is not in it"))?;
            holds(known.captured == captured, || format!("{known:?}"))
        });
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        if let Some(control) = self.control.take() {
            self.runtime.block_on(control.stop());
        }
    }
}

async fn control(config: &Config, to: Arc<Mutex<SocketAddr>>) -> Control {
    let dial = Dial::new(move |_, _| {
        let to = *to.lock().unwrap();
        Box::pin(async move { Ok(Box::new(TcpStream::connect(to).await?) as Box<dyn Stream>) })
    });
    let surroundings = Surroundings { dial, ..Surroundings::default() };
    let shutdown = CancellationToken::new();
    Control::start(config, Arc::default(), Role::Owner, surroundings, shutdown).await.unwrap()
}
