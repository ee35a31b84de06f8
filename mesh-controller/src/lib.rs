//! The controller: one per mesh. It turns manifests into one view per node, tells the agents what changes, and signs
//! certificates. Also the library of `meshctl`, which reads manifests and answers as the controller does.
//!
//! A module uses only rows below its own (a tidy test checks it):
//!
//! | row | modules | what |
//! |---|---|---|
//! | 1 | [`controller`] | composition: what exists, who owns it, in which order it starts and stops |
//! | 2 | [`api`], [`admin`] | gRPC for agents; HTTP for people and Prometheus, with `why` |
//! | 3 | [`distribute`] | versions of each node's view, and who has which |
//! | 4 | [`review`] | what is legal and suspicious |
//! | 5 | [`source`], [`project`], [`ca`], [`report`], [`token`], [`generation`] | manifests into the model; views out of it; certificates; what agents said; who may join; which start of which state this is |
//! | 6 | [`model`] | the whole desired state |
//! | 7 | [`config`], [`metrics`], [`store`], [`digest`], [`clock`], [`privileges`] | settings; counters; files that are whole or absent; SHA-256; the time; having none |

pub mod admin;
pub mod api;
pub mod ca;
pub mod clock;
pub mod config;
pub mod controller;
pub mod digest;
pub mod distribute;
pub mod generation;
pub mod metrics;
pub mod model;
pub mod privileges;
pub mod project;
pub mod report;
pub mod review;
pub mod source;
pub mod store;
pub mod token;
