//! The services as child processes: started, watched, signalled, and stopped in order.
//!
//! Invariants: a signal is only ever sent to a child that has not been waited for, so its pid is
//! still its own. No child outlives the launcher: on Linux the kernel kills it when the launcher
//! ends, however it ends. A child is in a process group of its own, so that Ctrl-C in the terminal
//! reaches the launcher alone, which then stops the services in order.

use std::fs::{File, OpenOptions};
use std::io;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use anyhow::Context as _;
use tokio::process::{Child, Command};
use tokio::sync::mpsc;
use tokio::time::Instant;

/// Which service a process is. In the order in which they are stopped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    Gateway,
    Broker,
    Controller,
}

impl Role {
    pub fn name(self) -> &'static str {
        match self {
            Self::Gateway => "gateway",
            Self::Broker => "broker",
            Self::Controller => "controller",
        }
    }

    /// How long a service may take to stop before it is killed. A broker hands its partitions
    /// over first.
    fn stop_deadline(self) -> Duration {
        match self {
            Self::Gateway => Duration::from_secs(10),
            Self::Broker => Duration::from_secs(15),
            Self::Controller => Duration::from_secs(5),
        }
    }
}

/// What to start.
#[derive(Debug, Clone)]
pub struct ProcessSpec {
    /// Unique in the cluster, such as `broker-2`; also the name of its files.
    pub name: String,
    pub role: Role,
    pub binary: PathBuf,
    pub config: PathBuf,
    pub log: PathBuf,
}

struct Process {
    spec: ProcessSpec,
    pid: u32,
    signals: mpsc::UnboundedSender<i32>,
    exited: Option<ExitStatus>,
}

/// All processes of the cluster.
pub struct Processes {
    processes: Vec<Process>,
    exits: mpsc::UnboundedReceiver<(usize, ExitStatus)>,
    exits_sender: mpsc::UnboundedSender<(usize, ExitStatus)>,
}

impl Processes {
    pub fn new() -> Self {
        // Unbounded, but never more than one message per process.
        let (exits_sender, exits) = mpsc::unbounded_channel();
        Self {
            processes: Vec::new(),
            exits,
            exits_sender,
        }
    }

    pub fn start(&mut self, spec: ProcessSpec) -> anyhow::Result<()> {
        let mut child = spawn(&spec)
            .with_context(|| format!("cannot start {} ({})", spec.name, spec.binary.display()))?;
        let pid = child
            .id()
            .context("a child that was not waited for has a pid")?;
        // Unbounded, but a process gets two signals at most: stop and kill.
        let (signals, mut to_send) = mpsc::unbounded_channel();
        let index = self.processes.len();
        let exits = self.exits_sender.clone();
        tokio::spawn(async move {
            let status = loop {
                tokio::select! {
                    status = child.wait() => break status,
                    Some(signal) = to_send.recv() => send_signal(&child, signal),
                }
            };
            // An error here would mean that somebody else waited for our child.
            if let Ok(status) = status {
                let _ = exits.send((index, status));
            }
        });
        self.processes.push(Process {
            spec,
            pid,
            signals,
            exited: None,
        });
        Ok(())
    }

    /// What was started, with its pid.
    pub fn started(&self) -> impl Iterator<Item = (&ProcessSpec, u32)> {
        self.processes
            .iter()
            .map(|process| (&process.spec, process.pid))
    }

    pub fn any_running(&self) -> bool {
        self.processes
            .iter()
            .any(|process| process.exited.is_none())
    }

    /// Waits until a process ends. Safe to drop and call again.
    pub async fn next_exit(&mut self) -> (ProcessSpec, ExitStatus) {
        match self.exits.recv().await {
            Some((index, status)) => {
                self.processes[index].exited = Some(status);
                (self.processes[index].spec.clone(), status)
            }
            // Cannot be: `self` holds a sender.
            None => std::future::pending().await,
        }
    }

    /// Stops all processes of one role at once, and kills those that outlast the deadline.
    /// Returns the names of those that had to be killed.
    pub async fn stop_role(&mut self, role: Role) -> Vec<String> {
        self.signal(libc::SIGTERM, |spec| spec.role == role);
        let deadline = Instant::now() + role.stop_deadline();
        let running = |this: &Self| {
            let with_role = this.processes.iter().filter(|p| p.spec.role == role);
            with_role
                .filter(|p| p.exited.is_none())
                .map(|p| p.spec.name.clone())
                .collect()
        };
        let mut killed: Vec<String> = Vec::new();
        loop {
            let left: Vec<String> = running(self);
            if left.is_empty() {
                return killed;
            }
            let wait = async {
                if killed.is_empty() {
                    tokio::time::sleep_until(deadline).await;
                } else {
                    // SIGKILL cannot be refused.
                    std::future::pending::<()>().await;
                }
            };
            tokio::select! {
                _ = self.next_exit() => {}
                () = wait => {
                    self.signal(libc::SIGKILL, |spec| spec.role == role);
                    killed = left;
                }
            }
        }
    }

