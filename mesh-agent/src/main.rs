//! `mesh-agent`: see the library.
fn main() {}
