//! Whether its destination takes a request, by the very functions that the agents run, and told. How many requests came
//! before is known to the agent alone.

use mesh_core::{
    intake::too_large,
    model::intake::PortIntake,
    refusal::{Reason, Step},
};

use super::{traffic, why::Story};

impl Story<'_> {
    /// Tells what is limited at a port; the reason why the request that is asked about is too large, if it is.
    pub(super) fn taken(&mut self, intake: &PortIntake) -> Option<Reason> {
        // A token that is taken away before the application sees it counts, too.
        let request = self.request.cloned();
        for says in traffic::taken(intake) {
            self.step(Step::Authorize, format!("it takes, as a TrafficPolicy says: {says}"));
        }
        let request = request?;
        let reading = request.reading();
        for rate in intake.rates.iter().filter(|it| reading.could_be(&it.only)) {
            let says = format!(
                "{} spec.rateLimits[{}] counts it: beyond that it is answered with 429",
                rate.policy, rate.index
            );
            self.step(Step::Authorize, says);
        }
        let found = too_large(&intake.sizes, &request.asked())?;
        self.step(Step::Authorize, format!("it is too large: {}", found.detail));
        Some(found.reason)
    }
}
