//! The cluster under check: controllers, brokers and gateways as processes of their own, whose gRPC
//! connections go through the relays of `network`.
//!
//! Invariants: a service runs if and only if no fault holds it down, once `settle` returned; a process
//! that ended without being told to is remembered as a crash. All processes are started by the
//! thread that made the fleet, and end with it.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::net::{SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use tokio::net::TcpSocket;

use super::network::Network;
use super::stall::{LOG_THREAD, Stall};
use crate::bin_dir;
use crate::cluster::SMALL_RESERVE;
use crate::process::{OwnChild, ProcessId};
use crate::rest::Rest;
use crate::wait::{holds, wait_for, within};

const READY_DEADLINE: Duration = Duration::from_secs(120);
/// How long a service may take to end after SIGTERM, before it is killed and that is told.
const STOP_DEADLINE: Duration = Duration::from_secs(30);
/// Below the range from which the kernel takes ports for outgoing connections.
const FIRST_PORT: u16 = 12_000;
const PORT_COUNT: u16 = 8_000;
/// A service that is asked while faults last answers soon or not at all.
const ASK_DEADLINE: Duration = Duration::from_millis(700);
/// The least that may be kept, so that replicas that were away for long, and new ones, need copies.
const RAFT_KEEP_BYTES: u64 = 1 << 20;

/// How many of each, and which broker is run.
#[derive(Debug, Clone)]
pub struct Shape {
    pub controllers: usize,
    pub brokers: usize,
    pub gateways: usize,
    /// `None`: the product's.
    pub broker_binary: Option<PathBuf>,
    pub broker_environment: Vec<(String, String)>,
}

impl Shape {
    /// The same with brokers that do one thing wrong (`chronik_broker::sabotage`).
    #[must_use]
    pub fn sabotaged(mut self, name: &str) -> Self {
        self.broker_binary = Some(bin_dir().join("chronik-broker-sabotaged"));
        self.broker_environment = vec![("CHRONIK_SABOTAGE".to_owned(), name.to_owned())];
        self
    }
}

impl Default for Shape {
    fn default() -> Self {
        Self {
            controllers: 3,
            // One more than replicas, so that replicas can move.
            brokers: 4,
            gateways: 2,
            broker_binary: None,
            broker_environment: Vec::new(),
        }
    }
}

struct Service {
    binary: PathBuf,
    config: PathBuf,
    log: PathBuf,
    http: String,
    environment: Vec<(String, String)>,
    child: Option<OwnChild>,
    /// Faults that want it down, stopped, or its disk stalled.
    held_down: BTreeSet<usize>,
    paused: BTreeSet<usize>,
    stalls: BTreeMap<usize, Stall>,
}

pub struct Fleet {
    folder: PathBuf,
    services: BTreeMap<String, Service>,
    network: Network,
    kafka: Vec<String>,
    rest: Vec<String>,
    crashes: Vec<String>,
    // Keeps the ports from others while their services are down.
    _ports: Vec<TcpSocket>,
}

/// Ports that stay ours for as long as the sockets live, also while nobody listens on them.
struct Ports {
    next: u16,
    held: Vec<TcpSocket>,
}

impl Ports {
    fn new() -> Self {
        // Runs side by side start at different places.
        let next = u16::try_from(std::process::id() % u32::from(PORT_COUNT)).expect("below it");
        Self {
            next,
            held: Vec::new(),
        }
    }

    fn pick(&mut self) -> String {
        for _ in 0..PORT_COUNT {
            let port = FIRST_PORT + self.next;
            self.next = (self.next + 1) % PORT_COUNT;
            let socket = TcpSocket::new_v4().expect("a socket");
            let address = SocketAddr::from(([127, 0, 0, 1], port));
            // Bound without SO_REUSEADDR, so that any other user of the port makes this fail.
            if socket.bind(address).is_ok() {
                socket.set_reuseaddr(true).expect("an option that exists");
                self.held.push(socket);
                return address.to_string();
            }
        }
        panic!(
            "no free port between {FIRST_PORT} and {}",
            FIRST_PORT + PORT_COUNT
        );
    }
}

/// What the configuration files of all services are made of.
struct Layout {
    shape: Shape,
    folder: PathBuf,
    ports: Ports,
    network: Network,
    services: BTreeMap<String, Service>,
    kafka: Vec<String>,
    rest: Vec<String>,
}

