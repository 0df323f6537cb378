//! A partition of three replicas in one process: real Raft, real storage on disks in memory that
//! can lose their power, and a network that can be cut.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use chronik_storage::disk::faulty::FaultyDisk;
use chronik_storage::{SegmentFile, Storage, StorageConfig};
use chronik_types::id::{BrokerId, RaftGroupId, ReplicaId};
use futures::stream::StreamExt;
use openraft::async_runtime::WatchReceiver;
use openraft::errors::{RPCError, RaftError, ReplicationClosed, StreamingError, Unreachable};
use openraft::network::{RPCOption, RaftNetworkFactory, RaftNetworkV2};
use openraft::raft::{
    AppendEntriesRequest, AppendEntriesResponse, SnapshotResponse, StreamAppendError,
    TransferLeaderRequest, TransferLeaderResponse, VoteRequest, VoteResponse,
};
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, timeout};
use tokio_stream::wrappers::ReceiverStream;

use super::copy::Fetched;
use super::engine::RaftHandle;
use super::queue::{Acks, Appended, ProduceItem};
use super::raft_config::{RaftTiming, TypeConfig, Vote, raft_config};
use super::{AppendError, Leadership, LogConfig, PartitionState, Replica, ReplicaOptions, Upkeep};
use crate::peers::RaftEndpoint;
use crate::test_wait::wait_for;

/// Longest that anything in these tests may take.
pub const LIMIT: Duration = Duration::from_secs(20);

type Snapshot = openraft::alias::SnapshotOf<TypeConfig, Bytes>;

/// Delivers Raft's messages between the replicas, except across a cut.
#[derive(Clone, Default)]
pub struct Router(Arc<Mutex<Routes>>);

#[derive(Default)]
struct Routes {
    replicas: HashMap<ReplicaId, Arc<Replica>>,
    storages: HashMap<ReplicaId, Storage>,
    cut: HashSet<ReplicaId>,
}

impl Router {
    /// The replica at `to`, if there is a way.
    fn replica(
        &self,
        from: ReplicaId,
        to: ReplicaId,
    ) -> Result<Arc<Replica>, Unreachable<TypeConfig>> {
        let routes = self.0.lock().unwrap();
        let is_cut = routes.cut.contains(&from) || routes.cut.contains(&to);
        match routes.replicas.get(&to) {
            Some(replica) if !is_cut => Ok(replica.clone()),
            _ => Err(Unreachable::from_string("no way there")),
        }
    }

    async fn find(
        &self,
        from: ReplicaId,
        to: ReplicaId,
    ) -> Result<RaftHandle, Unreachable<TypeConfig>> {
        let woken = self.replica(from, to)?.wake().await;
        woken.map_err(|error| Unreachable::from_string(error.to_string()))
    }

    fn remove(&self, replica: ReplicaId) {
        let mut routes = self.0.lock().unwrap();
        routes.replicas.remove(&replica);
        routes.storages.remove(&replica);
    }

    pub fn cut(&self, replica: ReplicaId) {
        self.0.lock().unwrap().cut.insert(replica);
    }

    pub fn heal(&self) {
        self.0.lock().unwrap().cut.clear();
    }
}

#[derive(Clone)]
struct Factory {
    router: Router,
    from: ReplicaId,
}

struct Connection {
    router: Router,
    from: ReplicaId,
    to: ReplicaId,
}

impl RaftNetworkFactory<TypeConfig> for Factory {
    type Network = Connection;

    async fn new_client(&mut self, target: ReplicaId, _node: &()) -> Connection {
        Connection {
            router: self.router.clone(),
            from: self.from,
            to: target,
        }
    }
}

fn remote(error: RaftError<TypeConfig>) -> RPCError<TypeConfig> {
    RPCError::Unreachable(Unreachable::from_string(error.to_string()))
}

impl RaftNetworkV2<TypeConfig> for Connection {
    type SnapshotData = Bytes;

    async fn append_entries(
        &mut self,
        rpc: AppendEntriesRequest<TypeConfig>,
        _option: RPCOption,
    ) -> Result<AppendEntriesResponse<TypeConfig>, RPCError<TypeConfig>> {
        let replica = self.router.replica(self.from, self.to)?;
        let unreachable = |why| RPCError::Unreachable(Unreachable::from_string(why));
        // The session ends with this call, however that ends.
        let (session, requests) = mpsc::channel(1);
        let _ = session.try_send(rpc);
        let requests = ReceiverStream::new(requests).boxed();
        let answer = replica.append_stream(requests).next().await;
        let response = match answer.ok_or_else(|| unreachable("no answer".to_owned()))? {
            Ok(Ok(_)) => AppendEntriesResponse::Success,
            Ok(Err(StreamAppendError::HigherVote(vote))) => AppendEntriesResponse::HigherVote(vote),
            Ok(Err(StreamAppendError::Conflict(_))) => AppendEntriesResponse::Conflict,
            Err(stopped) => return Err(unreachable(stopped.to_string())),
        };
        // The answer crosses the network as well.
        self.router.replica(self.from, self.to)?;
        Ok(response)
    }

