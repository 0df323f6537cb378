//! The clients of a run: one process of many real Kafka clients (`tests/clients/franz-go`), told by
//! lines what comes next, that writes down everything it does and is told.

use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::Value;

use super::fleet::Fleet;
use super::history::{self, History};
use crate::process::Talking;
use crate::tools::franz_go;

/// Topics of a run, with their partitions.
pub const TOPICS: &[(&str, usize)] = &[("checker-a", 4), ("checker-b", 2)];

/// What the clients are asked to do.
#[derive(Debug, Clone)]
pub struct Load {
    pub seed: u64,
    /// Producers of each mode.
    pub producers: usize,
    /// Sends per second of each producer.
    pub rate: usize,
    /// Members of the group.
    pub members: usize,
    /// How long progress may take after everything was healed.
    pub bound: Duration,
    /// The whole run takes less.
    pub timeout: Duration,
}

pub struct Workload {
    process: Talking,
    history: PathBuf,
    bound: Duration,
    progress: String,
}

impl Workload {
    pub fn start(fleet: &Fleet, load: &Load) -> Self {
        let history = fleet.folder().join("history.jsonl");
        let topics: Vec<&str> = TOPICS.iter().map(|(topic, _)| *topic).collect();
        let counts: Vec<String> = TOPICS.iter().map(|(_, count)| count.to_string()).collect();
        let mut command = franz_go("checker", &fleet.bootstrap(), &[]);
        command
            .args([
                "-topic",
                &topics.join(","),
                "-partitions",
                &counts.join(","),
            ])
            .arg("-history")
            .arg(&history)
            .args(["-seed", &(load.seed >> 1).to_string()])
            .args(["-producers", &load.producers.to_string()])
            .args(["-rate", &load.rate.to_string()])
            .args(["-members", &load.members.to_string()])
            .args(["-bound", &format!("{}s", load.bound.as_secs())])
            .args(["-timeout", &format!("{}s", load.timeout.as_secs())]);
        let errors = fleet.folder().join("workload.log");
        Self {
            process: Talking::spawn("the workload", &mut command, &errors),
            history,
            bound: load.bound,
            progress: String::new(),
        }
    }

    /// Puts a line into the history.
    pub fn note(&mut self, what: &str) {
        self.process.say(&format!("note {what}\n"));
    }

    /// Tells the clients what comes next and waits until it is done, which takes a few bounds at most.
    /// Gives the time that it took.
    pub fn command(&mut self, command: &str) -> Duration {
        self.process.say(&format!("{command}\n"));
        let name = command.split(' ').next().unwrap_or_default();
        let prefix = format!("done {name} ");
        let deadline = self.bound * 5 + Duration::from_secs(30);
        let millis = self.process.wait_for_line(&prefix, deadline, |line| {
            line.strip_prefix(&prefix)?.parse().ok()
        });
        Duration::from_millis(millis)
    }

    /// What the clients have done so far, in words.
    pub fn progress(&mut self) -> String {
        let lines = self.process.lines_so_far();
        let last = lines
            .iter()
            .rev()
            .find_map(|line| line.strip_prefix("progress "));
        if let Some(counts) = last.and_then(|text| serde_json::from_str::<Value>(text).ok()) {
            let count = |name: &str| counts[name].as_u64().unwrap_or_default();
            self.progress = format!(
                "{} sent, {} acked, {} failed, {} unknown, {} read, {} commits",
                count("sent"),
                count("acked"),
                count("failed"),
                count("unknown"),
                count("polled"),
                count("commits")
            );
        }
        self.progress.clone()
    }

    /// Ends the clients, and reads what they wrote down.
    pub fn finish(mut self) -> anyhow::Result<History> {
        self.process.say("quit\n");
        self.process.finish(Duration::from_secs(30));
        read_history(&self.history)
    }
}

pub fn read_history(path: &Path) -> anyhow::Result<History> {
    let file = std::fs::File::open(path)?;
    history::read(std::io::BufReader::new(file))
}
