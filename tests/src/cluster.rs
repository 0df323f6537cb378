//! A cluster of real processes, started by `chronik dev` on free ports in a folder of its own.
//!
//! Invariants: processes killed by a test are started again from the very files `chronik dev` wrote
//! for them; the cluster ends with the value; of a test that failed, data and logs stay.

mod logs;

use std::collections::BTreeMap;
use std::fs::File;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::agreement::controllers_agree;
use crate::bin_dir;
use crate::process::{OwnChild, ProcessId, Talking};
use crate::rest::Rest;
use crate::turn::Turn;
use crate::wait::{holds, wait_for};

const START_DEADLINE: Duration = Duration::from_secs(120);
const STOP_DEADLINE: Duration = Duration::from_secs(90);
/// Until controllers that were behind have caught up.
const AGREE_DEADLINE: Duration = Duration::from_secs(60);
/// How long an orderly stop of a broker may take.
pub const STOP_BOUND: Duration = Duration::from_secs(10);
/// Brokers of a test take records however full the machine's disk is, within reason.
pub const SMALL_RESERVE: (&str, &str) = ("CHRONIK_BROKER_STORAGE__RESERVE_BYTES", "134217728");

/// The brokers of the default cluster.
pub const BROKERS: [&str; 3] = ["broker-1", "broker-2", "broker-3"];

/// What to start. The default is what `make run` starts.
#[derive(Debug, Clone)]
pub struct Options {
    pub controllers: u16,
    pub brokers: u16,
    pub gateways: u16,
    pub otlp_endpoint: Option<String>,
    pub trace_sample_ratio: Option<f64>,
    /// The test measures: no other cluster runs meanwhile.
    pub alone: bool,
    /// Settings of the services that are not the defaults, as environment of all processes.
    pub environment: Vec<(String, String)>,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            controllers: 3,
            brokers: 3,
            gateways: 1,
            otlp_endpoint: None,
            trace_sample_ratio: None,
            alone: false,
            environment: Vec::new(),
        }
    }
}

/// One process of the cluster, as `chronik dev` described it.
#[derive(Debug, Clone)]
pub struct Service {
    pub name: String,
    pub id: String,
    pub binary: PathBuf,
    pub config: PathBuf,
    pub log: PathBuf,
    /// Address of `/metrics`, `/healthz`, `/readyz`.
    pub http: String,
    pub kafka: Vec<String>,
    pub process: ProcessId,
}

pub struct Cluster {
    name: String,
    options: Options,
    folder: PathBuf,
    launcher: Option<Talking>,
    services: BTreeMap<String, Service>,
    /// Services that the test itself started again.
    restarted: BTreeMap<String, OwnChild>,
    kafka: Vec<String>,
    rest_addresses: Vec<String>,
    started_in: Duration,
    // Last, so that the machine is given on when all processes are gone.
    _turn: Turn,
}

impl Cluster {
    /// Three controllers, three brokers, one gateway with an endpoint per broker.
    pub fn start(name: &str) -> Self {
        Self::start_with(name, Options::default())
    }

    /// With other settings of the brokers' logs than by default, each named as in the environment.
    pub fn with_log_settings(name: &str, settings: &[(&str, &str)]) -> Self {
        let setting = |(name, value): &(&str, &str)| {
            (format!("CHRONIK_BROKER_LOG__{name}"), (*value).to_owned())
        };
        let options = Options {
            environment: settings.iter().map(setting).collect(),
            ..Options::default()
        };
        Self::start_with(name, options)
    }

    pub fn start_with(name: &str, options: Options) -> Self {
        let turn = if options.alone {
            Turn::alone()
        } else {
            Turn::shared()
        };
        let folder = tempfile::Builder::new()
            .prefix(&format!("chronik-test-{name}-"))
            .tempdir()
            .expect("the temporary folder is writable")
            .keep();
        let mut cluster = Self {
            name: name.to_owned(),
            options,
            folder,
            launcher: None,
            services: BTreeMap::new(),
            restarted: BTreeMap::new(),
            kafka: Vec::new(),
            rest_addresses: Vec::new(),
            started_in: Duration::ZERO,
            _turn: turn,
        };
        cluster.launch();
        cluster
    }

