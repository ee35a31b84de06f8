//! The controller: one per mesh. It turns manifests into one view per node, tells the agents what changes, and signs
//! certificates. Also the library of `meshctl`, which reads manifests and answers as the controller does.
//!
//! A module uses only rows below its own (a tidy test checks it):
//!
//! | row | modules | what |
//! |---|---|---|
//! | 1 | [`controller`] | composition: what exists, who owns it, in which order it starts and stops |
//! | 2 | [`api`], [`admin`], [`writeback`] | gRPC for agents; HTTP for people and Prometheus, with `why`; reports onto pods |
//! | 3 | [`distribute`] | versions of each node's view, and who has which |
//! | 4 | [`review`] | what is legal and suspicious |
//! | 5 | [`source`], [`project`], [`ca`], [`bundle`], [`report`], [`token`], [`attest`], [`generation`] | manifests into the model; views out of it; certificates; the roots, published; what agents said; who may join, by a token of ours or by Kubernetes' word; which start of which state this is |
//! | 6 | [`routes`] | which routes are in force for which Services, and where they lead |
//! | 7 | [`traffic`], [`jwks`] | which policies say how that is sent; issuers' keys |
//! | 8 | [`model`], [`conditions`] | the whole desired state; what pods say of their capture |
//! | 9 | [`config`], [`metrics`], [`store`], [`digest`], [`clock`], [`kubernetes`], [`others`], [`privileges`], [`health`] | settings; counters; files that are whole or absent; SHA-256; the time; the way to an API server; the other controllers; having none; what agents said of endpoints |

pub mod admin;
pub mod api;
pub mod attest;
pub mod bundle;
pub mod ca;
pub mod clock;
pub mod conditions;
pub mod config;
pub mod controller;
pub mod digest;
pub mod distribute;
pub mod generation;
pub mod health;
pub mod jwks;
pub mod kubernetes;
pub mod metrics;
pub mod model;
pub mod others;
pub mod privileges;
pub mod project;
pub mod report;
pub mod review;
pub mod routes;
pub mod source;
pub mod store;
pub mod token;
pub mod traffic;
pub mod writeback;
