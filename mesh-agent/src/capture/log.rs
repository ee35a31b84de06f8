//! Brings the kernel programs' log lines into the agent's log.

use aya::Ebpf;
use aya_log::EbpfLogger;
use log::{Log, Metadata, Record};
use mesh_ebpf::abi::KernelReason;
use tokio::io::{Interest, unix::AsyncFd};

/// Hands records of `aya-log` to `tracing`, with the reason's number as its word.
#[derive(Debug)]
struct ToTracing;

impl Log for ToTracing {
    fn enabled(&self, _: &Metadata<'_>) -> bool {
        true
    }

    fn log(&self, record: &Record<'_>) {
        let text = record.args().to_string();
        tracing::warn!(target: "mesh_agent::kernel", "{}", with_label(&text));
    }

    fn flush(&self) {}
}

/// `… reason 3 …` becomes `… reason spoofed_source …`.
fn with_label(text: &str) -> String {
    let mut words: Vec<&str> = text.split(' ').collect();
    if let Some(at) = words.iter().position(|word| *word == "reason") {
        let number = words.get(at + 1).and_then(|word| word.parse::<usize>().ok());
        if let Some(reason) = number.and_then(|number| KernelReason::ALL.get(number)) {
            words[at + 1] = reason.label();
        }
    }
    words.join(" ")
}

/// Reads the programs' log until the runtime ends. Must be called inside a runtime.
pub fn forward(bpf: &mut Ebpf) -> anyhow::Result<()> {
    let logger = EbpfLogger::init_with_logger(bpf, ToTracing)?;
    // SAFETY: the logger owns its descriptor and neither closes nor replaces it while it lives in the AsyncFd.
    let mut logger = unsafe { AsyncFd::register_with_interest(logger, Interest::READABLE) }?;
    tokio::spawn(async move {
        while let Ok(mut ready) = logger.readable_mut().await {
            ready.get_inner_mut().flush();
            ready.clear_ready();
        }
    });
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::with_label;

    #[test]
    fn numbers_become_words() {
        assert_eq!(
            with_label("kernel refused: reason 3 ifindex 7"),
            "kernel refused: reason spoofed_source ifindex 7"
        );
        assert_eq!(with_label("reason 99 x"), "reason 99 x");
    }
}