    /// Starts `chronik dev` on the cluster's folder, also after `kill_9_everything` or `stop`.
    pub fn launch(&mut self) {
        assert!(self.launcher.is_none(), "the cluster runs already");
        let binary = bin_dir().join("chronik");
        assert!(
            binary.is_file(),
            "{} is missing: cargo build --release",
            binary.display()
        );
        let mut command = Command::new(binary);
        command.envs([SMALL_RESERVE]);
        command.envs(self.options.environment.iter().cloned());
        command
            .args(["dev", "--json", "--kafka-port", "0", "--rest-port", "0"])
            .args(["--controllers", &self.options.controllers.to_string()])
            .args(["--brokers", &self.options.brokers.to_string()])
            .args(["--gateways", &self.options.gateways.to_string()])
            .arg("--data-dir")
            .arg(self.data_dir());
        if let Some(endpoint) = &self.options.otlp_endpoint {
            command.args(["--otlp-endpoint", endpoint]);
        }
        if let Some(ratio) = self.options.trace_sample_ratio {
            command.args(["--trace-sample-ratio", &ratio.to_string()]);
        }
        let began = Instant::now();
        let launcher = Talking::spawn("chronik dev", &mut command, &self.folder.join("dev.log"));
        let ready: Value = launcher.wait_for_line("event ready", START_DEADLINE, |line| {
            let event: Value = serde_json::from_str(line).ok()?;
            (event["event"] == "ready").then_some(event)
        });
        self.started_in = began.elapsed();
        self.launcher = Some(launcher);
        self.kafka = strings(&ready["kafka"]);
        self.rest_addresses = strings(&ready["rest"]);
        self.services = ready["processes"]
            .as_array()
            .unwrap_or_else(|| panic!("no processes in {ready}"))
            .iter()
            .map(|described| {
                let service = Service::from_json(described);
                (service.name.clone(), service)
            })
            .collect();
    }

    pub fn data_dir(&self) -> PathBuf {
        self.folder.join("data")
    }

    /// A place for files of the test, kept like data and logs.
    pub fn file(&self, name: &str) -> PathBuf {
        self.folder.join(name)
    }

    /// From the start of `chronik dev` until it said that all is ready.
    pub fn started_in(&self) -> Duration {
        self.started_in
    }

    /// Every Kafka endpoint, with commas.
    pub fn bootstrap(&self) -> String {
        self.kafka.join(",")
    }

    pub fn kafka(&self) -> &[String] {
        &self.kafka
    }

    pub fn rest(&self) -> Rest {
        Rest::new(self.rest_addresses.clone())
    }

    pub fn rest_addresses(&self) -> &[String] {
        &self.rest_addresses
    }

    pub fn service(&self, name: &str) -> &Service {
        self.services
            .get(name)
            .unwrap_or_else(|| panic!("the cluster has no {name}"))
    }

    pub fn services(&self) -> impl Iterator<Item = &Service> {
        self.services.values()
    }

    /// All processes of the services; not the launcher.
    pub fn pids(&self) -> Vec<u32> {
        self.services
            .values()
            .map(|service| service.process.pid)
            .collect()
    }

    pub fn launcher_pid(&self) -> u32 {
        self.launcher.as_ref().expect("the cluster runs").pid()
    }

    pub fn kill_9(&mut self, name: &str) {
        self.service(name).process.kill_9();
        // Reaps it, if it was ours.
        self.restarted.remove(name);
    }

    /// SIGTERM to one service. Gives how long it took to end.
    pub fn stop_service(&mut self, name: &str) -> Duration {
        let process = &self.service(name).process;
        assert!(process.is_alive(), "{name} has ended by itself");
        let began = Instant::now();
        process.signal(libc::SIGTERM);
        wait_for(&format!("{name} to end"), STOP_DEADLINE, || {
            holds(!process.is_alive(), "it still runs")
        });
        let took = began.elapsed();
        // Reaps it, if it was ours.
        self.restarted.remove(name);
        took
    }

    /// Starts a service that has ended again, from its own configuration file, and does not wait for it.
    pub fn start_service(&mut self, name: &str) {
        self.start_service_with(name, &[]);
    }

    /// The same with more environment.
    pub fn start_service_with(&mut self, name: &str, environment: &[(&str, &str)]) {
        let service = self.service(name).clone();
        assert!(!service.process.is_alive(), "{name} runs already");
        let log = File::options()
            .create(true)
            .append(true)
            .open(&service.log)
            .unwrap_or_else(|error| panic!("cannot write {}: {error}", service.log.display()));
        let errors = log.try_clone().expect("a file can be shared");
        let mut command = Command::new(&service.binary);
        command
            .arg("--config")
            .arg(&service.config)
            .envs([SMALL_RESERVE])
            .envs(self.options.environment.iter().cloned())
            .envs(environment.iter().copied())
            .stdin(Stdio::null())
            .stdout(log)
            .stderr(errors);
        let child = OwnChild::spawn(&mut command);
        let process = ProcessId::of(child.0.id())
            .unwrap_or_else(|| panic!("{name} ended at once, see {}", service.log.display()));
        self.services
            .get_mut(name)
            .expect("looked up above")
            .process = process;
        self.restarted.insert(name.to_owned(), child);
    }