impl Fleet {
    /// Starts everything and waits until it is ready.
    pub fn start(folder: &Path, shape: &Shape) -> Self {
        for name in ["config", "logs", "data"] {
            std::fs::create_dir_all(folder.join(name)).expect("the folder is writable");
        }
        let mut layout = Layout {
            shape: shape.clone(),
            folder: folder.to_owned(),
            ports: Ports::new(),
            network: Network::new(),
            services: BTreeMap::new(),
            kafka: Vec::new(),
            rest: Vec::new(),
        };
        layout.write();
        let mut fleet = Self {
            folder: layout.folder,
            services: layout.services,
            network: layout.network,
            kafka: layout.kafka,
            rest: layout.rest,
            crashes: Vec::new(),
            _ports: layout.ports.held,
        };
        fleet.settle();
        for name in fleet.names("") {
            if let Err(why) = fleet.wait_until_ready(&name, READY_DEADLINE) {
                panic!("{why}; files are in {}", fleet.folder.display());
            }
        }
        fleet
    }

    pub fn folder(&self) -> &Path {
        &self.folder
    }

    pub fn network(&self) -> &Network {
        &self.network
    }

    /// Kafka endpoints of all gateways, with commas.
    pub fn bootstrap(&self) -> String {
        self.kafka.join(",")
    }

    pub fn rest_addresses(&self) -> &[String] {
        &self.rest
    }

    /// For requests that may wait.
    pub fn rest(&self) -> Rest {
        Rest::new(self.rest.clone())
    }

    /// For a look in the middle of faults.
    pub fn quick_rest(&self) -> Rest {
        Rest::with_deadline(self.rest.clone(), ASK_DEADLINE)
    }

    /// Names of the services of a role; of all if it is empty.
    pub fn names(&self, role: &str) -> Vec<String> {
        let names = self.services.keys();
        names
            .filter(|name| name.starts_with(role))
            .cloned()
            .collect()
    }

    pub fn is_up(&self, name: &str) -> bool {
        self.services[name].child.is_some()
    }

    /// kill -9, until the fault is lifted.
    pub fn kill(&mut self, fault: usize, names: &[String]) {
        let mut doomed = Vec::new();
        for name in names {
            let service = self.service(name);
            service.held_down.insert(fault);
            if let Some(child) = service.child.take() {
                doomed.push(child);
            }
        }
        // All at once, and only then wait for each.
        for child in &doomed {
            if let Some(process) = ProcessId::of(child.0.id()) {
                process.signal(libc::SIGKILL);
            }
        }
        for name in names {
            self.service(name).stalls.clear();
        }
        drop(doomed);
    }

    /// kill -9, and its disk is lost. Starts when the fault is lifted.
    pub fn wipe(&mut self, fault: usize, name: &str) {
        self.kill(fault, &[name.to_owned()]);
        let data = self.folder.join("data").join(name);
        if let Err(error) = std::fs::remove_dir_all(&data) {
            panic!("cannot remove {}: {error}", data.display());
        }
    }

    /// What a broker is registered as, by the controller that knows the latest.
    pub fn epoch_of(&self, broker: &str) -> Result<u64, String> {
        let rest = |address: &String| Rest::with_deadline(vec![address.clone()], ASK_DEADLINE);
        let epochs = self.rest.iter().map(|it| epoch_of(&rest(it), broker));
        let known = epochs.filter_map(Result::ok).max();
        known.ok_or_else(|| format!("no controller knows {broker}"))
    }

    /// Whether a majority of the controllers says that every partition has all its replicas in sync, and that
    /// `registered`, a broker, has registered since it had the epoch. One that is cut off knows only what was.
    pub fn is_surely_whole(&self, registered: Option<&(String, u64)>) -> Result<(), String> {
        let says_so = |address: &String| -> Result<(), String> {
            let rest = Rest::with_deadline(vec![address.clone()], ASK_DEADLINE);
            if let Some((broker, before)) = registered {
                let epoch = epoch_of(&rest, broker)?;
                holds(epoch > *before, format!("{broker} has not registered"))?;
            }
            is_whole(&rest)
        };
        let count = self.rest.iter().filter(|it| says_so(it).is_ok()).count();
        holds(
            count > self.rest.len() / 2,
            format!("{count} controllers say that all replicas are in sync"),
        )
    }

    /// Whether every partition has a leader and all its replicas in sync, and none moves.
    pub fn is_whole(&self) -> Result<(), String> {
        is_whole(&self.quick_rest())
    }

    /// Copies of segment files that came into force, by the brokers' logs.
    pub fn copies(&self) -> usize {
        const MESSAGE: &str = "the copy of the leader's log is in force";
        let logs = self.services.values().map(|service| &service.log);
        let text = logs.map(|log| std::fs::read(log).unwrap_or_default());
        text.map(|log| String::from_utf8_lossy(&log).matches(MESSAGE).count())
            .sum()
    }

    /// SIGTERM, until the fault is lifted.
    pub fn terminate(&mut self, fault: usize, name: &str) {
        let service = self.service(name);
        service.held_down.insert(fault);
        if let Some(child) = &service.child {
            child.terminate();
        }
    }

