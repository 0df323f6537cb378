//! The verified producer and reader (`tests/clients/franz-go`): what was acknowledged, and whether
//! all of it can be read, once, in order, unchanged.

use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::Value;

use crate::cluster::Cluster;
use crate::process::Talking;
use crate::tools::{franz_go, run};

const VERIFY_DEADLINE: Duration = Duration::from_secs(300);

/// A producer at work.
pub struct Production {
    process: Talking,
    topic: String,
    ledger: PathBuf,
}

/// What a producer was told.
#[derive(Debug)]
pub struct Produced {
    pub topic: String,
    pub ledger: PathBuf,
    pub sent: u64,
    pub acked: u64,
    /// Without an answer, or with an error: may be there once or not at all.
    pub unknown: u64,
    pub first_error: String,
    pub seconds: f64,
}

impl Production {
    /// `arguments` as of `franz-go-client produce`.
    pub fn start(cluster: &Cluster, topic: &str, arguments: &[&str]) -> Self {
        Self::start_at(&cluster.bootstrap(), &cluster.file(""), topic, arguments)
    }

    /// Files go to `folder`.
    pub fn start_at(bootstrap: &str, folder: &Path, topic: &str, arguments: &[&str]) -> Self {
        let ledger = folder.join(format!("{topic}.ledger"));
        let path = ledger.to_string_lossy().into_owned();
        let mut command = franz_go("produce", bootstrap, &["-topic", topic, "-ledger", &path]);
        command.args(arguments);
        let errors = folder.join(format!("{topic}.produce.log"));
        let process = Talking::spawn(&format!("producer of {topic}"), &mut command, &errors);
        Self {
            process,
            topic: topic.to_owned(),
            ledger,
        }
    }

    /// Waits until that many records are acknowledged.
    pub fn wait_until_acked(&self, records: u64, deadline: Duration) {
        self.process
            .wait_for_line(&format!("{records} acks"), deadline, |line| {
                (acked(line)? >= records).then_some(())
            });
    }

    /// Waits until so many more records are acknowledged than now.
    pub fn wait_until_acked_more(&self, records: u64, deadline: Duration) {
        let lines = self.process.lines_so_far();
        let so_far = lines.iter().filter_map(|line| acked(line)).max();
        // Counts are told every 10,000: without one of now, the next is waited for.
        let so_far = so_far.unwrap_or_else(|| self.process.wait_for_line("acks", deadline, acked));
        self.wait_until_acked(so_far.saturating_add(records), deadline);
    }

    /// Waits for its end; one that was started with `-until-told` is told.
    pub fn finish(self, deadline: Duration) -> Produced {
        let lines = self.process.finish(deadline);
        let last = lines.last().cloned().unwrap_or_default();
        let told: Value = serde_json::from_str(&last)
            .unwrap_or_else(|error| panic!("producer of {}: {error}: {last:?}", self.topic));
        let count = |field: &str| {
            told[field]
                .as_u64()
                .unwrap_or_else(|| panic!("{field}: {told}"))
        };
        Produced {
            sent: count("sent"),
            acked: count("acked"),
            unknown: count("unknown"),
            first_error: told["first_error"].as_str().unwrap_or_default().to_owned(),
            seconds: told["seconds"].as_f64().unwrap_or_default(),
            topic: self.topic,
            ledger: self.ledger,
        }
    }
}

/// The count in a line of the producer that tells one.
fn acked(line: &str) -> Option<u64> {
    line.strip_prefix("acked ")?.parse().ok()
}

/// Produces to the end.
pub fn produce(cluster: &Cluster, topic: &str, arguments: &[&str], deadline: Duration) -> Produced {
    Production::start(cluster, topic, arguments).finish(deadline)
}

/// Reads everything back and panics if any promise is broken. Gives the reader's verdict.
pub fn verify(bootstrap: &str, topic: &str, ledger: &Path) -> Value {
    let path = ledger.to_string_lossy();
    let arguments = ["-topic", topic, "-ledger", &path, "-timeout", "4m"];
    let finished = run(
        &mut franz_go("verify", bootstrap, &arguments),
        "",
        VERIFY_DEADLINE,
    );
    assert!(
        finished.success,
        "{topic}: {}{}",
        finished.stdout, finished.stderr
    );
    serde_json::from_str(&finished.stdout)
        .unwrap_or_else(|error| panic!("{error}: {}", finished.stdout))
}

impl Produced {
    pub fn verify(&self, cluster: &Cluster) -> Value {
        let verdict = verify(&cluster.bootstrap(), &self.topic, &self.ledger);
        assert_eq!(verdict["acked"].as_u64(), Some(self.acked), "{verdict}");
        verdict
    }

    /// Every record that was sent was acknowledged, and there were at least so many.
    pub fn assert_at_least_acked(&self, records: u64) {
        assert!(self.acked >= records, "{}: {}", self.topic, self.acked);
        self.assert_all_acked(self.sent);
    }

    /// Every record was acknowledged.
    pub fn assert_all_acked(&self, records: u64) {
        assert_eq!(
            (self.acked, self.unknown),
            (records, 0),
            "{}: first error: {}",
            self.topic,
            self.first_error
        );
    }
}
