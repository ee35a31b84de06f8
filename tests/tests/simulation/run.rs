//! One run: an hour of a mesh of three nodes in which everything goes wrong, and what must hold all the same.

use std::{
    collections::BTreeMap,
    fmt::{self, Write},
    sync::Mutex,
    time::Duration,
};

use mesh_agent::identity::join::{Proof, join};

use crate::{
    chances::Chances,
    mesh::{Agent, Controller, Time},
    net::Net,
};

const NODES: [&str; 3] = ["n1", "n2", "n3"];
const WORKLOADS: [&str; 6] = ["web", "api", "db", "cache", "queue", "mail"];
/// How long a run is.
const RUN: Duration = Duration::from_secs(3600);
/// How long everything may be wrong at a time: a certificate has at least five minutes left when its renewal begins,
/// with clocks five minutes off.
const WRONG_AT_MOST: u64 = 120;
/// Once everything is in order: until views and certificates are. The agent's longest pause and longest connect, the
/// controller's wait for all nodes' word.
const CONVERGED: Duration = Duration::from_secs(25);
/// Roots that a run makes at most; a bundle has room for eight.
const ROTATIONS: u32 = 5;
/// How far clocks may be off, seconds.
const CLOCK_OFF: u64 = 300;
/// The furthest that clocks are set forward at a time, seconds.
const JUMP: u64 = 120;

/// What happened in a run, for whoever reads that it failed.
#[derive(Debug, Default)]
pub(crate) struct Story(Mutex<String>);

impl fmt::Display for Story {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0.lock().unwrap())
    }
}

/// Runs it.
pub(crate) fn hour(seed: u64, story: &Story) {
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build().unwrap();
    runtime.block_on(async { Run::begin(seed, story).await.go_on().await });
}

struct Run<'a> {
    story: &'a Story,
    chances: Chances,
    time: Time,
    net: Net,
    controller: Controller,
    agents: Vec<Agent>,
    /// Where each workload is, and its label.
    placed: BTreeMap<&'static str, (&'static str, u64)>,
    rotations: u32,
}

impl<'a> Run<'a> {
    async fn begin(seed: u64, story: &'a Story) -> Self {
        let chances = Chances::new(seed);
        let time = Time::begin();
        let net = Net::new(&NODES, chances.fork());
        let off = || chances.between(0, 2 * CLOCK_OFF + 1).cast_signed() - CLOCK_OFF.cast_signed();
        // Whole views, views by demand, and a mesh that goes from one to the other.
        let whole_views_up_to = *chances.one_of(&[usize::MAX, 0, 3]);
        let controller = Controller::new(&time, off(), whole_views_up_to, &net);
        let agents = NODES.map(|node| Agent::new(node, &time, off(), &net, &chances)).into();
        let placed = BTreeMap::from([("web", ("n1", 0)), ("api", ("n1", 0)), ("db", ("n2", 0))]);
        let mut run = Self { story, chances, time, net, controller, agents, placed, rotations: 0 };
        run.publish();
        run.controller.start();
        for agent in &mut run.agents {
            agent.give(&run.controller.token(&agent.node));
            agent.start().await;
        }
        run
    }

    async fn go_on(mut self) {
        self.converge().await;
        while self.time.elapsed() < RUN {
            self.calm().await;
            self.trouble().await;
            self.converge().await;
            self.use_a_token_again().await;
        }
    }

    fn tell(&self, what: impl fmt::Display) {
        writeln!(self.story.0.lock().unwrap(), "{:8.1} s  {what}", self.time.elapsed().as_secs_f64())
            .unwrap();
    }

    /// Lets time pass, and looks at what must hold at any moment.
    async fn pass(&mut self, seconds: u64) {
        for _ in 0..seconds {
            // Simulated time: it goes on when nobody has anything to do, and nobody waits.
            tokio::time::sleep_until(tokio::time::Instant::now() + Duration::from_secs(1)).await;
            for agent in &mut self.agents {
                agent.check();
            }
        }
    }

    /// Things change, and nothing fails.
    async fn calm(&mut self) {
        for _ in 0..self.chances.between(0, 4) {
            self.change();
            self.connect();
            let pause = self.chances.between(0, 60);
            self.pass(pause).await;
        }
        let pause = self.chances.between(30, 300);
        self.pass(pause).await;
    }

