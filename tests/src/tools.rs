//! Foreign clients and tools, as `scripts/install-test-tools.sh` left them in the cache folder.
//!
//! Invariant: a tool that is missing fails the test that needs it; no test is skipped.

use std::io::Write as _;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::thread::JoinHandle;
use std::time::Duration;

use crate::process::OwnChild;
use crate::project_root;

/// What a finished tool left.
#[derive(Debug)]
pub struct Finished {
    pub success: bool,
    pub stdout: String,
    pub stderr: String,
}

pub fn cache_dir() -> PathBuf {
    match std::env::var_os("CHRONIK_TEST_CACHE") {
        Some(folder) => PathBuf::from(folder),
        None => {
            let home = std::env::var_os("HOME").expect("HOME is set");
            PathBuf::from(home).join(".cache/chronik-tests")
        }
    }
}

/// A file of the cache folder.
pub fn cached(path: &str) -> PathBuf {
    let full = cache_dir().join(path);
    assert!(
        full.exists(),
        "{} is missing: run scripts/install-test-tools.sh",
        full.display()
    );
    full
}

pub fn client_source(path: &str) -> PathBuf {
    project_root().join("tests/clients").join(path)
}

pub fn kcat(arguments: &[&str]) -> Command {
    let mut command = Command::new("kcat");
    command.args(arguments);
    command
}

/// A main class of Apache Kafka's own tools.
pub fn kafka_tool(class: &str, arguments: &[&str]) -> Command {
    let mut command = Command::new("java");
    command
        // Short-lived processes: start-up counts, not peak speed.
        .args(["-Xmx256m", "-XX:TieredStopAtLevel=1", "-XX:+UseSerialGC"])
        .arg("-Dorg.slf4j.simpleLogger.defaultLogLevel=warn")
        .arg("-cp")
        .arg(format!("{}/*", cached("kafka/libs").display()))
        .arg(class)
        .args(arguments);
    command
}

pub fn kafka_topics(bootstrap: &str, arguments: &[&str]) -> Command {
    let mut command = kafka_tool(
        "org.apache.kafka.tools.TopicCommand",
        &["--bootstrap-server", bootstrap],
    );
    command.args(arguments);
    command
}

pub fn kafka_consumer_groups(bootstrap: &str, arguments: &[&str]) -> Command {
    let mut command = kafka_tool(
        "org.apache.kafka.tools.consumer.group.ConsumerGroupCommand",
        &["--bootstrap-server", bootstrap],
    );
    command.args(arguments);
    command
}

pub fn franz_go(command: &str, bootstrap: &str, arguments: &[&str]) -> Command {
    let mut full = Command::new(cached("bin/franz-go-client"));
    full.arg(command)
        .args(["-brokers", bootstrap])
        .args(arguments);
    full
}

pub fn python(script: &str, arguments: &[&str]) -> Command {
    let mut command = Command::new(cached("python/bin/python"));
    command
        .arg(client_source("python").join(script))
        .args(arguments);
    command
}

pub fn node(script: &str, arguments: &[&str]) -> Command {
    let mut command = Command::new("node");
    command
        .env("CHRONIK_KAFKAJS_DIR", cached("kafkajs"))
        .arg(client_source("kafkajs").join(script))
        .args(arguments);
    command
}

/// Runs a tool to its end, or kills it and panics at the deadline.
pub fn run(command: &mut Command, input: &str, deadline: Duration) -> Finished {
    let what = format!("{command:?}");
    command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let mut child = OwnChild::spawn(command);
    let mut stdin = child.0.stdin.take().expect("stdin is piped");
    let stdout = child.0.stdout.take().expect("stdout is piped");
    let stderr = child.0.stderr.take().expect("stderr is piped");
    let input = input.to_owned();
    // A tool may end without reading all its input.
    let writer = std::thread::spawn(move || drop(stdin.write_all(input.as_bytes())));
    let out = read_to_end(stdout);
    let err = read_to_end(stderr);
    let status = child.wait(&what, deadline);
    writer.join().expect("the writer does not panic");
    Finished {
        success: status.success(),
        stdout: out.join().expect("the reader does not panic"),
        stderr: err.join().expect("the reader does not panic"),
    }
}

fn read_to_end(mut pipe: impl std::io::Read + Send + 'static) -> JoinHandle<String> {
    std::thread::spawn(move || {
        let mut bytes = Vec::new();
        let _ = pipe.read_to_end(&mut bytes);
        String::from_utf8_lossy(&bytes).into_owned()
    })
}

/// Runs a tool that has to end well, and gives its standard output.
pub fn run_ok(command: &mut Command, input: &str, deadline: Duration) -> String {
    let finished = run(command, input, deadline);
    assert!(
        finished.success,
        "{command:?} failed\nstandard output: {}\nstandard error: {}",
        end_of(&finished.stdout),
        end_of(&finished.stderr)
    );
    finished.stdout
}

fn end_of(text: &str) -> String {
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(30)..].join("\n")
}
