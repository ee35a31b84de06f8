//! What the mesh's words mean, told once for agent, controller and command line.
//!
//! Everything here is pure: it takes data (time and randomness included) and returns data. No I/O, no clock, no lock,
//! no runtime. That is what lets `meshctl why` run the very decision that an agent runs.
//!
//! | module | what it holds |
//! |---|---|
//! | [`identity`] | trust domains and SPIFFE IDs |
//! | [`model`] | workloads, services, policies as the mesh sees them |
//! | [`view`] | what one node must know: resources, their difference, the indexed snapshot |
//! | [`version`] | which controller's start counted a view, and how far |
//! | [`route`] | where a captured connection leads |
//! | [`policy`] | who may connect; the one `decide` |
//! | [`authentication`] | whose token a request bears |
//! | [`http`] | which rule a request falls under, and what is done with it |
//! | [`tcp`] | which route a connection falls under, and where it leads |
//! | [`balance`] | which endpoint takes the next connection |
//! | [`health`] | which endpoints are well, by their checks |
//! | [`intake`] | whether a workload takes a request |
//! | [`frame`] | the frames inside a tunnel |
//! | [`refusal`] | every reason for which a connection is refused |
//! | [`wire`] | the contract between controller and agents, and its conversions |

pub mod authentication;
pub mod balance;
pub mod frame;
pub mod health;
pub mod http;
pub mod identity;
pub mod intake;
pub mod model;
pub mod policy;
pub mod refusal;
pub mod route;
pub mod tcp;
pub mod version;
pub mod view;
pub mod wire;