    async fn vote(
        &mut self,
        rpc: VoteRequest<TypeConfig>,
        _option: RPCOption,
    ) -> Result<VoteResponse<TypeConfig>, RPCError<TypeConfig>> {
        let replica = self.router.replica(self.from, self.to)?;
        let answer = RaftEndpoint::vote(&*replica, rpc, false).await;
        answer.map_err(|stopped| RPCError::Unreachable(Unreachable::new(&stopped)))
    }

    async fn pre_vote(
        &mut self,
        rpc: VoteRequest<TypeConfig>,
        _option: RPCOption,
    ) -> Result<VoteResponse<TypeConfig>, RPCError<TypeConfig>> {
        let raft = self.router.find(self.from, self.to).await?;
        raft.pre_vote(rpc).await.map_err(remote)
    }

    async fn full_snapshot(
        &mut self,
        vote: Vote,
        snapshot: Snapshot,
        _cancel: impl Future<Output = ReplicationClosed> + Send + 'static,
        _option: RPCOption,
    ) -> Result<SnapshotResponse<TypeConfig>, StreamingError<TypeConfig>> {
        let unreachable = |why: String| StreamingError::Unreachable(Unreachable::from_string(why));
        let find = |from, to| {
            self.router
                .replica(from, to)
                .map_err(StreamingError::Unreachable)
        };
        let (follower, leader) = (find(self.from, self.to)?, find(self.to, self.from)?);
        if follower.has_entry(&snapshot.meta.last_log_id.unwrap()) {
            let vote = follower.vote();
            return Ok(SnapshotResponse { vote });
        }
        let storage = self
            .router
            .0
            .lock()
            .unwrap()
            .storages
            .get(&self.to)
            .cloned();
        let storage = storage.ok_or_else(|| unreachable("it is gone".to_owned()))?;
        let copied = copy_log(&leader, &follower, storage, vote).await;
        Err(unreachable(format!("a copy was made: {copied:?}")))
    }

    async fn transfer_leader(
        &mut self,
        req: TransferLeaderRequest<TypeConfig>,
        _option: RPCOption,
    ) -> Result<TransferLeaderResponse<TypeConfig>, RPCError<TypeConfig>> {
        let raft = self.router.find(self.from, self.to).await?;
        raft.handle_transfer_leader(req)
            .await
            .map_err(|fatal| remote(RaftError::Fatal(fatal)))
    }
}

/// Copies the leader's log to the follower, as `catch_up` does over the network.
pub async fn copy_log(
    leader: &Replica,
    follower: &Replica,
    storage: Storage,
    vote: Vote,
) -> Result<(), String> {
    let failed = |error: &dyn std::fmt::Display| error.to_string();
    let offer = leader.offer_copy().await.map_err(|e| failed(&e))?;
    let group = follower.group_id();
    let copied = tokio::task::spawn_blocking(move || {
        let manifest = offer.export.manifest().clone();
        let installer = storage.install(group, manifest.clone())?;
        for segment in 0..manifest.segments.len() {
            for file in [SegmentFile::Log, SegmentFile::Sidecar] {
                loop {
                    let position = installer.received(segment, file);
                    let bytes = offer.export.read_chunk(segment, file, position, 1000)?;
                    if bytes.is_empty() {
                        break;
                    }
                    installer.write(segment, file, position, &bytes)?;
                }
            }
            installer.check_segment(segment)?;
        }
        Ok::<_, chronik_storage::StorageError>((installer, offer))
    });
    let (installer, offer) = copied
        .await
        .map_err(|e| failed(&e))?
        .map_err(|e| failed(&e))?;
    let index = offer.last_log_id.index;
    let fetched = Fetched::new(installer, &offer.state, index).map_err(|e| failed(&e))?;
    let installed = follower.install_copy(vote, fetched).await;
    installed.map_err(|refused| failed(&refused.error))
}

/// One broker: a disk, and a replica while it runs.
pub struct Node {
    pub id: ReplicaId,
    disk: FaultyDisk,
    storage: Option<Storage>,
    replica: Option<Arc<Replica>>,
}

pub struct Cluster {
    pub nodes: Vec<Node>,
    pub router: Router,
    pub state: watch::Sender<PartitionState>,
    timing: RaftTiming,
}