    /// Waits until a service says itself that it is ready.
    pub fn wait_until_ready(&self, name: &str, deadline: Duration) {
        let service = self.service(name);
        let http = Rest::new(vec![service.http.clone()]);
        wait_for(&format!("{name} to be ready"), deadline, || {
            holds(
                service.process.is_alive(),
                format!("it ended, see {}", service.log.display()),
            )?;
            match http.ask(reqwest::Method::GET, "/readyz", None) {
                Some(answer) => holds(answer.status == 200, format!("/readyz: {}", answer.status)),
                None => Err("no answer".to_owned()),
            }
        });
    }

    /// A number of one service, as `/metrics` shows it.
    pub fn metric(&self, service: &str, name: &str) -> Result<f64, String> {
        let text = Rest::new(vec![self.service(service).http.clone()]).text("/metrics")?;
        text.lines()
            .find_map(|line| line.strip_prefix(name)?.strip_prefix(' ')?.parse().ok())
            .ok_or_else(|| format!("{service} shows no {name}"))
    }

    /// kill -9 of every process at once, launcher included.
    pub fn kill_9_everything(&mut self) {
        let launcher = self.launcher.take().expect("the cluster runs");
        let launcher = ProcessId::of(launcher.pid()).expect("the launcher runs");
        let all: Vec<ProcessId> = self
            .services
            .values()
            .map(|service| service.process.clone())
            .collect();
        for process in &all {
            process.signal(libc::SIGKILL);
        }
        launcher.kill_9();
        for process in &all {
            process.kill_9();
        }
        self.restarted.clear();
    }

    /// The controllers that run hold the same state.
    pub fn assert_controllers_agree(&self) {
        let controllers = self.services().filter(|s| s.name.starts_with("controller"));
        let running = controllers.filter(|controller| controller.process.is_alive());
        let addresses: Vec<String> = running.map(|controller| controller.http.clone()).collect();
        if let Err(difference) = controllers_agree(&addresses, AGREE_DEADLINE) {
            panic!("{}: {difference}", self.name);
        }
    }

    /// SIGTERM to what was started one by one and to the launcher; all have to end, and to end well.
    pub fn stop(&mut self) {
        self.assert_controllers_agree();
        // The order of `chronik dev`: what others depend on goes last.
        for role in ["gateway", "broker", "controller"] {
            for (name, child) in &mut self.restarted {
                if name.starts_with(role) {
                    child.terminate();
                    let status = child.wait(name, STOP_DEADLINE);
                    assert!(status.success(), "{name} ended with {status} after SIGTERM");
                }
            }
        }
        self.restarted.clear();
        // After `kill_9_everything` there is none, and all that runs was started one by one.
        if let Some(launcher) = self.launcher.take() {
            launcher.child().terminate();
            launcher.finish(STOP_DEADLINE);
        }
        for service in self.services.values() {
            assert!(
                !service.process.is_alive(),
                "{} was not stopped",
                service.name
            );
        }
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        let failed = std::thread::panicking();
        if failed {
            self.show_logs();
        }
        self.restarted.clear();
        if let Some(launcher) = self.launcher.take() {
            // Its children die with it; give it the chance to stop them in order if all is well.
            drop(launcher);
        }
        for service in self.services.values() {
            service.process.signal(libc::SIGKILL);
        }
        if !failed && std::env::var_os("CHRONIK_TEST_KEEP").is_none() {
            let _ = std::fs::remove_dir_all(&self.folder);
        }
    }
}

impl Service {
    fn from_json(value: &Value) -> Self {
        let text = |field: &str| -> String {
            match &value[field] {
                Value::String(text) => text.clone(),
                Value::Null => panic!("a process without {field}: {value}"),
                other => other.to_string(),
            }
        };
        let pid = value["pid"]
            .as_u64()
            .and_then(|pid| u32::try_from(pid).ok())
            .unwrap_or_else(|| panic!("a process without pid: {value}"));
        let name = text("name");
        let process = ProcessId::of(pid).unwrap_or_else(|| panic!("{name} does not run"));
        Self {
            id: text("id"),
            binary: PathBuf::from(text("binary")),
            config: PathBuf::from(text("config")),
            log: PathBuf::from(text("log")),
            http: text("http"),
            kafka: strings(&value["kafka"]),
            name,
            process,
        }
    }
}

fn strings(value: &Value) -> Vec<String> {
    value
        .as_array()
        .into_iter()
        .flatten()
        .filter_map(Value::as_str)
        .map(str::to_owned)
        .collect()
}
