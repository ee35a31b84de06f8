//! The log and its filter, the one setting that changes while a program runs.

use std::sync::{Arc, Mutex, PoisonError};

use tracing_subscriber::{
    EnvFilter, Registry, layer::SubscriberExt, reload, reload::Handle, util::SubscriberInitExt,
};

/// The variable that wins over the setting, as in other programs.
const VARIABLE: &str = "RUST_LOG";
/// Longest filter that is taken, bytes.
pub const MAX_FILTER: usize = 1024;
/// What a filter's bare word may be.
const LEVELS: [&str; 6] = ["off", "error", "warn", "info", "debug", "trace"];

/// A text is not a filter.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "'{text}' is not a log filter: {reason}; write off, error, warn, info, debug or trace, or such as \
     info,mesh_agent::enrol=debug"
)]
pub struct FilterError {
    text: String,
    reason: String,
}

/// What the log says, now; cheap to clone.
#[derive(Debug, Clone)]
pub struct LogFilter {
    handle: Option<Handle<EnvFilter, Registry>>,
    text: Arc<Mutex<String>>,
}

/// Starts the log of this process, on standard error.
pub fn start(setting: &str) -> Result<LogFilter, FilterError> {
    let text =
        std::env::var(VARIABLE).ok().filter(|text| !text.is_empty()).unwrap_or_else(|| setting.to_owned());
    let (layer, handle) = reload::Layer::new(parse(&text)?);
    let lines = tracing_subscriber::fmt::layer().with_writer(std::io::stderr);
    tracing_subscriber::registry().with(layer).with(lines).init();
    Ok(LogFilter { handle: Some(handle), text: Arc::new(Mutex::new(text)) })
}

impl LogFilter {
    /// A filter of no log: for a program within another, which has the log.
    pub fn detached(text: &str) -> Self {
        Self { handle: None, text: Arc::new(Mutex::new(text.to_owned())) }
    }

    /// The filter in force.
    pub fn current(&self) -> String {
        self.text.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Puts another in force; what cannot be read changes nothing.
    pub fn set(&self, text: &str) -> Result<(), FilterError> {
        let filter = parse(text)?;
        let mut current = self.text.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(handle) = &self.handle {
            handle.reload(filter).map_err(|error| wrong(text, error.to_string()))?;
        }
        text.clone_into(&mut current);
        Ok(())
    }
}

fn wrong(text: &str, reason: impl Into<String>) -> FilterError {
    FilterError { text: text.chars().take(100).collect(), reason: reason.into() }
}

fn parse(text: &str) -> Result<EnvFilter, FilterError> {
    if text.len() > MAX_FILTER {
        return Err(wrong(text, format!("it is longer than {MAX_FILTER} bytes")));
    }
    for directive in text.split(',').map(str::trim) {
        // The library takes a mistyped level for a module that is to say everything.
        let bare = !directive.contains(['=', '[', ':']);
        if bare && !LEVELS.contains(&directive.to_ascii_lowercase().as_str()) {
            return Err(wrong(text, format!("'{directive}' is not a level")));
        }
    }
    EnvFilter::try_new(text).map_err(|error| wrong(text, error.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn filters_are_checked_before_they_are_in_force() {
        let filter = LogFilter::detached("info");
        for good in ["debug", "info,mesh_agent::enrol=debug", "off", "mesh_agent=trace"] {
            filter.set(good).unwrap();
            assert_eq!(filter.current(), good);
        }
        for bad in ["inof", "", "info,,", "mesh_agent=loud", &"x".repeat(2000)] {
            assert!(filter.set(bad).is_err(), "{bad}");
        }
        assert_eq!(filter.current(), "mesh_agent=trace");
    }
}
