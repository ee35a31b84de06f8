//! What the kernel programs and the agent share: the types in the maps, and the decisions as pure functions.
//!
//! Builds for the kernel (`no_std`, bpfel) and for the host, where the decisions are tested.
#![no_std]

pub mod abi;
