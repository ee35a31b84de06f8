//! Who the node's workloads are: their certificates, the roots that others' certificates must lead to, and how both
//! are renewed.

pub mod store;
pub mod verify;
