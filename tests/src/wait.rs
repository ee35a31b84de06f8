//! Waiting for conditions, never for time: the one place of this crate that sleeps, between two looks.
//!
//! Deadlines are those of a real machine. An emulated one is many times slower and says so in `NODEMESH_TIME_SCALE`, a
//! whole number that every deadline is multiplied by.

use std::{
    sync::OnceLock,
    thread,
    time::{Duration, Instant},
};

/// Pause between two looks at a condition.
const PAUSE: Duration = Duration::from_millis(10);

/// A deadline, or a limit that a test asserts on, as long as this machine is slow.
pub fn scaled(deadline: Duration) -> Duration {
    static SCALE: OnceLock<u32> = OnceLock::new();
    let scale = SCALE.get_or_init(|| match std::env::var("NODEMESH_TIME_SCALE") {
        Ok(text) => text.parse().expect("NODEMESH_TIME_SCALE is a whole number"),
        Err(_) => 1,
    });
    deadline * *scale
}

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
    let deadline = scaled(deadline);
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
