//! What the processes of a cluster have logged, and what that says of them.
//!
//! Invariant: a log that cannot be read counts as an error.

use std::path::Path;

use super::Cluster;

impl Cluster {
    /// What one service has logged so far.
    pub fn log(&self, service: &str) -> String {
        read_log(&self.service(service).log)
    }

    /// No process has ended by itself, and none has logged an error.
    pub fn assert_sound(&self) {
        for service in self.services.values() {
            assert!(
                service.process.is_alive(),
                "{} has ended, see {}",
                service.name,
                service.log.display()
            );
            let log = read_log(&service.log);
            let errors: Vec<&str> = log
                .lines()
                .filter(|line| line.contains("ERROR") || line.contains("panicked"))
                .collect();
            assert!(
                errors.is_empty(),
                "{} logged errors: {errors:#?}",
                service.name
            );
        }
    }

    /// No process of the cluster has panicked.
    pub fn assert_no_panic(&self) {
        for service in self.services.values() {
            let log = read_log(&service.log);
            let line = log.lines().find(|line| line.contains("panicked"));
            assert!(line.is_none(), "{} panicked: {line:?}", service.name);
        }
    }

    pub(super) fn show_logs(&self) {
        eprintln!(
            "{}: data and logs are kept in {}",
            self.name,
            self.folder.display()
        );
        for service in self.services.values() {
            let log = read_log(&service.log);
            let telling: Vec<&str> = log
                .lines()
                .filter(|line| {
                    ["ERROR", "WARN", "panicked"]
                        .iter()
                        .any(|word| line.contains(word))
                })
                .collect();
            let state = if service.process.is_alive() {
                "runs"
            } else {
                "does not run"
            };
            eprintln!(
                "  {} ({state}), {} lines of WARN and ERROR",
                service.name,
                telling.len()
            );
            for line in &telling[telling.len().saturating_sub(5)..] {
                eprintln!("    {line}");
            }
        }
    }
}

fn read_log(path: &Path) -> String {
    match std::fs::read(path) {
        Ok(bytes) => String::from_utf8_lossy(&bytes).into_owned(),
        Err(error) => format!("ERROR cannot read {}: {error}", path.display()),
    }
}