fn timing() -> RaftTiming {
    RaftTiming {
        heartbeat_interval: Duration::from_millis(100),
        election_timeout_min: Duration::from_millis(300),
        election_timeout_max: Duration::from_millis(600),
    }
}

impl Cluster {
    /// `count` replicas with the given `min.insync.replicas`, the first one leading.
    pub async fn start(count: usize, min_insync_replicas: usize) -> Cluster {
        Self::start_with(count, min_insync_replicas, timing()).await
    }

    pub async fn start_with(
        count: usize,
        min_insync_replicas: usize,
        timing: RaftTiming,
    ) -> Cluster {
        let id = |n: usize| ReplicaId {
            broker_id: BrokerId(n as i32 + 1),
            incarnation: 7,
        };
        let state = PartitionState {
            isr: (0..count).map(|n| id(n).broker_id).collect(),
            min_insync_replicas,
            max_message_bytes: 2 * 1024 * 1024,
            log_append_time: false,
            log: LogConfig {
                segment_bytes: 1 << 30,
                ..LogConfig::default()
            },
        };
        let nodes = (0..count)
            .map(|n| Node {
                id: id(n),
                disk: FaultyDisk::new(),
                storage: None,
                replica: None,
            })
            .collect();
        let mut cluster = Cluster {
            nodes,
            router: Router::default(),
            state: watch::Sender::new(state),
            timing,
        };
        let voters: BTreeSet<ReplicaId> = cluster.nodes.iter().map(|node| node.id).collect();
        for n in 0..count {
            cluster.open(n).await;
            cluster.replica(n).initialize(voters.clone()).await.unwrap();
            // It may be said twice.
            cluster.replica(n).initialize(voters.clone()).await.unwrap();
        }
        cluster.elect(0).await;
        cluster
    }

    pub async fn open(&mut self, n: usize) {
        let node = &mut self.nodes[n];
        let config = StorageConfig {
            dir: PathBuf::from("/data"),
            wal_file_size_bytes: 4 << 20,
            ..StorageConfig::default()
        };
        let storage = Storage::open(config, Arc::new(node.disk.clone())).unwrap();
        let options = ReplicaOptions {
            replica_id: node.id,
            log: storage.open_log(RaftGroupId(1)).unwrap(),
            network: Factory {
                router: self.router.clone(),
                from: node.id,
            },
            raft_config: raft_config(self.timing),
            state: self.state.subscribe(),
            upkeep: Upkeep::default(),
        };
        let replica = Replica::open_at_rest(options).unwrap();
        {
            let mut routes = self.router.0.lock().unwrap();
            routes.replicas.insert(node.id, replica.clone());
            routes.storages.insert(node.id, storage.clone());
        }
        node.storage = Some(storage);
        node.replica = Some(replica);
    }

    /// The node stops, and comes back with an empty disk.
    pub async fn lose_disk(&mut self, n: usize) {
        self.crash(n).await;
        self.nodes[n].disk = FaultyDisk::new();
    }

    pub fn storage(&self, n: usize) -> Storage {
        self.nodes[n].storage.clone().unwrap()
    }

    /// How many bytes the node's disk has; None: as many as are wanted.
    pub fn set_disk_capacity(&self, n: usize, bytes: Option<u64>) {
        self.nodes[n].disk.set_capacity(bytes);
    }

    /// The node's power fails after so many more changes of its disk.
    pub fn fail_power_after(&self, n: usize, changes: usize) {
        self.nodes[n].disk.fail_power_after(changes);
    }

    /// How often the node has changed its disk.
    pub fn disk_changes(&self, n: usize) -> usize {
        self.nodes[n].disk.changing_calls()
    }

    pub fn replica(&self, n: usize) -> &Arc<Replica> {
        self.nodes[n].replica.as_ref().unwrap()
    }

    /// Stops a node in order.
    pub async fn stop(&mut self, n: usize) {
        let node = &mut self.nodes[n];
        self.router.remove(node.id);
        if let Some(replica) = node.replica.take() {
            replica.shutdown().await;
        }
        if let Some(storage) = node.storage.take() {
            tokio::task::spawn_blocking(move || storage.close().unwrap())
                .await
                .unwrap();
        }
    }

    /// The node's power fails: what was not fsynced is gone.
    pub async fn crash(&mut self, n: usize) {
        let node = &mut self.nodes[n];
        self.router.remove(node.id);
        node.disk = node.disk.crash(&mut || false);
        if let Some(replica) = node.replica.take() {
            replica.shutdown().await;
        }
        if let Some(storage) = node.storage.take() {
            tokio::task::spawn_blocking(move || drop(storage))
                .await
                .unwrap();
        }
    }

