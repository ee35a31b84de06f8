//! The agent: one per node. It owns sockets inside the network namespaces of the node's workloads, to which kernel
//! programs steer their connections, and carries each over mutual TLS to the destination's agent.
//!
//! A module uses only rows below its own (a tidy test checks it):
//!
//! | row | modules | what |
//! |---|---|---|
//! | 1 | [`agent`] | composition: what exists, who owns it, in which order it starts and stops |
//! | 2 | [`enrol`], [`admin`], [`control`] | the reconcile loop that keeps workloads captured; metrics and state over HTTP; everything that speaks with the controller |
//! | 3 | [`listen`], [`checks`] | accept loops; whether the node's workloads are well |
//! | 4 | [`connection`] | ★ the story of a connection, outbound and inbound |
//! | 5 | [`connect`] | the way there |
//! | 6 | [`authorize`], [`balance`], [`relay`], [`record`] | the other steps |
//! | 7 | [`view`], [`identity`], [`tunnel`], [`capture`], [`drain`], [`ownership`], [`headroom`], [`live`], [`spans`] | what the steps stand on; how near limits are; the connections that live now; spans of requests |
//! | 8 | [`wants`], [`access_log`] | the addresses that connections use, and what the controller is asked for; lines of what has ended |
//! | 9 | [`config`], [`metrics`], [`rpc`], [`run_dir`], [`limits`], [`local`], [`trust`], [`stalled`], [`underway`] | settings; counters; the controller's services; what survives a restart; limits; this node's workloads; to which root a peer's certificate led; what waits for readers; what is under way to services |
//! | 10 | [`refusal`], [`net`], [`quota`], [`rates`], [`surroundings`], [`health`], [`privileges`], [`secrets`], [`threads`], [`wake`] | how a connection ends; sockets and namespaces; who holds how much; what is left of what workloads take; time, chance and the way to the controller; what is wrong with the control side; what the agent may do; the secrets that tunnels' keys come from; the threads that carry connections; parts of a task that are polled only when they were woken |

pub mod access_log;
pub mod admin;
pub mod agent;
pub mod authorize;
pub mod balance;
pub mod capture;
pub mod checks;
pub mod config;
pub mod connect;
pub mod connection;
pub mod control;
pub mod drain;
pub mod enrol;
pub mod headroom;
pub mod health;
pub mod identity;
pub mod limits;
pub mod listen;
pub mod live;
pub mod local;
pub mod metrics;
pub mod net;
pub mod ownership;
pub mod privileges;
pub mod quota;
pub mod rates;
pub mod record;
pub mod refusal;
pub mod relay;
pub mod rpc;
pub mod run_dir;
pub mod secrets;
pub mod spans;
pub mod stalled;
pub mod surroundings;
pub mod threads;
pub mod trust;
pub mod tunnel;
pub mod underway;
pub mod view;
pub mod wake;
pub mod wants;
