//! Waiting for conditions, never for time: the one place of this crate that sleeps, between two looks.

use std::{
    thread,
    time::{Duration, Instant},
};

/// Pause between two looks at a condition.
const PAUSE: Duration = Duration::from_millis(10);

/// Looks until `look` gives something, and returns it; panics with `what` and the last complaint at the deadline.
///
/// A look says `Err(why not yet)`, so that a failing test tells what it last saw.
#[track_caller]
pub fn until<T>(what: &str, deadline: Duration, look: impl FnMut() -> Result<T, String>) -> T {
    match try_until(deadline, look) {
        Ok(value) => value,
        Err(complaint) => panic!("{what}: not within {deadline:?}; last seen: {complaint}"),
    }
}

/// Like [`until`], but hands the last complaint back.
pub fn try_until<T>(deadline: Duration, mut look: impl FnMut() -> Result<T, String>) -> Result<T, String> {
    let started = Instant::now();
    loop {
        match look() {
            Ok(value) => return Ok(value),
            Err(complaint) if started.elapsed() >= deadline => return Err(complaint),
            Err(_) => thread::sleep(PAUSE),
        }
    }
}

/// A condition without a value, for [`until`].
pub fn holds(condition: bool, complaint: impl FnOnce() -> String) -> Result<(), String> {
    if condition { Ok(()) } else { Err(complaint()) }
}