    /// SIGSTOP, until the fault is lifted.
    pub fn pause(&mut self, fault: usize, name: &str) {
        let service = self.service(name);
        service.paused.insert(fault);
        signal(service, libc::SIGSTOP);
    }

    /// Stops the thread that syncs a broker's log, until the fault is lifted.
    pub fn stall(&mut self, fault: usize, name: &str) -> Result<(), String> {
        let service = self.service(name);
        let Some(child) = &service.child else {
            return Err("it is down".to_owned());
        };
        let stall = Stall::begin(child.0.id(), LOG_THREAD)?;
        service.stalls.insert(fault, stall);
        Ok(())
    }

    /// Ends what a fault did to processes; `settle` starts what it held down.
    pub fn lift(&mut self, fault: usize) {
        for service in self.services.values_mut() {
            service.held_down.remove(&fault);
            service.stalls.remove(&fault);
            if service.paused.remove(&fault) && service.paused.is_empty() {
                signal(service, libc::SIGCONT);
            }
        }
        self.network.lift(fault);
    }

    /// Starts what is to run and does not. A process that is still ending after SIGTERM is waited for.
    pub fn settle(&mut self) {
        self.look_for_crashes();
        let due: Vec<String> = self
            .services
            .iter()
            .filter(|(_, service)| service.held_down.is_empty() && service.child.is_none())
            .map(|(name, _)| name.clone())
            .collect();
        for name in due {
            self.start_service(&name);
        }
    }

    /// Waits for the end of a process that was told to end.
    pub fn wait_for_end(&mut self, name: &str) {
        let Some(mut child) = self.service(name).child.take() else {
            return;
        };
        let deadline = Instant::now() + STOP_DEADLINE;
        let ended = wait_for(&format!("{name} to end"), STOP_DEADLINE * 2, || match child
            .0
            .try_wait()
        {
            Ok(Some(status)) => Ok(Some(status)),
            _ if Instant::now() >= deadline => Ok(None),
            _ => Err("it runs"),
        });
        match ended {
            Some(status) if status.success() => {}
            Some(status) => self
                .crashes
                .push(format!("{name} ended with {status} after SIGTERM")),
            None => self.crashes.push(format!(
                "{name} did not end within {STOP_DEADLINE:?} after SIGTERM"
            )),
        }
    }

    /// What ended by itself, panicked, or would not end.
    pub fn crashes(&mut self) -> Vec<String> {
        self.look_for_crashes();
        let mut crashes = std::mem::take(&mut self.crashes);
        for (name, service) in &self.services {
            let log = std::fs::read(&service.log).unwrap_or_default();
            let log = String::from_utf8_lossy(&log);
            crashes.extend(
                log.lines()
                    .filter(|line| line.contains("panicked"))
                    .map(|line| format!("{name}: {line}")),
            );
        }
        crashes
    }

    pub fn wait_until_ready(&mut self, name: &str, deadline: Duration) -> Result<(), String> {
        let http = Rest::with_deadline(vec![self.services[name].http.clone()], ASK_DEADLINE);
        within(deadline, || {
            self.look_for_crashes();
            let answer = http.ask(reqwest::Method::GET, "/readyz", None);
            let is_ready = answer.is_some_and(|answer| answer.status == 200);
            holds(is_ready, format!("{name} is not ready after {deadline:?}"))
        })
    }

    fn service(&mut self, name: &str) -> &mut Service {
        self.services.get_mut(name).expect("a name of this fleet")
    }

    fn look_for_crashes(&mut self) {
        for (name, service) in &mut self.services {
            let Some(child) = &mut service.child else {
                continue;
            };
            if let Ok(Some(status)) = child.0.try_wait() {
                service.child = None;
                if service.held_down.is_empty() {
                    self.crashes
                        .push(format!("{name} ended by itself with {status}"));
                } else if !status.success() {
                    self.crashes
                        .push(format!("{name} ended with {status} after SIGTERM"));
                }
            }
        }
    }

    fn start_service(&mut self, name: &str) {
        let service = self.services.get_mut(name).expect("a name of this fleet");
        let log = File::options()
            .create(true)
            .append(true)
            .open(&service.log)
            .expect("the log file is writable");
        let mut command = Command::new(&service.binary);
        command
            .arg("--config")
            .arg(&service.config)
            .envs([SMALL_RESERVE])
            .envs(service.environment.iter().cloned())
            .stdin(Stdio::null())
            .stdout(log.try_clone().expect("a file can be shared"))
            .stderr(log);
        let child = OwnChild::spawn(&mut command);
        let owners = self.network.owners().lock();
        let mut owners = owners.unwrap_or_else(std::sync::PoisonError::into_inner);
        owners.retain(|_, owner| owner != name);
        owners.insert(child.0.id(), name.to_owned());
        service.child = Some(child);
    }
}

