//! Buffers that a connection borrows while it has bytes in hand.
//!
//! An idle connection holds none: it waits for readiness first and borrows after. The pool bounds what is kept for
//! the next borrower, not what is lent: a direction that stalls keeps its buffer, which [`crate::stalled`] bounds, and
//! cannot make others wait for theirs.

use std::{
    cell::RefCell,
    ops::{Deref, DerefMut},
};

/// Bytes that one read takes at most: more than 64 KiB was not faster (`docs/adr/0002-leased-connections.md`).
pub(crate) const READ: usize = 64 * 1024;
/// Bytes of a buffer: what [`READ`] bytes of ciphertext can become when the start of a record was read before.
pub(crate) const SIZE: usize = READ + 18 * 1024;
/// Buffers that a thread keeps for reuse: 5 MiB.
const KEPT: usize = 64;

thread_local! {
    /// Of each thread its own: what was given back last is still near its processor.
    static FREE: RefCell<Vec<Box<[u8]>>> = const { RefCell::new(Vec::new()) };
}

/// A borrowed buffer of [`SIZE`] bytes; its content is what the last borrower left.
#[derive(Debug)]
pub(crate) struct Buffer(Option<Box<[u8]>>);

impl Buffer {
    /// Borrows a buffer.
    pub(crate) fn take() -> Self {
        let free = FREE.with_borrow_mut(Vec::pop);
        Self(Some(free.unwrap_or_else(|| vec![0; SIZE].into_boxed_slice())))
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        let buffer = self.0.take();
        // A thread that ends keeps nothing.
        let _ = FREE.try_with(|free| {
            let mut free = free.borrow_mut();
            if free.len() < KEPT {
                free.extend(buffer);
            }
        });
    }
}

impl Deref for Buffer {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        self.0.as_deref().expect("taken only by drop")
    }
}

impl DerefMut for Buffer {
    fn deref_mut(&mut self) -> &mut [u8] {
        self.0.as_deref_mut().expect("taken only by drop")
    }
}
