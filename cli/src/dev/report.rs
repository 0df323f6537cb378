//! What `chronik dev` tells: a few lines for a person, or JSON lines for a program.
//!
//! Invariant: with `--json`, every line on standard output is one JSON object with a field
//! `event`; all else goes to standard error.

use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::{Value, json};

use super::process::{ProcessSpec, Processes, Role};
use super::service_config::Service;
use crate::output;

pub struct Report {
    json: bool,
    data_dir: PathBuf,
}

impl Report {
    pub fn new(json: bool, data_dir: PathBuf) -> Self {
        Self { json, data_dir }
    }

    pub fn logs(&self) -> PathBuf {
        self.data_dir.join("logs")
    }

    pub fn up(&self, services: &[Service], processes: &Processes, took: Duration) {
        if self.json {
            output::print_line(&ready_event(services, processes, &self.data_dir, took).to_string());
        } else {
            output::print(&summary(services, &self.data_dir, took));
        }
    }

    pub fn progress(&self, missing: &[String]) {
        eprintln!("waiting for {}", missing.join(", "));
    }

    /// A process ended while the cluster runs.
    pub fn exited(&self, spec: &ProcessSpec, how: &str, log_end: &[String]) {
        if self.json {
            let event = json!({
                "event": "exited", "name": spec.name, "how": how, "log": spec.log,
                "log_end": log_end,
            });
            output::print_line(&event.to_string());
        } else {
            eprintln!(
                "{} ended ({how}); the rest goes on. Its log: {}",
                spec.name,
                spec.log.display()
            );
        }
    }

    pub fn stopping(&self) {
        eprintln!("stopping gateways, brokers, controllers; once more to kill them at once");
    }

    pub fn killed(&self, name: &str) {
        eprintln!("{name} did not stop in time and was killed");
    }

    pub fn stopped(&self) {
        if self.json {
            output::print_line(&json!({"event": "stopped"}).to_string());
        } else {
            output::print_line(&format!(
                "stopped; data stays in {}",
                self.data_dir.display()
            ));
        }
    }
}

fn ready_event(
    services: &[Service],
    processes: &Processes,
    data_dir: &Path,
    took: Duration,
) -> Value {
    let described: Vec<Value> = services
        .iter()
        .map(|service| {
            let started = processes
                .started()
                .find(|(spec, _)| spec.name == service.name);
            json!({
                "name": service.name,
                "role": service.role.name(),
                "id": service.id,
                "pid": started.map(|(_, pid)| pid),
                "binary": started.map(|(spec, _)| &spec.binary),
                "config": service.config,
                "log": service.log,
                "rpc": service.rpc_address,
                "http": service.http_address,
                "kafka": service.kafka_addresses,
            })
        })
        .collect();
    json!({
        "event": "ready",
        "elapsed_ms": u64::try_from(took.as_millis()).unwrap_or(u64::MAX),
        "data_dir": data_dir,
        "kafka": kafka(services),
        "rest": rest(services),
        "processes": described,
    })
}

fn summary(services: &[Service], data_dir: &Path, took: Duration) -> String {
    let count = |role: Role| {
        let count = services
            .iter()
            .filter(|service| service.role == role)
            .count();
        format!(
            "{count} {}{}",
            role.name(),
            if count == 1 { "" } else { "s" }
        )
    };
    let kafka = kafka(services);
    let rest = rest(services);
    let first = |addresses: &[String]| addresses.first().cloned().unwrap_or_default();
    let bootstrap = first(&kafka);
    format!(
        "Chronik is up: {}, {}, {} ({:.1} s)\n\
         \x20 Kafka  {}\n\
         \x20 REST   http://{}/v1/cluster (OpenAPI: /openapi.json)\n\
         \x20 data   {} (logs: logs/)\n\
         \x20 try    echo hello | kcat -b {bootstrap} -t hello -P\n\
         \x20        kcat -b {bootstrap} -t hello -C -e\n\
         \x20 stop   Ctrl-C\n",
        count(Role::Controller),
        count(Role::Broker),
        count(Role::Gateway),
        took.as_secs_f64(),
        kafka.join(", "),
        first(&rest),
        data_dir.display(),
    )
}

fn kafka(services: &[Service]) -> Vec<String> {
    services
        .iter()
        .flat_map(|service| service.kafka_addresses.clone())
        .collect()
}

fn rest(services: &[Service]) -> Vec<String> {
    let controllers = services
        .iter()
        .filter(|service| service.role == Role::Controller);
    controllers
        .map(|service| service.http_address.clone())
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn service(role: Role, http: &str, kafka: &[&str]) -> Service {
        Service {
            name: String::new(),
            role,
            id: String::new(),
            config: PathBuf::new(),
            log: PathBuf::new(),
            rpc_address: None,
            http_address: http.to_owned(),
            kafka_addresses: kafka.iter().map(|&address| address.to_owned()).collect(),
            toml: String::new(),
        }
    }

    #[test]
    fn a_person_is_told_what_is_up_where_and_what_to_try() {
        let services = [
            service(Role::Controller, "127.0.0.1:8080", &[]),
            service(Role::Broker, "127.0.0.1:1", &[]),
            service(Role::Broker, "127.0.0.1:2", &[]),
            service(
                Role::Gateway,
                "127.0.0.1:3",
                &["127.0.0.1:9092", "127.0.0.1:9093"],
            ),
        ];
        let told = summary(
            &services,
            Path::new("/some/data"),
            Duration::from_millis(1234),
        );
        assert_eq!(
            told,
            "Chronik is up: 1 controller, 2 brokers, 1 gateway (1.2 s)\n  \
             Kafka  127.0.0.1:9092, 127.0.0.1:9093\n  \
             REST   http://127.0.0.1:8080/v1/cluster (OpenAPI: /openapi.json)\n  \
             data   /some/data (logs: logs/)\n  \
             try    echo hello | kcat -b 127.0.0.1:9092 -t hello -P\n         \
             kcat -b 127.0.0.1:9092 -t hello -C -e\n  \
             stop   Ctrl-C\n"
        );
    }
}
