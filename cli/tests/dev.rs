//! `chronik dev` as a process, with stand-ins for the services: it reports, stops in order, lets
//! no child outlive it, and refuses what it must. The real services run in `tests/`.

// The lint knows `#[cfg(test)]` modules as tests, but not the helpers of a test crate.
#![allow(clippy::unwrap_used)]

use std::io::{BufRead as _, BufReader, Read as _};
use std::os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, ExitStatus, Stdio};
use std::time::Duration;

use serde_json::Value;

const PATIENCE: Duration = Duration::from_secs(60);

/// A folder with `chronik` and stand-ins beside it.
struct Installation {
    folder: tempfile::TempDir,
}

impl Installation {
    fn new() -> Self {
        // Links: a program that was just written is busy as long as a child that another test has forked
        // meanwhile has its file open. The launcher finds the services beside itself, so its own is hard.
        let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        let launcher = folder.path().join("chronik");
        std::fs::hard_link(env!("CARGO_BIN_EXE_chronik"), launcher).unwrap();
        let fake = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fake_service.py");
        for service in ["controller", "broker", "gateway"] {
            let binary = folder.path().join(format!("chronik-{service}"));
            std::os::unix::fs::symlink(fake, binary).unwrap();
        }
        Self { folder }
    }

    fn data_dir(&self) -> PathBuf {
        self.folder.path().join("data")
    }

    fn command(&self) -> Command {
        let mut command = Command::new(self.folder.path().join("chronik"));
        command
            .args([
                "dev",
                "--json",
                "--kafka-port",
                "0",
                "--rest-port",
                "0",
                "--data-dir",
            ])
            .arg(self.data_dir())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        command
    }

    fn start(&self, configure: impl FnOnce(&mut Command)) -> Launcher {
        let mut command = self.command();
        configure(&mut command);
        let mut child = command.spawn().unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap());
        let mut launcher = Launcher {
            child,
            lines,
            ready: Value::Null,
        };
        launcher.ready = launcher.next_event();
        assert_eq!(launcher.ready["event"], "ready");
        launcher
    }
}

struct Launcher {
    child: Child,
    lines: BufReader<ChildStdout>,
    ready: Value,
}

impl Launcher {
    fn next_event(&mut self) -> Value {
        let mut line = String::new();
        self.lines.read_line(&mut line).unwrap();
        serde_json::from_str(&line).unwrap_or_else(|error| {
            let mut rest = String::new();
            let _ = self.child.kill();
            self.child
                .stderr
                .take()
                .unwrap()
                .read_to_string(&mut rest)
                .unwrap();
            panic!("'{line}' is not an event: {error}; standard error: {rest}")
        })
    }

    fn pids(&self) -> Vec<i32> {
        let processes = self.ready["processes"].as_array().unwrap();
        processes
            .iter()
            .map(|p| i32::try_from(p["pid"].as_i64().unwrap()).unwrap())
            .collect()
    }

    fn pid_of(&self, name: &str) -> i32 {
        let processes = self.ready["processes"].as_array().unwrap();
        let process = processes
            .iter()
            .find(|process| process["name"] == name)
            .unwrap();
        i32::try_from(process["pid"].as_i64().unwrap()).unwrap()
    }

    fn signal(&self, signal: i32) {
        send(i32::try_from(self.child.id()).unwrap(), signal);
    }

    fn wait(&mut self) -> ExitStatus {
        wait_until_gone(i32::try_from(self.child.id()).unwrap());
        self.child.wait().unwrap()
    }
}

