//! How a connection ends other than well: refused on purpose, or broken.
//!
//! Every `?` in the story of a connection yields a [`Stop`], and that value is the metric's label and the access
//! log's fields.

use std::borrow::Cow;

use mesh_core::{policy::RuleRef, refusal::Reason};

/// A connection that was ended on purpose.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{reason}: {detail}")]
pub struct Refusal {
    /// Why, out of the one list; it names the step.
    pub reason: Reason,
    /// What a person needs besides: the address, the rule, the error of the kernel. May be empty.
    pub detail: Cow<'static, str>,
    /// The rule that said no, where one did.
    pub rule: Option<RuleRef>,
}

impl Refusal {
    /// A refusal with what is special about this one.
    pub fn new(reason: Reason, detail: impl Into<Cow<'static, str>>) -> Self {
        Self { reason, detail: detail.into(), rule: None }
    }
}

impl From<Reason> for Refusal {
    fn from(reason: Reason) -> Self {
        Self::new(reason, "")
    }
}

/// A connection that broke while bytes were carried.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Failure {
    /// The source's application reset it, or its tunnel said so.
    #[error("the source reset the connection")]
    SourceReset,
    /// The destination's application reset it, or its tunnel said so.
    #[error("the destination reset the connection")]
    DestinationReset,
    /// The tunnel broke.
    #[error("the tunnel was lost: {0}")]
    TunnelLost(String),
    /// The task was dropped before its end: a panic, or the runtime's shutdown.
    #[error("the connection's task was dropped")]
    Dropped,
}

impl Failure {
    /// The bounded label of metrics and logs.
    pub fn label(&self) -> &'static str {
        match self {
            Self::SourceReset => "source_reset",
            Self::DestinationReset => "destination_reset",
            Self::TunnelLost(_) => "tunnel_lost",
            Self::Dropped => "dropped",
        }
    }
}

/// Why a connection did not end well.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Stop {
    /// On purpose.
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// Broken.
    #[error(transparent)]
    Failed(#[from] Failure),
}

impl From<Reason> for Stop {
    fn from(reason: Reason) -> Self {
        Self::Refused(reason.into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_reference_of_refusals_is_generated() {
        let mut page = String::from(
            "# Reasons of refusals\n\nGenerated from the program by `cargo xtask generate`.\n\nThe label is the `reason` of \
             metrics and access log; the step is where in [a connection's life](../LIFE_OF_A_CONNECTION.md) it is said.\n\n\
             | label | step | what happened | what to do |\n|---|---|---|---|\n",
        );
        for reason in Reason::ALL {
            let (label, step) = (reason.label(), format!("{:?}", reason.step()).to_lowercase());
            page += &format!("| `{label}` | {step} | {} | {} |\n", reason.says(), reason.cure());
        }
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/reference/refusals.md");
        mesh_settings::reference::check(path.as_ref(), &page).unwrap();
    }
}
