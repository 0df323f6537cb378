//! One simulated broker: a machine with a disk, and the process that may run on it, made of the real
//! storage, replicas, transport and leadership driver.
//!
//! Invariant: a process has no other way to the world than its disk, its connections, its clock, and
//! the requests of clients.

use std::collections::BTreeMap;
use std::io::ErrorKind;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};

use chronik_broker::controller_client::ClusterView;
use chronik_broker::replica::PartitionState;
use chronik_broker::replicas::Replicas;
use chronik_storage::disk::FaultyDisk;
use chronik_storage::disk::faulty::{Fault, Operation};
use chronik_storage::{Disk, Driver, Storage, StorageConfig};
use chronik_types::id::{BrokerId, RaftGroupId, ReplicaId};
use chronik_types::offset::Offset;
use rand::Rng;
use rand::rngs::StdRng;
use rand::seq::IteratorRandom;
use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;

use crate::boot::Boot;
use crate::disk::LyingDisk;
use crate::network::Network;
use crate::plan::{Plan, Sabotage};
use crate::process::Process;
use crate::requests::{Request, Response};
use crate::trace::event;

/// Of a disk that can be full: more than a broker writes that takes no records.
pub const DISK_RESERVE_BYTES: u64 = 64 << 20;

/// What all brokers are told of the cluster.
pub struct Cluster {
    pub plan: Plan,
    pub network: Network,
}

/// A machine.
pub struct Host {
    pub id: BrokerId,
    pub disk: FaultyDisk,
    pub running: Option<Running>,
    /// The process gets no turn until then.
    pub frozen_until: u64,
    /// The disk answers nothing until then.
    pub disk_stalls_until: u64,
    /// The process runs for that long at most, and then is killed or loses its power.
    pub fsync_max_ms: u64,
    /// How many processes there have been.
    pub process_count: u64,
    /// The process cannot read all that it has written, for as long as it runs.
    pub cannot_read: bool,
    /// When that was last so.
    pub unreadable_at: Option<u64>,
    /// The process has been told to fail, so that its errors are no surprise.
    pub is_doomed: bool,
    /// For `Sabotage::ForgetVotes`: the votes at the last start.
    votes: BTreeMap<RaftGroupId, bytes::Bytes>,
}

/// A process.
pub struct Running {
    pub process: Process,
    driver: Driver,
    /// Closed when it is dropped.
    _storage: Storage,
    pub replicas: Replicas,
    pub requests: mpsc::UnboundedSender<Request>,
    pub responses: Arc<Mutex<Vec<Response>>>,
    pub view: watch::Sender<ClusterView>,
    pub states: BTreeMap<RaftGroupId, watch::Sender<PartitionState>>,
    /// Up to where the committed log of each replica was looked at.
    pub checked: BTreeMap<RaftGroupId, Offset>,
    wal_due_ms: Option<u64>,
    flusher_due_ms: Option<u64>,
    has_failed: watch::Receiver<bool>,
    /// Cancelled to ask it to stop in order.
    pub stop: CancellationToken,
    has_stopped: watch::Receiver<bool>,
}

impl Host {
    pub fn new(id: BrokerId, fsync_max_ms: u64) -> Host {
        Host {
            id,
            disk: FaultyDisk::new(),
            running: None,
            frozen_until: 0,
            disk_stalls_until: 0,
            fsync_max_ms,
            process_count: 0,
            cannot_read: false,
            unreadable_at: None,
            is_doomed: false,
            votes: BTreeMap::new(),
        }
    }

    /// Starts a process. An error: its disk is not as it should be.
    pub fn start(&mut self, cluster: &Cluster, view: ClusterView) -> Result<(), String> {
        self.process_count += 1;
        self.is_doomed = false;
        self.cannot_read = false;
        let disk: Arc<dyn Disk> = match cluster.plan.sabotage {
            Sabotage::LyingDisks => Arc::new(LyingDisk(self.disk.clone())),
            _ => Arc::new(self.disk.clone()),
        };
        let config = StorageConfig {
            dir: PathBuf::from("/data"),
            wal_file_size_bytes: cluster.plan.wal_file_size_bytes,
            wal_files_max: 2,
            memory_max_bytes: cluster.plan.memory_max_bytes,
            segment_bytes: cluster.plan.segment_bytes,
            open_files_max: 16,
            reserve_bytes: Some(DISK_RESERVE_BYTES),
            ..StorageConfig::default()
        };
        let process = Process::new();
        let opened = process.enter(|| Storage::open_driven(config, disk));
        let (storage, driver) = opened
            .map_err(|error| format!("broker {} cannot open its storage: {error}", self.id))?;
        let (request_sender, request_receiver) = mpsc::unbounded_channel();
        let (failure, has_failed) = watch::channel(false);
        let failed = storage.failed();
        process.spawn(async move {
            failed.await;
            failure.send_replace(true);
        });
        let responses = Arc::new(Mutex::new(Vec::new()));
        let replicas = Replicas::new();
        let view = watch::Sender::new(view);
        let stop = CancellationToken::new();
        let (stopped, has_stopped) = watch::channel(false);
        let mut boot = Boot {
            stop: stop.clone(),
            stopped,
            broker_id: self.id,
            storage: storage.clone(),
            replicas: replicas.clone(),
            network: cluster.network.clone(),
            view: view.subscribe(),
            groups: Vec::new(),
            stagger_ms: cluster.plan.stagger_ms,
            rest_after: cluster.plan.rest_after,
            requests: request_receiver,
            responses: responses.clone(),
        };
        let mut states = BTreeMap::new();
        for group in cluster.plan.groups_of(self.id) {
            let state = watch::Sender::new(group.state());
            boot.groups.push((group.clone(), state.subscribe()));
            states.insert(group.id, state);
            if cluster.plan.sabotage == Sabotage::ForgetVotes {
                self.forget_vote(&storage, group.id);
            }
        }
        process.spawn(boot.run());
        let checked = states.keys().map(|group| (*group, Offset::ZERO)).collect();
        self.running = Some(Running {
            process,
            driver,
            _storage: storage,
            replicas,
            requests: request_sender,
            responses,
            view,
            states,
            checked,
            wal_due_ms: None,
            flusher_due_ms: None,
            has_failed,
            stop,
            has_stopped,
        });
        Ok(())
    }

