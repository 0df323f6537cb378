//! A disk that hangs: the thread of a broker that writes and syncs its log is stopped, while all its
//! other threads go on. A debugger's means (ptrace) stop one thread where a signal would stop the
//! process; a parent may use them on its children without privileges.
//!
//! Invariant: whatever happens to this process, the thread goes on when the tracer is gone. What it is
//! not: an error or a torn write; those are injected where the storage is tested.

use std::path::Path;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread::JoinHandle;
use std::time::Duration;

/// The thread of a broker that writes and syncs the log.
pub const LOG_THREAD: &str = "wal";
/// How often a stopped thread is looked at: its process may be killed meanwhile.
const LOOK_INTERVAL: Duration = Duration::from_millis(10);

/// A thread that is stopped until this is dropped.
pub struct Stall {
    end: Sender<()>,
    tracer: Option<JoinHandle<()>>,
}

impl Stall {
    /// Stops the thread `name` of a process.
    pub fn begin(pid: u32, name: &str) -> Result<Self, String> {
        let thread = find_thread(pid, name)?;
        let (end, ended) = channel();
        let (begun_sender, begun) = channel();
        // A tracer is a thread: the same one has to begin and end.
        let tracer = std::thread::spawn(move || {
            let seized = seize(thread);
            let stopped = seized.is_ok();
            let _ = begun_sender.send(seized);
            if stopped {
                hold(thread, &ended);
            }
        });
        begun
            .recv()
            .unwrap_or_else(|_| Err("the tracer ended".to_owned()))?;
        Ok(Self {
            end,
            tracer: Some(tracer),
        })
    }
}

impl Drop for Stall {
    fn drop(&mut self) {
        let _ = self.end.send(());
        if let Some(tracer) = self.tracer.take() {
            let _ = tracer.join();
        }
    }
}

fn find_thread(pid: u32, name: &str) -> Result<libc::pid_t, String> {
    let threads = std::fs::read_dir(format!("/proc/{pid}/task")).map_err(|e| e.to_string())?;
    let is_it = |path: &Path| {
        std::fs::read_to_string(path.join("comm")).is_ok_and(|found| found.trim_end() == name)
    };
    threads
        .flatten()
        .filter(|thread| is_it(&thread.path()))
        .find_map(|thread| thread.file_name().to_str()?.parse().ok())
        .ok_or_else(|| format!("process {pid} has no thread {name}"))
}

fn ptrace(request: libc::c_uint, thread: libc::pid_t) -> Result<(), String> {
    let nothing = std::ptr::null_mut::<libc::c_void>();
    // SAFETY: none of the requests used here reads or writes memory of this process.
    let result = unsafe { libc::ptrace(request, thread, nothing, nothing) };
    if result == -1 {
        return Err(format!("ptrace: {}", std::io::Error::last_os_error()));
    }
    Ok(())
}

fn seize(thread: libc::pid_t) -> Result<(), String> {
    ptrace(libc::PTRACE_SEIZE, thread)?;
    ptrace(libc::PTRACE_INTERRUPT, thread)?;
    let mut status = 0;
    // SAFETY: `status` lives until the call returns.
    let waited = unsafe { libc::waitpid(thread, &raw mut status, libc::__WALL) };
    if waited != thread || !libc::WIFSTOPPED(status) {
        return Err(format!("the thread did not stop: {status:#x}"));
    }
    Ok(())
}

fn hold(thread: libc::pid_t, ended: &Receiver<()>) {
    while ended.recv_timeout(LOOK_INTERVAL) == Err(RecvTimeoutError::Timeout) {
        let mut status = 0;
        // SAFETY: `status` lives until the call returns.
        let waited =
            unsafe { libc::waitpid(thread, &raw mut status, libc::__WALL | libc::WNOHANG) };
        // A killed thread stays until its tracer has looked at it.
        if waited == thread && (libc::WIFEXITED(status) || libc::WIFSIGNALED(status)) {
            return;
        }
    }
    // Fails where the thread has just been killed.
    let _ = ptrace(libc::PTRACE_DETACH, thread);
}

#[cfg(test)]
mod tests {
    use std::process::{Command, Stdio};
    use std::time::Instant;

    use super::*;
    use crate::process::{OwnChild, ProcessId};
    use crate::wait::{holds, wait_for};

    fn state(pid: u32) -> String {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        stat.rsplit(") ").next().unwrap_or_default()[..1].to_owned()
    }

    #[test]
    fn a_stalled_thread_stands_still_and_goes_on() {
        let child = OwnChild::spawn(Command::new("sleep").arg("60").stdin(Stdio::null()));
        let pid = child.0.id();
        let running = |wanted: &str| {
            wait_for(&format!("state {wanted}"), Duration::from_secs(10), || {
                holds(state(pid) == wanted, state(pid))
            });
        };
        running("S");
        let stall = Stall::begin(pid, "sleep").unwrap();
        running("t");
        drop(stall);
        running("S");
        assert!(Stall::begin(pid, "no such thread").is_err());
    }

    #[test]
    fn a_process_can_be_killed_while_a_thread_of_it_is_stalled() {
        let child = OwnChild::spawn(Command::new("sleep").arg("60").stdin(Stdio::null()));
        let process = ProcessId::of(child.0.id()).unwrap();
        let began = Instant::now();
        wait_for("the thread to be named", Duration::from_secs(10), || {
            find_thread(process.pid, "sleep")
        });
        let stall = Stall::begin(process.pid, "sleep").unwrap();
        process.kill_9();
        drop(stall);
        assert!(began.elapsed() < Duration::from_secs(20));
    }
}