impl Drop for Launcher {
    fn drop(&mut self) {
        // Its children follow it.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn send(pid: i32, signal: i32) {
    // SAFETY: `kill` touches no memory.
    assert_eq!(
        unsafe { libc::kill(pid, signal) },
        0,
        "signal {signal} to {pid}"
    );
}

/// Whether the process ends within the time. Asks the kernel, which tells it at once; one that has
/// ended and was not looked at by its parent yet (a zombie) has ended.
fn ends_within(pid: i32, patience: Duration) -> bool {
    // SAFETY: `pidfd_open` takes two numbers and touches no memory.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
    if fd < 0 {
        return true;
    }
    // SAFETY: the call above has just opened it, and nobody else knows it.
    let fd = unsafe { OwnedFd::from_raw_fd(i32::try_from(fd).unwrap()) };
    let mut poll = libc::pollfd {
        fd: fd.as_raw_fd(),
        events: libc::POLLIN,
        revents: 0,
    };
    // SAFETY: `poll` is one element, as told, and outlives the call.
    unsafe { libc::poll(&mut poll, 1, i32::try_from(patience.as_millis()).unwrap()) > 0 }
}

fn runs(pid: i32) -> bool {
    !ends_within(pid, Duration::ZERO)
}

fn wait_until_gone(pid: i32) {
    assert!(
        ends_within(pid, PATIENCE),
        "process {pid} still runs after {PATIENCE:?}"
    );
}

fn assert_all_gone(pids: &[i32]) {
    pids.iter().for_each(|&pid| wait_until_gone(pid));
}

fn stopped(data_dir: &Path) -> Vec<String> {
    let journal = std::fs::read_to_string(data_dir.join("stopped.txt")).unwrap();
    journal.lines().map(str::to_owned).collect()
}

#[test]
fn sigterm_stops_gateways_then_brokers_then_controllers() {
    let installation = Installation::new();
    let mut launcher = installation.start(|command| {
        command.args(["--gateways", "2"]);
    });
    assert_eq!(launcher.ready["kafka"].as_array().unwrap().len(), 6);
    assert_eq!(launcher.ready["rest"].as_array().unwrap().len(), 3);
    let pids = launcher.pids();
    assert_eq!(pids.len(), 8);
    launcher.signal(libc::SIGTERM);
    assert_eq!(launcher.next_event()["event"], "stopped");
    assert_eq!(launcher.wait().code(), Some(0));
    assert_all_gone(&pids);
    let roles: Vec<String> = stopped(&installation.data_dir())
        .iter()
        .map(|name| name.split('-').next().unwrap().to_owned())
        .collect();
    let expected: Vec<&str> = [
        ["gateway"; 2].as_slice(),
        &["broker"; 3],
        &["controller"; 3],
    ]
    .concat();
    assert_eq!(roles, expected);
}

#[test]
fn a_restart_uses_the_same_addresses() {
    let installation = Installation::new();
    let mut first = installation.start(|_| {});
    first.signal(libc::SIGINT);
    assert_eq!(first.wait().code(), Some(0));
    let second = installation.start(|_| {});
    for addresses in ["kafka", "rest"] {
        assert_eq!(first.ready[addresses], second.ready[addresses]);
    }
}

#[test]
fn no_child_outlives_a_launcher_that_is_killed() {
    let installation = Installation::new();
    let mut launcher = installation.start(|_| {});
    let pids = launcher.pids();
    launcher.signal(libc::SIGKILL);
    launcher.wait();
    assert_all_gone(&pids);
    // Nothing is left that would be in the way of the next start.
    installation.start(|_| {});
}

#[test]
fn a_child_that_dies_is_reported_and_the_rest_goes_on() {
    let installation = Installation::new();
    let mut launcher = installation.start(|_| {});
    send(launcher.pid_of("broker-2"), libc::SIGKILL);
    let event = launcher.next_event();
    assert_eq!(
        (&event["event"], &event["name"]),
        (&"exited".into(), &"broker-2".into())
    );
    assert!(
        event["how"].as_str().unwrap().contains("SIGKILL"),
        "{event}"
    );
    assert!(runs(launcher.pid_of("broker-1")));
    launcher.signal(libc::SIGTERM);
    assert_eq!(launcher.next_event()["event"], "stopped");
    assert_eq!(launcher.wait().code(), Some(0));
}

#[test]
fn a_service_that_fails_at_start_is_named_and_the_others_are_stopped() {
    let installation = Installation::new();
    let output = installation
        .command()
        .env("FAKE_FAIL", "broker-3")
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(1));
    let told = String::from_utf8(output.stderr).unwrap();
    for part in [
        "broker-3",
        "exit code 7",
        "the disk is on fire",
        "broker-3.log",
    ] {
        assert!(told.contains(part), "'{part}' is not in: {told}");
    }
    assert!(!String::from_utf8(output.stdout).unwrap().contains("ready"));
}

#[test]
fn a_second_start_on_the_same_folder_is_refused() {
    let installation = Installation::new();
    let launcher = installation.start(|_| {});
    let output = installation.command().output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    let told = String::from_utf8(output.stderr).unwrap();
    assert!(told.contains("already runs"), "{told}");
    assert!(told.contains(&launcher.child.id().to_string()), "{told}");
}

#[test]
fn a_second_signal_kills_at_once() {
    let installation = Installation::new();
    let mut launcher = installation.start(|command| {
        command.env("FAKE_DEAF", "broker-1");
    });
    let pids = launcher.pids();
    launcher.signal(libc::SIGINT);
    // The gateway has stopped: the launcher is at the brokers, one of which does not listen.
    wait_until_gone(launcher.pid_of("gateway-1"));
    assert!(runs(launcher.pid_of("broker-1")));
    launcher.signal(libc::SIGINT);
    assert_eq!(launcher.wait().code(), Some(1));
    assert_all_gone(&pids);
}

#[test]
fn a_taken_kafka_port_is_named_before_anything_starts() {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port().to_string();
    let installation = Installation::new();
    let output = installation
        .command()
        .args(["--brokers", "1", "--kafka-port", &port])
        .output()
        .unwrap();
    // Given twice: clap takes that for a mistake.
    assert_eq!(output.status.code(), Some(64));

    let mut command = Command::new(installation.folder.path().join("chronik"));
    command.args([
        "dev",
        "--brokers",
        "1",
        "--rest-port",
        "0",
        "--kafka-port",
        &port,
    ]);
    let output = command
        .arg("--data-dir")
        .arg(installation.data_dir())
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(1));
    let told = String::from_utf8(output.stderr).unwrap();
    assert!(
        told.contains(&port) && told.contains("--kafka-port"),
        "{told}"
    );
    assert!(!installation.data_dir().join("cluster.toml").exists());
}