    /// Kills everything that still runs, and waits for its end.
    pub async fn kill_all(&mut self) {
        self.signal(libc::SIGKILL, |_| true);
        while self.any_running() {
            self.next_exit().await;
        }
    }

    fn signal(&self, signal: i32, which: impl Fn(&ProcessSpec) -> bool) {
        for process in self.processes.iter().filter(|process| which(&process.spec)) {
            // Fails where the process has ended already.
            let _ = process.signals.send(signal);
        }
    }
}

/// How a process ended, in words.
pub fn describe_exit(status: ExitStatus) -> String {
    use std::os::unix::process::ExitStatusExt as _;
    match (status.code(), status.signal()) {
        (Some(code), _) => format!("exit code {code}"),
        (None, Some(libc::SIGKILL)) => "killed by signal 9 (SIGKILL)".to_owned(),
        (None, Some(signal)) => format!("killed by signal {signal}"),
        (None, None) => "ended in an unknown way".to_owned(),
    }
}

/// The last lines of a log file; empty where there are none.
pub fn last_lines(path: &Path, count: usize) -> Vec<String> {
    const TAIL_BYTES_MAX: u64 = 16 * 1024;
    let tail = || -> io::Result<Vec<u8>> {
        use std::io::{Read as _, Seek as _, SeekFrom};
        let mut file = File::open(path)?;
        let length = file.metadata()?.len();
        file.seek(SeekFrom::Start(length.saturating_sub(TAIL_BYTES_MAX)))?;
        let mut bytes = Vec::new();
        file.take(TAIL_BYTES_MAX).read_to_end(&mut bytes)?;
        Ok(bytes)
    };
    let bytes = tail().unwrap_or_default();
    let text = String::from_utf8_lossy(&bytes);
    let lines: Vec<String> = text.lines().map(str::to_owned).collect();
    lines[lines.len().saturating_sub(count)..].to_vec()
}

fn send_signal(child: &Child, signal: i32) {
    // None once it was waited for: then the pid may be another process's.
    if let Some(pid) = child.id().and_then(|pid| libc::pid_t::try_from(pid).ok()) {
        // SAFETY: `kill` touches no memory.
        unsafe { libc::kill(pid, signal) };
    }
}

fn spawn(spec: &ProcessSpec) -> anyhow::Result<Child> {
    let log = open_log(&spec.log)
        .with_context(|| format!("cannot open its log file {}", spec.log.display()))?;
    let mut command = Command::new(&spec.binary);
    command
        .arg("--config")
        .arg(&spec.config)
        .stdin(Stdio::null())
        .stdout(log.try_clone()?)
        .stderr(log)
        .process_group(0)
        .kill_on_drop(true);
    for (name, _) in std::env::vars_os() {
        if name.to_str().is_some_and(overrides_place) {
            command.env_remove(name);
        }
    }
    die_with_launcher(&mut command);
    Ok(command.spawn()?)
}

/// Whether a variable of the launcher's environment would give all processes of a role the same
/// identity, folder or address. Other settings, such as log filters, are passed on.
fn overrides_place(name: &str) -> bool {
    const PLACE: &[&str] = &[
        "ID",
        "DIR",
        "FILE",
        "LISTEN",
        "LISTENERS",
        "ADVERTISED",
        "CONTROLLERS",
        "RACK",
    ];
    let ours = ["CHRONIK_CONTROLLER_", "CHRONIK_BROKER_", "CHRONIK_GATEWAY_"];
    ours.iter().any(|prefix| name.starts_with(prefix))
        && name
            .rsplit('_')
            .next()
            .is_some_and(|last| PLACE.contains(&last))
}

/// The log of the run before is kept as `<name>.log.1`.
fn open_log(path: &Path) -> io::Result<File> {
    if path.metadata().is_ok_and(|metadata| metadata.len() > 0) {
        let mut kept = path.as_os_str().to_owned();
        kept.push(".1");
        std::fs::rename(path, kept)?;
    }
    OpenOptions::new().create(true).append(true).open(path)
}

#[cfg(target_os = "linux")]
fn die_with_launcher(command: &mut Command) {
    let launcher = std::process::id();
    // SAFETY: between fork and exec only async-signal-safe calls are allowed; `prctl` and
    // `getppid` are, and nothing is allocated.
    unsafe {
        command.pre_exec(move || {
            // The kernel acts when the *thread* that forked ends. That is the main thread: the
            // runtime is a current-thread one.
            if libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) != 0 {
                return Err(io::Error::last_os_error());
            }
            // The launcher may have died before prctl: then the parent is another one already,
            // and the signal would never come.
            if u32::try_from(libc::getppid()).ok() != Some(launcher) {
                return Err(io::Error::from_raw_os_error(libc::ESRCH));
            }
            Ok(())
        });
    }
}

#[cfg(not(target_os = "linux"))]
fn die_with_launcher(_command: &mut Command) {}

#[cfg(test)]
#[path = "process_test.rs"]
mod tests;
