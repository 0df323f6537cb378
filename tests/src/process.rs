//! Processes of tests. Each is ended by its own pid, and only if that pid is still the same process.

use std::fs::File;
use std::io::{BufRead as _, BufReader, Write as _};
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use crate::wait::{holds, wait_for};

const EXIT_DEADLINE: Duration = Duration::from_secs(60);

/// Makes the kernel end the process when the thread of the test that starts it is gone, so that a
/// test runner that is killed leaves nothing behind.
pub fn dies_with_us(command: &mut Command) -> &mut Command {
    // SAFETY: prctl is safe to call between fork and exec.
    unsafe {
        command.pre_exec(|| {
            libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
            Ok(())
        })
    }
}

/// A process by pid and start time: a pid alone may be another process by now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ProcessId {
    pub pid: u32,
    started: String,
}

impl ProcessId {
    /// `None` if there is no such process, or it has ended and waits to be reaped.
    pub fn of(pid: u32) -> Option<Self> {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        let mut fields = stat[stat.rfind(')')? + 2..].split(' ');
        // The first thread may be a zombie while others still hold ports and files.
        if fields.next()? == "Z" && thread_count(pid) <= 1 {
            return None;
        }
        Some(Self {
            pid,
            started: fields.nth(18)?.to_owned(),
        })
    }

    pub fn is_alive(&self) -> bool {
        Self::of(self.pid).as_ref() == Some(self)
    }

    pub fn signal(&self, signal: i32) {
        if self.is_alive() {
            let pid = libc::pid_t::try_from(self.pid).expect("pids are small");
            // SAFETY: kill has no preconditions. The pid was checked to be this process.
            unsafe { libc::kill(pid, signal) };
        }
    }

    /// kill -9, and waits until it is gone.
    pub fn kill_9(&self) {
        self.signal(libc::SIGKILL);
        wait_for(
            &format!("process {} to be gone", self.pid),
            EXIT_DEADLINE,
            || holds(!self.is_alive(), "still there"),
        );
    }
}

fn thread_count(pid: u32) -> usize {
    std::fs::read_dir(format!("/proc/{pid}/task")).map_or(0, Iterator::count)
}

/// A child of the test: killed and reaped when dropped.
#[derive(Debug)]
pub struct OwnChild(pub Child);

impl OwnChild {
    pub fn spawn(command: &mut Command) -> Self {
        let child = dies_with_us(command)
            .spawn()
            .unwrap_or_else(|error| panic!("cannot start {command:?}: {error}"));
        Self(child)
    }

    pub fn terminate(&self) {
        if let Some(process) = ProcessId::of(self.0.id()) {
            process.signal(libc::SIGTERM);
        }
    }

    pub fn wait(&mut self, what: &str, deadline: Duration) -> ExitStatus {
        wait_for(&format!("{what} to end"), deadline, || {
            match self.0.try_wait() {
                Ok(Some(status)) => Ok(status),
                Ok(None) => Err("still running".to_owned()),
                Err(error) => Err(error.to_string()),
            }
        })
    }
}

impl Drop for OwnChild {
    fn drop(&mut self) {
        if matches!(self.0.try_wait(), Ok(None)) {
            let _ = self.0.kill();
            let _ = self.0.wait();
        }
    }
}

/// A process whose output is read line by line while it runs.
pub struct Talking {
    name: String,
    child: OwnChild,
    stdin: Option<ChildStdin>,
    lines: Receiver<String>,
    stderr: std::path::PathBuf,
}

impl Talking {
    /// Standard error goes to the file `stderr`.
    pub fn spawn(name: &str, command: &mut Command, stderr: &Path) -> Self {
        let errors = File::options()
            .create(true)
            .append(true)
            .open(stderr)
            .unwrap_or_else(|error| panic!("cannot write {}: {error}", stderr.display()));
        command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(errors);
        let mut child = OwnChild::spawn(command);
        let stdout = child.0.stdout.take().expect("stdout is piped");
        let (sender, lines) = channel();
        std::thread::spawn(move || {
            let mut pipe = BufReader::new(stdout);
            let mut line = Vec::new();
            while pipe
                .read_until(b'\n', &mut line)
                .is_ok_and(|count| count > 0)
            {
                let text = String::from_utf8_lossy(&line).trim_end().to_owned();
                line.clear();
                if sender.send(text).is_err() {
                    return;
                }
            }
        });
        let stdin = child.0.stdin.take();
        Self {
            name: name.to_owned(),
            child,
            stdin,
            lines,
            stderr: stderr.to_owned(),
        }
    }

    pub fn pid(&self) -> u32 {
        self.child.0.id()
    }

    pub fn child(&self) -> &OwnChild {
        &self.child
    }

    /// The next line that `wanted` takes. Others are passed by.
    pub fn wait_for_line<T>(
        &self,
        what: &str,
        deadline: Duration,
        mut wanted: impl FnMut(&str) -> Option<T>,
    ) -> T {
        let end = Instant::now() + deadline;
        let mut last = String::new();
        loop {
            let left = end.saturating_duration_since(Instant::now());
            match self.lines.recv_timeout(left) {
                Ok(line) => {
                    if let Some(value) = wanted(&line) {
                        return value;
                    }
                    last = line;
                }
                Err(RecvTimeoutError::Timeout) => panic!(
                    "{}: no line with {what} after {deadline:?}, the last was {last:?}; {}",
                    self.name,
                    self.errors()
                ),
                Err(RecvTimeoutError::Disconnected) => panic!(
                    "{} ended without a line with {what}, the last was {last:?}; {}",
                    self.name,
                    self.errors()
                ),
            }
        }
    }

    /// Lines that are there already.
    pub fn lines_so_far(&self) -> Vec<String> {
        self.lines.try_iter().collect()
    }

    pub fn say(&mut self, text: &str) {
        let stdin = self.stdin.as_mut().expect("standard input is still open");
        stdin
            .write_all(text.as_bytes())
            .expect("the process reads its standard input");
    }

    /// Closes its standard input, and waits until it ends well. Gives the lines not yet read.
    pub fn finish(mut self, deadline: Duration) -> Vec<String> {
        drop(self.stdin.take());
        let status = self.child.wait(&self.name, deadline);
        assert!(
            status.success(),
            "{} ended with {status}; {}",
            self.name,
            self.errors()
        );
        let mut lines = Vec::new();
        // The reader thread ends with the pipe.
        while let Ok(line) = self.lines.recv_timeout(EXIT_DEADLINE) {
            lines.push(line);
        }
        lines
    }

    fn errors(&self) -> String {
        let text = std::fs::read_to_string(&self.stderr).unwrap_or_default();
        let lines: Vec<&str> = text.lines().collect();
        let tail = lines[lines.len().saturating_sub(15)..].join("\n  ");
        format!("the end of {}:\n  {tail}", self.stderr.display())
    }
}
