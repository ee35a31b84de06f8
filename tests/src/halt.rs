//! A program whose first thread stands still while its others run on: what a test needs to see that they do.

use std::{fs, time::Duration};

use anyhow::{Context, Result};
use nix::{
    sys::{
        ptrace::{self, Options},
        wait::{WaitPidFlag, waitpid},
    },
    unistd::Pid,
};

use crate::wait;

/// How long it may take until the thread waits for something to do.
const SOON: Duration = Duration::from_secs(10);

/// The first thread of a program, which stands still until this is dropped, by the thread that halted it.
#[derive(Debug)]
pub struct Halted {
    thread: Pid,
}

impl Halted {
    /// Halts it, as a debugger would, where it waits for something to do: anywhere else it could have taken what others
    /// need, such as memory.
    pub fn first_thread(pid: u32) -> Result<Self> {
        // A thread's number is that of its process if it is the first.
        let thread = Pid::from_raw(i32::try_from(pid).context("a process id fits in i32")?);
        ptrace::seize(thread, Options::empty()).context("becoming the debugger of a thread")?;
        let halted = Self { thread };
        wait::try_until(SOON, || {
            ptrace::interrupt(thread).map_err(|e| format!("halting it: {e}"))?;
            waitpid(thread, Some(WaitPidFlag::__WALL)).map_err(|e| format!("waiting for it: {e}"))?;
            let call = fs::read_to_string(format!("/proc/{pid}/syscall")).map_err(|e| e.to_string())?;
            if waits(&call) {
                return Ok(());
            }
            ptrace::cont(thread, None).map_err(|e| format!("letting it go on: {e}"))?;
            Err(format!("it never waited; last seen: {call}"))
        })
        .map_err(anyhow::Error::msg)?;
        Ok(halted)
    }
}

impl Drop for Halted {
    fn drop(&mut self) {
        // It fails only for a thread that has ended already.
        let _ = ptrace::detach(self.thread, None);
    }
}

/// Whether this is the system call of a runtime that has nothing to do (proc_pid_syscall(5): its number comes first).
fn waits(call: &str) -> bool {
    let number = call.split(' ').next().and_then(|number| number.parse().ok());
    #[cfg(target_arch = "x86_64")]
    if number == Some(libc::SYS_epoll_wait) {
        return true;
    }
    number == Some(libc::SYS_epoll_pwait)
}