    /// Things change while others fail.
    async fn trouble(&mut self) {
        let mut left = WRONG_AT_MOST;
        for _ in 0..self.chances.between(1, 7) {
            self.fail().await;
            if self.chances.once_in(2) {
                self.change();
            }
            self.connect();
            let pause = self.chances.between(0, 30).min(left);
            left -= pause;
            self.pass(pause).await;
        }
        self.tell("everything is in order again");
        for node in NODES {
            self.net.cut(node, false);
        }
        if !self.controller.runs() {
            self.controller.start();
        }
    }

    async fn fail(&mut self) {
        let node = *self.chances.one_of(&NODES);
        match self.chances.between(0, 7) {
            0 | 1 => {
                self.tell(format_args!("{node} is cut off"));
                self.net.cut(node, true);
            }
            2 => {
                self.tell(format_args!("{node} is back on the net"));
                self.net.cut(node, false);
            }
            3 => {
                self.tell("the controller dies");
                self.controller.kill();
                if self.chances.once_in(2) {
                    self.tell("and is started again");
                    self.controller.start();
                }
            }
            4 | 5 => {
                self.tell(format_args!("the agent of {node} dies and is started again"));
                let agent = self.agents.iter_mut().find(|agent| agent.node == node).unwrap();
                agent.kill();
                agent.start().await;
            }
            _ => {
                let by = self.chances.between(1, JUMP);
                self.tell(format_args!("all clocks are set forward by {by} s"));
                self.time.jump(Duration::from_secs(by));
            }
        }
    }

    fn change(&mut self) {
        let workload = *self.chances.one_of(&WORKLOADS);
        let node = *self.chances.one_of(&NODES);
        match self.chances.between(0, 8) {
            0..=2 => {
                self.tell(format_args!("{workload} is on {node} now"));
                self.placed.insert(workload, (node, 0));
            }
            3 => {
                self.tell(format_args!("{workload} is gone"));
                self.placed.remove(workload);
            }
            4..=6 => {
                let label = self.chances.between(0, 1000);
                self.tell(format_args!("{workload}'s label is {label}, if it is there"));
                if let Some((_, told)) = self.placed.get_mut(workload) {
                    *told = label;
                }
            }
            _ if self.rotations < ROTATIONS => {
                self.tell("the root is rotated");
                self.rotations += 1;
                self.controller.rotate_root();
            }
            _ => {}
        }
        self.publish();
    }

    /// A node's workloads connect to somebody, and to an address that may be nobody's.
    fn connect(&self) {
        let agent = self.chances.one_of(&self.agents);
        let last = self.chances.between(1, 10) as u8;
        self.tell(format_args!("{} connects to 10.0.0.{last}", agent.node));
        agent.connects([10, 0, 0, last].into());
    }

    fn publish(&self) {
        let mut text =
            "apiVersion: v1\nkind: Namespace\nmetadata: {name: shop, labels: {nodemesh.io/enroll: 'true'}}\n"
                .to_owned();
        for (place, (workload, (node, label))) in (1..).zip(&self.placed) {
            let address: u8 = place;
            write!(
                text,
                "---\napiVersion: nodemesh.io/v1alpha1\nkind: Workload\nmetadata: {{name: {workload}, namespace: shop, labels: {{app: \
                 v{label}}}}}\nspec: {{node: {node}, addresses: [10.0.0.{address}], serviceAccount: {workload}}}\n"
            )
            .unwrap();
        }
        self.controller.read(&text);
    }

    /// Waits until every agent has what it should, within a known time.
    async fn converge(&mut self) {
        let deadline = self.time.elapsed() + CONVERGED;
        loop {
            let wrong: Vec<String> = self
                .agents
                .iter()
                .filter_map(|agent| {
                    let expected = self.controller.view(&agent.node, &agent.asked());
                    let wrong = agent.settled(&expected).err()?;
                    Some(format!("{}: {wrong}", agent.node))
                })
                .collect();
            if wrong.is_empty() {
                return self.tell("converged");
            }
            assert!(self.time.elapsed() < deadline, "not in order after {CONVERGED:?}: {wrong:#?}");
            self.pass(1).await;
        }
    }

    async fn use_a_token_again(&self) {
        let agent = self.chances.one_of(&self.agents);
        let controller = "controller:15012".parse().unwrap();
        let thief = join(&controller, &agent.node, &Proof::Token(agent.token()), &agent.surroundings).await;
        // After a rotation the token names a root that the controller's chain does not end in: refused earlier still.
        assert!(thief.is_err(), "the token of {} was used again", agent.node);
    }
}