fn is_whole(rest: &Rest) -> Result<(), String> {
    let cluster = rest.get("/v1/cluster")?;
    let is_zero = |name: &str| cluster[name].as_u64() == Some(0);
    let all_led = is_zero("leaderless_partition_count");
    let all_in_sync = is_zero("under_replicated_partition_count");
    let none_moves = is_zero("reassigning_partition_count");
    holds(
        all_led && all_in_sync && none_moves,
        format!("not every replica is in sync: {cluster}"),
    )
}

fn epoch_of(rest: &Rest, broker: &str) -> Result<u64, String> {
    let id = broker.trim_start_matches("broker-");
    let told = rest.get(&format!("/v1/brokers/{id}"))?;
    let epoch = told["broker_epoch"].as_u64();
    epoch.ok_or_else(|| format!("no epoch: {told}"))
}

fn signal(service: &Service, signal: i32) {
    let process = service
        .child
        .as_ref()
        .and_then(|child| ProcessId::of(child.0.id()));
    if let Some(process) = process {
        process.signal(signal);
    }
}

impl Layout {
    fn write(&mut self) {
        let mut controllers = Vec::new();
        for id in 1..=self.shape.controllers {
            let (rpc, advertised) = self.relayed(&format!("controller-{id}"));
            let rest = self.ports.pick();
            self.rest.push(rest.clone());
            controllers.push((id, rpc, advertised, rest));
        }
        let group: Vec<String> = controllers
            .iter()
            .map(|(id, _, advertised, rest)| {
                format!(
                    "{{ id = {id}, rpc-address = \"{advertised}\", rest-address = \"{rest}\" }}"
                )
            })
            .collect();
        let group = format!("controllers = [{}]\n", group.join(", "));
        let addresses: Vec<&String> = controllers
            .iter()
            .map(|(_, _, address, _)| address)
            .collect();
        let known = format!("controllers = {addresses:?}\n");
        let endpoints = self.shape.brokers;
        for (id, rpc, _, rest) in &controllers {
            let config = format!(
                "controller-id = {id}\nrpc-listen = \"{rpc}\"\nrest-listen = \"{rest}\"\n{group}"
            );
            self.add("controller", *id, rest, &config);
        }
        for id in 1..=self.shape.brokers {
            let (rpc, advertised) = self.relayed(&format!("broker-{id}"));
            let http = self.ports.pick();
            let config = format!(
                "broker-id = {id}\nrpc-listen = \"{rpc}\"\nrpc-advertised = \"{advertised}\"\n\
                 http-listen = \"{http}\"\n{known}\
                 [log]\nraft-keep-bytes = {RAFT_KEEP_BYTES}\nretention-check-interval-ms = 500\n\
                 [consumer-groups]\ninitial-rebalance-delay-ms = 0\n"
            );
            self.add("broker", id, &http, &config);
        }
        for id in 1..=self.shape.gateways {
            let listeners: Vec<String> = (0..endpoints).map(|_| self.ports.pick()).collect();
            let http = self.ports.pick();
            let config = format!(
                "gateway-id = \"gateway-{id}\"\nlisteners = {listeners:?}\n\
                 http-listen = \"{http}\"\n{known}[offsets-topic]\npartitions = 3\n"
            );
            self.kafka.extend(listeners);
            self.add("gateway", id, &http, &config);
        }
    }

    /// An address to listen on, and the one of the relay before it.
    fn relayed(&mut self, name: &str) -> (String, String) {
        let (listen, advertised) = (self.ports.pick(), self.ports.pick());
        let relay = TcpListener::bind(&advertised).expect("a port that is kept free");
        let target = listen.parse().expect("an address of our own making");
        self.network.relay(name, relay, target);
        (listen, advertised)
    }

    fn add(&mut self, role: &str, id: usize, http: &str, config: &str) {
        let name = format!("{role}-{id}");
        let file = self.folder.join("config").join(format!("{name}.toml"));
        let data = self.folder.join("data").join(&name);
        // Keys of the file's top come before its tables.
        let config = format!("data-dir = \"{}\"\n{config}", data.display());
        std::fs::write(&file, config).expect("the folder is writable");
        let is_broker = role == "broker";
        let binary = match &self.shape.broker_binary {
            Some(binary) if is_broker => binary.clone(),
            _ => bin_dir().join(format!("chronik-{role}")),
        };
        assert!(binary.is_file(), "{} is missing", binary.display());
        let service = Service {
            binary,
            config: file,
            log: self.folder.join("logs").join(format!("{name}.log")),
            http: http.to_owned(),
            environment: if is_broker {
                self.shape.broker_environment.clone()
            } else {
                Vec::new()
            },
            child: None,
            held_down: BTreeSet::new(),
            paused: BTreeSet::new(),
            stalls: BTreeMap::new(),
        };
        self.services.insert(name, service);
    }
}
