//! What must hold of every value: properties of the decision, the view, the wire, routes and frames.

mod arbitrary;
mod authentication;
mod frame;
mod http;
mod policy;
mod rate;
mod route;
mod tcp;
mod view;
