//! Worlds for tests: nodes and workloads as network namespaces, with the real kernel, the real controller and real
//! agents, looked at from outside (the wire, the application, the metrics, the access log).
//!
//! A test builds a [`World`], talks through its workloads' sockets and asserts on what came out. Nothing here knows
//! the agent's code: only its command line, its files and its HTTP interface.
//!
//! | module | what it holds |
//! |---|---|
//! | [`world`] | a whole world: building, waiting until it is settled, changing, taking down |
//! | [`workload`] | one workload: its sockets and programs |
//! | [`agent`], [`controller`] | the processes under test, and what they say of themselves |
//! | [`load`] | connections in the background, and what went wrong with them |
//! | [`frame`] | frames made by hand, as a workload with root sends them |
//! | [`log`] | lines of access logs, told apart |
//! | [`manifests`] | the directory of YAML that the controller reads |
//! | [`apps`] | applications to talk to: HTTP-like, echo, hash |
//! | [`wire`] | what crossed the wire between the nodes |
//! | [`topology`] | addresses and links, in the shapes of real CNI plugins |
//! | [`slot`] | which world this is on the machine; removal of what crashed runs left |
//! | [`attached`] | what is attached to an interface, asked of the kernel |
//! | [`halt`] | a program whose first thread stands still |
//! | [`cluster`] | a real Kubernetes: its names, bringing it up, talking to it, taking it down |
//! | [`page`] | what a page for operators has its readers run |
//! | [`prometheus`], [`promql`] | a real Prometheus, and whether what its expressions name is there |
//! | [`netns`], [`process`], [`http`], [`metrics`], [`wait`] | what the above stand on |

pub mod agent;
pub mod apps;
pub mod attached;
pub mod cluster;
pub mod controller;
pub mod frame;
pub mod halt;
pub mod http;
pub mod load;
pub mod log;
pub mod manifests;
pub mod metrics;
pub mod netns;
pub mod page;
pub mod process;
pub mod prometheus;
pub mod promql;
pub mod slot;
pub mod topology;
pub mod wait;
pub mod wire;
pub mod workload;
pub mod world;

pub use apps::Server;
pub use topology::Shape;
pub use wait::until;
pub use workload::Workload;
pub use world::{WorkloadSpec, World};
