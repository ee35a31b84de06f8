//! A controller of the cluster at hand, and what it answers.

use std::{
    fs,
    io::{Read, Write},
    net::{SocketAddr, TcpListener, TcpStream},
    path::{Path, PathBuf},
    process::Command,
};

use mesh_tests::{
    cluster::Cluster,
    process::{self, Program},
    until, wait,
};
use serde_json::Value;

use crate::SOON;

/// A controller beside the cluster, as its administrator.
pub(crate) struct Controller {
    pub(crate) program: Option<Program>,
    admin: SocketAddr,
    pub(crate) log: PathBuf,
}

impl Controller {
    pub(crate) fn start(cluster: &Cluster, directory: &Path, name: &str) -> Self {
        let free = || TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let (agents, admin) = (free(), free());
        let log = directory.join(format!("{name}.log"));
        let mut command = Command::new(process::binaries().unwrap().join("mesh-controller"));
        command.args(["run", "--source", "kube", "--state-dir"]).arg(directory.join(name));
        command.args(["--listen", &agents.to_string(), "--admin-listen", &admin.to_string()]);
        command.env("KUBECONFIG", cluster.kubeconfig()).env("RUST_LOG", "info,mesh_controller=debug");
        let program = Program::start("mesh-controller", &mut command, &log).unwrap();
        let controller = Self { program: Some(program), admin, log };
        until("the controller is ready", SOON, || controller.get("/readyz").map(drop));
        controller
    }

    pub(crate) fn get(&self, path: &str) -> Result<String, String> {
        let ask = || {
            let mut stream = TcpStream::connect(self.admin)?;
            write!(stream, "GET {path} HTTP/1.0\r\nHost: {}\r\n\r\n", self.admin)?;
            let mut answer = String::new();
            stream.read_to_string(&mut answer).map(|_| answer)
        };
        let answer: std::io::Result<String> = ask();
        let answer = answer.map_err(|error| format!("{error}\n{}", process::tail(&self.log)))?;
        let (head, body) = answer.split_once("\r\n\r\n").unwrap_or((&answer, ""));
        wait::holds(head.contains(" 200 "), || answer.clone()).map(|()| body.to_owned())
    }

    pub(crate) fn rows(&self, kind: &str) -> Vec<Value> {
        serde_json::from_str(&self.get(&format!("/api/v1/{kind}")).unwrap()).unwrap()
    }

    pub(crate) fn row(&self, kind: &str, name: &str) -> Option<Value> {
        self.rows(kind).into_iter().find(|row| row["name"] == name)
    }

    /// What a service's first port leads to, as `WORKLOAD ADDRESS:PORT`; without a workload `outside ADDRESS:PORT`.
    pub(crate) fn endpoints(&self, service: &str) -> Vec<String> {
        let Some(row) = self.row("services", service) else { return vec![] };
        let endpoint = |it: &Value| {
            let text = |field: &str| it[field].as_str().unwrap_or("outside").to_owned();
            let workload = it["workload"].as_object().map(|name| {
                format!("{}/{}", name["namespace"].as_str().unwrap(), name["name"].as_str().unwrap())
            });
            let workload = workload.unwrap_or_else(|| text("workload"));
            format!("{workload} {}:{}", text("address"), it["port"])
        };
        row["ports"][0]["endpoints"].as_array().unwrap().iter().map(endpoint).collect()
    }

    pub(crate) fn says(&self, what: &str) -> bool {
        fs::read_to_string(&self.log).unwrap().contains(what)
    }

    pub(crate) fn kill(&mut self) {
        self.program.take().unwrap().kill().unwrap();
    }
}
