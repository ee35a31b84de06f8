//! What the kernel programs and the agent share: the types in the maps, and the decisions as pure functions.
//!
//! Builds for the kernel (`no_std`, bpfel) and for the host, where the decisions are tested.
//!
//! | module | what it holds |
//! |---|---|
//! | [`abi`] | marks, map keys and values, counters |
//! | [`packet`] | headers read from bytes |
//! | [`neighbour`] | what a frame tells of who is where |
//! | [`capture`] | what the pod's end of the veth does with a packet |
//! | [`guard`] | what the node's end of the veth does with a packet |
//! | [`reset`] | the RST that answers a refused packet |
#![cfg_attr(not(test), no_std)]

pub mod abi;
pub mod capture;
pub mod guard;
pub mod neighbour;
pub mod packet;
pub mod reset;