    /// Puts back the vote of the start before: as if none had reached the disk since.
    fn forget_vote(&mut self, storage: &Storage, group: RaftGroupId) {
        let log = storage.open_log(group).unwrap();
        let old = self.votes.get(&group).cloned();
        if let Some(now) = log.vote() {
            self.votes.insert(group, now);
        }
        if let Some(old) = old {
            log.save_vote(old, Box::new(|_| {})).unwrap();
        }
    }

    /// From now on the process gets an error for each read of one of its segments, which it names.
    pub fn make_unreadable(&mut self, random: &mut StdRng) -> Option<String> {
        let is_segment = |path: &PathBuf| path.extension().is_some_and(|e| e == "log");
        let segments = self.disk.paths().into_iter().filter(is_segment);
        let path = segments.choose(random)?.to_str()?.to_owned();
        self.disk.inject(Fault {
            operation: Operation::Read,
            path_contains: path.clone().leak(),
            after: 0,
            error: ErrorKind::Other,
        });
        self.cannot_read = true;
        Some(path)
    }

    /// Gives the process its turn, and its disk.
    pub fn step(&mut self, now_ms: u64, random: &mut StdRng) {
        if self.cannot_read {
            self.unreadable_at = Some(now_ms);
        }
        let is_stalled = now_ms < self.disk_stalls_until;
        let Some(running) = &mut self.running else {
            return;
        };
        if now_ms < self.frozen_until {
            return;
        }
        if !is_stalled {
            running.step_disk(now_ms, self.fsync_max_ms, random);
        }
        running.process.run();
    }

    /// The process has found that it cannot go on.
    pub fn has_failed(&self) -> bool {
        let failed = |running: &Running| *running.has_failed.borrow();
        self.running.as_ref().is_some_and(failed)
    }

    pub fn is_asked_to_stop(&self) -> bool {
        let asked = |running: &Running| running.stop.is_cancelled();
        self.running.as_ref().is_some_and(asked)
    }

    /// The process was asked to stop, and has only its storage left to close.
    pub fn has_stopped(&self) -> bool {
        let stopped = |running: &Running| *running.has_stopped.borrow();
        self.running.as_ref().is_some_and(stopped)
    }

    /// Ends a process that has stopped in order.
    pub fn stop(&mut self, network: &Network) -> Result<(), String> {
        event!("broker {} has stopped", self.id);
        network.process_ends(self.id);
        let Some(running) = self.running.take() else {
            return Ok(());
        };
        let Running {
            process, driver, ..
        } = running;
        let closed = process.enter(|| driver.close());
        drop(process);
        let disk = self.disk.copy();
        self.end_process();
        self.disk = disk;
        closed.map_err(|error| format!("broker {} cannot close its storage: {error}", self.id))
    }

    /// SIGKILL: what was written stays, fsynced or not.
    pub fn kill(&mut self, network: &Network) {
        event!("broker {} is killed", self.id);
        network.process_ends(self.id);
        let disk = self.disk.copy();
        self.end_process();
        self.disk = disk;
    }

    /// The machine loses its power: of what was not fsynced, chance decides.
    pub fn lose_power(&mut self, network: &Network, random: &mut StdRng, kept: f64) {
        event!("broker {} loses its power", self.id);
        network.power_fails(self.id);
        self.disk = self.disk.crash(&mut || random.random_bool(kept));
        self.end_process();
    }

    fn end_process(&mut self) {
        self.frozen_until = 0;
        self.disk_stalls_until = 0;
        self.running = None;
    }
}

impl Running {
    fn step_disk(&mut self, now_ms: u64, fsync_max_ms: u64, random: &mut StdRng) {
        if self.driver.has_wal_work() {
            let due = *self
                .wal_due_ms
                .get_or_insert_with(|| now_ms + random.random_range(0..=fsync_max_ms));
            if due <= now_ms {
                self.wal_due_ms = None;
                let driver = &mut self.driver;
                self.process.enter(|| driver.step_wal());
            }
        }
        let due = *self
            .flusher_due_ms
            .get_or_insert_with(|| now_ms + random.random_range(1..=fsync_max_ms * 4 + 1));
        if due <= now_ms {
            self.flusher_due_ms = None;
            let driver = &mut self.driver;
            self.process.enter(|| driver.step_flusher());
        }
    }
}

/// The id of a group's replica on a broker: never used twice, as the controllers see to.
pub fn replica_id(broker_id: BrokerId) -> ReplicaId {
    ReplicaId {
        broker_id,
        incarnation: 1,
    }
}