    /// Lets `n` campaign until it leads and is ready. Others' leases may refuse it at first.
    pub async fn elect(&self, n: usize) {
        let replica = self.replica(n);
        let mut leadership = replica.leadership();
        let deadline = Instant::now() + LIMIT;
        loop {
            // One that leads already and is slow to be ready must not unseat itself.
            let leads = leadership.borrow().is_leader;
            if !leads {
                replica.campaign(false).await.unwrap();
            }
            let ready = leadership.wait_for(|l| l.ready);
            if let Ok(ready) = timeout(Duration::from_millis(700), ready).await {
                ready.unwrap();
                return;
            }
            assert!(
                Instant::now() < deadline,
                "{:?} is not elected",
                replica.replica_id()
            );
        }
    }

    /// Waits for the replica's high watermark.
    pub async fn wait_for_watermark(&self, n: usize, offset: i64) {
        let replica = self.replica(n);
        let notify = Arc::new(tokio::sync::Notify::new());
        let _registered = replica.watermark().register(notify.clone());
        let reached = async {
            while replica.high_watermark().0 < offset {
                notify.notified().await;
            }
        };
        timeout(LIMIT, reached).await.unwrap_or_else(|_| {
            panic!(
                "{:?} is at {}",
                replica.replica_id(),
                replica.high_watermark()
            )
        });
    }

    /// Waits until every follower of the leader `n` has its whole log, and so could win an election.
    pub async fn wait_for_followers(&self, n: usize) {
        let replica = self.replica(n);
        let mut metrics = replica.raft().unwrap().data_metrics();
        let behind = || {
            let progress = replica.progress().expect("it leads");
            let last = progress.last_index;
            progress.followers.iter().any(|f| f.matched != last)
        };
        let caught_up = async {
            while behind() {
                metrics.changed().await.unwrap();
                metrics.borrow_and_update();
            }
        };
        timeout(LIMIT, caught_up).await.unwrap();
    }

    /// Waits until the lease of the leader `n` has run out; only time ends it.
    pub async fn wait_for_lease_end(&self, n: usize) {
        let raft = self.replica(n).raft().unwrap();
        let has_ended = async || {
            let read = raft.ensure_linearizable(openraft::ReadPolicy::LeaseRead);
            read.await.is_err().then_some(())
        };
        wait_for("the lease ends", has_ended).await;
    }

    pub async fn wait_for_leadership(&self, n: usize, wanted: impl FnMut(&Leadership) -> bool) {
        let mut leadership = self.replica(n).leadership();
        timeout(LIMIT, leadership.wait_for(wanted))
            .await
            .unwrap()
            .unwrap();
    }

    pub async fn produce(
        &self,
        n: usize,
        records: Vec<u8>,
        acks: Acks,
        limit: Duration,
    ) -> Result<Appended, AppendError> {
        let deadline = Instant::now() + limit;
        let records = Bytes::from(records);
        let item = ProduceItem {
            records,
            acks,
            deadline,
            leader_epoch: None,
            trace: None,
        };
        self.replica(n).enqueue(item)?.until(deadline).await
    }

    /// What the leader says for good to records that it does not take.
    pub async fn refusal(&self, n: usize, records: Vec<u8>) -> AppendError {
        let refusal = async || {
            let answer = self.produce(n, records.clone(), Acks::All, LIMIT).await;
            match answer.unwrap_err() {
                // On a busy machine a majority may not answer in time.
                AppendError::NotLeader { leader: None } => None,
                refusal => Some(refusal),
            }
        };
        wait_for("the leader refuses for good", refusal).await
    }

    /// Produces with acks=all, as a client does: where the replica no longer leads, which on a busy
    /// machine may be at any time, nothing was appended, and it leads again first. The base offset.
    pub async fn ack(&self, n: usize, records: Vec<u8>) -> i64 {
        let appended = async || {
            let answer = self.produce(n, records.clone(), Acks::All, LIMIT).await;
            if let Err(AppendError::NotLeader { .. }) = answer {
                self.elect(n).await;
                return None;
            }
            Some(answer.unwrap().base_offset.0)
        };
        wait_for("the leader takes the records", appended).await
    }

    /// All committed batches of a replica.
    pub async fn read_all(&self, n: usize) -> Vec<Bytes> {
        let replica = self.replica(n);
        let mut out = Vec::new();
        let mut from = replica.log_start_offset();
        loop {
            let batches = replica.read_committed_from(from, 64 * 1024).await.unwrap();
            let Some(last) = batches.last() else {
                return out;
            };
            let headers = chronik_types::record_batch::batches(last);
            from = headers.last().unwrap().unwrap().1.next_offset();
            out.extend(batches);
        }
    }

    pub async fn stop_all(&mut self) {
        for n in 0..self.nodes.len() {
            self.stop(n).await;
        }
    }
}
