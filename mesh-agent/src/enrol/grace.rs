//! Expedited grace periods while many workloads are enrolled at once.
//!
//! The kernel waits for a grace period of RCU at every attachment to TCX, with the routing lock held (`tcx_entry_sync`):
//! 12 ms each, five programs a workload, one after another, 15 s for 250 workloads. `/sys/kernel/rcu_expedited` makes
//! them well under a millisecond, at the price of interrupts to all processors for that time.

use std::fs;

const SWITCH: &str = "/sys/kernel/rcu_expedited";

/// Grace periods are expedited while this lives. Where the switch cannot be written, enrolment is slow, and works.
#[derive(Debug)]
pub(super) struct Expedited {
    before: Option<String>,
}

impl Expedited {
    pub(super) fn begin() -> Self {
        let before = fs::read_to_string(SWITCH).ok();
        if let Err(error) = fs::write(SWITCH, "1") {
            tracing::debug!(%error, "cannot expedite grace periods; enrolling many workloads takes longer");
            return Self { before: None };
        }
        Self { before }
    }
}

impl Drop for Expedited {
    fn drop(&mut self) {
        if let Some(before) = &self.before
            && let Err(error) = fs::write(SWITCH, before.trim())
        {
            tracing::warn!(%error, "cannot put {SWITCH} back to {}", before.trim());
        }
    }
}
