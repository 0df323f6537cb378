//! The coordinator of the groups of one partition of `__consumer_offsets`: calls from gateways on
//! one side, one task that loads, writes and keeps time on the other.
//!
//! Invariant: the task has one append in flight at a time, so that the log has the writes in the
//! order of the decisions; what an answer promises is in the committed log before the answer.

use std::collections::HashMap;
use std::future::Future;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use chronik_types::epoch::LeaderEpoch;
use chronik_types::id::RaftGroupId;
use chronik_types::offset::Offset;
use tokio::sync::{Notify, oneshot, watch};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use uuid::Uuid;

use super::config::GroupConfig;
use super::log::{AppendError, GroupLog, ReadError, led_epoch};
use super::offsets::Offsets;
use super::partition::{Loaded, Partition, Phase, Write, Written};
use super::records::OffsetValue;
use super::state::{
    Group, GroupError, Join, JoinRefused, Joined, MemberDescription, Now, Reply, Sync, Synced,
};
use crate::replica::Leadership;

pub use super::partition::{Commit, Membership};

/// Bytes asked from the log at a time while loading.
const LOAD_CHUNK_MAX_BYTES: usize = 4 * 1024 * 1024;
/// Pause after a failed load.
const LOAD_RETRY_INTERVAL: Duration = Duration::from_millis(500);
/// Longest sleep of the driver; it then looks at the deadlines again.
const SLEEP_MAX: Duration = Duration::from_secs(3_600);

/// A group as it is described to operators.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GroupDescription {
    pub state: &'static str,
    pub protocol_type: String,
    pub protocol_name: String,
    pub members: Vec<MemberDescription>,
}

/// A group in a list.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GroupListing {
    pub consumer_group: String,
    pub protocol_type: String,
    pub state: &'static str,
}

/// One partition's offset of a group, where there is one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FetchedOffset {
    pub topic: String,
    pub partition: i32,
    pub value: Option<OffsetValue>,
}

/// Serves the groups of one partition while its replica leads. Its task ends with `stop`.
pub struct Coordinator {
    shared: Arc<Shared>,
    stop: CancellationToken,
}

struct Shared {
    raft_group_id: RaftGroupId,
    config: Arc<GroupConfig>,
    partition: Mutex<Partition>,
    /// Something was decided that the task must look at.
    wake: Notify,
    started: Instant,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Partition> {
        self.partition
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    fn now(&self) -> Now {
        let wall = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap_or_default();
        Now {
            moment: self.started.elapsed(),
            wall_ms: i64::try_from(wall.as_millis()).unwrap_or(i64::MAX),
        }
    }
}

impl Coordinator {
    /// Starts the task of the partition whose replica is `log`.
    pub fn start<L: GroupLog>(
        raft_group_id: RaftGroupId,
        log: L,
        config: Arc<GroupConfig>,
        tasks: &TaskTracker,
        stop: CancellationToken,
    ) -> Coordinator {
        let shared = Arc::new(Shared {
            raft_group_id,
            config: config.clone(),
            partition: Mutex::new(Partition::new(config)),
            wake: Notify::new(),
            started: Instant::now(),
        });
        let leadership = log.leadership();
        let driver = Driver {
            shared: shared.clone(),
            log,
            stop: stop.clone(),
        };
        tasks.spawn(driver.run(leadership));
        Coordinator { shared, stop }
    }

    /// Runs `step` on the partition if it is led here, and wakes the task.
    fn with_leader<T>(
        &self,
        step: impl FnOnce(&mut Partition, Now) -> Result<T, GroupError>,
    ) -> Result<T, GroupError> {
        let mut partition = self.shared.lock();
        partition.check_leading()?;
        let result = step(&mut partition, self.shared.now());
        drop(partition);
        self.shared.wake.notify_one();
        result
    }

    /// Waits until the group's rebalance has ended.
    pub async fn join(&self, group: &str, request: Join) -> Result<Joined, JoinRefused> {
        let refused = |error| JoinRefused {
            error,
            member_id: String::new(),
        };
        let timeouts =
            self.shared.config.session_timeout_min_ms..=self.shared.config.session_timeout_max_ms;
        let asked_ms = u64::try_from(request.session_timeout.as_millis()).unwrap_or(u64::MAX);
        check_group_id(group).map_err(refused)?;
        if !timeouts.contains(&asked_ms) {
            return Err(refused(GroupError::InvalidSessionTimeout));
        }
        let (waiter, reply) = oneshot::channel();
        self.with_leader(|partition, now| {
            partition.join(now, group, request, waiter);
            Ok(())
        })
        .map_err(refused)?;
        match reply.await {
            Ok(Reply::Join(outcome)) => outcome,
            Ok(Reply::Sync(_)) | Err(_) => Err(refused(GroupError::NotCoordinator)),
        }
    }

    /// Waits until the leader's assignments are in the log.
    pub async fn sync(&self, group: &str, request: Sync) -> Result<Synced, GroupError> {
        check_group_id(group)?;
        let (waiter, reply) = oneshot::channel();
        self.with_leader(|partition, now| {
            partition.sync(now, group, request, waiter);
            Ok(())
        })?;
        match reply.await {
            Ok(Reply::Sync(outcome)) => outcome,
            Ok(Reply::Join(_)) | Err(_) => Err(GroupError::NotCoordinator),
        }
    }

    pub fn heartbeat(&self, group: &str, who: &Membership) -> Result<(), GroupError> {
        check_group_id(group)?;
        let mut partition = self.shared.lock();
        partition.check_leading()?;
        partition.heartbeat(self.shared.now(), group, who)
    }

    /// One outcome per member, once the log has what they mean.
    pub async fn leave(
        &self,
        group: &str,
        members: &[(String, Option<String>)],
    ) -> Result<Vec<Result<(), GroupError>>, GroupError> {
        check_group_id(group)?;
        let (done, written) = oneshot::channel();
        let outcomes =
            self.with_leader(|partition, now| partition.leave(now, group, members, done))?;
        flatten(written.await)?;
        Ok(outcomes)
    }

    /// One outcome per offset, once the log has the commit.
    pub async fn commit(
        &self,
        group: &str,
        who: &Membership,
        offsets: Vec<Commit>,
        retention_ms: Option<i64>,
    ) -> Result<Vec<Result<(), GroupError>>, GroupError> {
        check_length(group)?;
        let queued = self.with_leader(|partition, now| {
            partition.commit(now, group, who, offsets, retention_ms)
        })?;
        let mut written = Vec::with_capacity(queued.written.len());
        for write in queued.written {
            written.push(flatten(write.await));
        }
        let outcome = |in_write: Result<usize, GroupError>| {
            written
                .get(in_write?)
                .copied()
                .unwrap_or(Err(GroupError::TimedOut))
        };
        Ok(queued.outcomes.into_iter().map(outcome).collect())
    }

    /// The offsets asked for, or all (`None`). A group that does not exist has none.
    pub fn fetch_offsets(
        &self,
        group: &str,
        topics: Option<&[(String, Vec<i32>)]>,
    ) -> Result<Vec<FetchedOffset>, GroupError> {
        let partition = self.shared.lock();
        partition.check_leading()?;
        let none = Offsets::default();
        let offsets = partition.get(group).map_or(&none, |entry| &entry.offsets);
        let fetched = |topic: &str, partition, value| FetchedOffset {
            topic: topic.to_owned(),
            partition,
            value,
        };
        Ok(match topics {
            None => offsets
                .iter()
                .map(|(topic, at, committed)| fetched(topic, at, Some(committed.value.clone())))
                .collect(),
            Some(topics) => topics
                .iter()
                .flat_map(|(topic, partitions)| {
                    partitions
                        .iter()
                        .map(move |at| fetched(topic, *at, offsets.get(topic, *at).cloned()))
                })
                .collect(),
        })
    }

    pub fn describe(&self, group: &str) -> Result<GroupDescription, GroupError> {
        let partition = self.shared.lock();
        partition.check_leading()?;
        let group = &partition.get(group).ok_or(GroupError::UnknownGroup)?.group;
        Ok(GroupDescription {
            state: group.state().name(),
            protocol_type: group.protocol_type().unwrap_or_default().to_owned(),
            protocol_name: group.protocol_name().unwrap_or_default().to_owned(),
            members: group.describe(),
        })
    }

    pub fn list(&self) -> Result<Vec<GroupListing>, GroupError> {
        let partition = self.shared.lock();
        partition.check_leading()?;
        let listing = |id: &str, group: &Group<_>| GroupListing {
            consumer_group: id.to_owned(),
            protocol_type: group.protocol_type().unwrap_or_default().to_owned(),
            state: group.state().name(),
        };
        Ok(partition
            .iter()
            .map(|(id, entry)| listing(id, &entry.group))
            .collect())
    }

    /// Whether groups are served from here now.
    pub fn is_leading(&self) -> bool {
        self.shared.lock().phase() == Phase::Leading
    }

    fn topics_removed(&self, topics: &[(Uuid, Arc<str>)]) {
        self.shared.lock().topics_removed(topics);
        self.shared.wake.notify_one();
    }
}

impl Drop for Coordinator {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

/// A write whose sender was dropped went down with the leadership before it was sent.
fn flatten(written: Result<Written, oneshot::error::RecvError>) -> Written {
    written.unwrap_or(Err(GroupError::NotCoordinator))
}

/// Membership needs a name; offsets may be kept under the empty one, as in Kafka.
fn check_group_id(group: &str) -> Result<(), GroupError> {
    if group.is_empty() {
        Err(GroupError::InvalidGroup)
    } else {
        check_length(group)
    }
}

fn check_length(group: &str) -> Result<(), GroupError> {
    let fits = group.len() <= super::records::STRING_MAX_BYTES;
    if fits {
        Ok(())
    } else {
        Err(GroupError::InvalidGroup)
    }
}

/// The task of one partition.
struct Driver<L> {
    shared: Arc<Shared>,
    log: L,
    stop: CancellationToken,
}

struct InFlight<'a> {
    writes: Vec<Write>,
    append: Pin<Box<dyn Future<Output = Appended> + Send + 'a>>,
}

/// What became of an append, and committed batches before it that nobody knew to be there.
struct Appended {
    outcome: Result<Offset, GroupError>,
    unknown_before: Result<Vec<Bytes>, ReadError>,
}

impl<L: GroupLog> Driver<L> {
    async fn run(self, mut leadership: watch::Receiver<Leadership>) {
        loop {
            let led = led_epoch(&leadership.borrow_and_update());
            match led {
                Some(epoch) => self.serve(epoch, &mut leadership).await,
                None => tokio::select! {
                    () = self.stop.cancelled() => {}
                    _ = leadership.changed() => {}
                },
            }
            self.shared.lock().step_down();
            let replica_is_gone = leadership.has_changed().is_err();
            if self.stop.is_cancelled() || replica_is_gone {
                return;
            }
        }
    }

    /// Resolves when the replica no longer leads in `epoch`, is gone, or nobody wants it to serve.
    async fn leadership_lost(
        &self,
        leadership: &mut watch::Receiver<Leadership>,
        epoch: LeaderEpoch,
    ) {
        tokio::select! {
            () = self.stop.cancelled() => {}
            // An error says that the replica is gone: lost all the same.
            _ = leadership.wait_for(|now| led_epoch(now) != Some(epoch)) => {}
        }
    }

    /// Loads and serves until the leadership of `epoch` is over, or the log must be read again.
    async fn serve(&self, epoch: LeaderEpoch, leadership: &mut watch::Receiver<Leadership>) {
        let group = self.shared.raft_group_id;
        self.shared.lock().begin_loading();
        let began = Instant::now();
        loop {
            let loaded = tokio::select! {
                biased;
                () = self.leadership_lost(leadership, epoch) => return,
                loaded = self.load() => loaded,
            };
            match loaded {
                Ok((loaded, next)) => {
                    tracing::info!(
                        raft_group_id = %group,
                        leader_epoch = %epoch,
                        groups = loaded.group_count(),
                        elapsed_ms = began.elapsed().as_millis() as u64,
                        "coordinating consumer groups"
                    );
                    self.shared.lock().become_leader(loaded, self.shared.now());
                    self.lead(epoch, next, leadership).await;
                    tracing::info!(raft_group_id = %group, "no longer coordinating consumer groups");
                    return;
                }
                Err(error) => {
                    tracing::error!(raft_group_id = %group, %error, "consumer groups cannot be loaded");
                }
            }
            tokio::select! {
                biased;
                () = self.leadership_lost(leadership, epoch) => return,
                () = tokio::time::sleep(LOAD_RETRY_INTERVAL) => {}
            }
        }
    }

    /// All groups of the log, and the offset up to which it was read.
    async fn load(&self) -> Result<(Loaded, Offset), ReadError> {
        let mut loaded = Loaded::default();
        let end = self.log.high_watermark();
        let mut next = self.log.log_start_offset();
        while next < end {
            let batches = self.log.read_committed(next, LOAD_CHUNK_MAX_BYTES).await?;
            let before = next;
            for batch in each_batch(&batches) {
                let batch = batch?;
                next = loaded
                    .replay(&batch)
                    .map_err(|error| unreadable(before, &error))?;
            }
            if next <= before {
                return Err(ReadError(format!(
                    "nothing at offset {before}, expected up to {end}"
                )));
            }
        }
        Ok((loaded, next))
    }

    async fn lead(
        &self,
        epoch: LeaderEpoch,
        mut next: Offset,
        leadership: &mut watch::Receiver<Leadership>,
    ) {
        let mut in_flight: Option<InFlight<'_>> = None;
        loop {
            let sleep = {
                let mut partition = self.shared.lock();
                let now = self.shared.now();
                partition.on_time(now);
                if in_flight.is_none()
                    && let Some((records, writes)) = partition.take_writes(now)
                {
                    let append = Box::pin(self.append(epoch, records, next));
                    in_flight = Some(InFlight { writes, append });
                }
                partition
                    .next_deadline()
                    .saturating_sub(now.moment)
                    .min(SLEEP_MAX)
            };
            let appended = tokio::select! {
                biased;
                () = self.leadership_lost(leadership, epoch) => break,
                appended = outcome_of(&mut in_flight) => appended,
                () = self.shared.wake.notified() => continue,
                () = tokio::time::sleep(sleep) => continue,
            };
            let Some(done) = in_flight.take() else {
                continue;
            };
            match self.finish_append(done.writes, appended, next) {
                Ok(reached) => next = reached,
                Err(error) => {
                    let group = self.shared.raft_group_id;
                    tracing::error!(raft_group_id = %group, %error, "consumer groups load again");
                    return;
                }
            }
        }
        // Nobody will tell what becomes of it.
        if let Some(left) = in_flight {
            let mut partition = self.shared.lock();
            partition.written(self.shared.now(), left.writes, Err(GroupError::TimedOut));
        }
    }

    async fn append(&self, epoch: LeaderEpoch, records: Bytes, next: Offset) -> Appended {
        let append = self.log.append(epoch, records);
        let outcome = tokio::time::timeout(self.shared.config.write_timeout(), append).await;
        let group = self.shared.raft_group_id;
        let outcome = outcome
            .unwrap_or(Err(AppendError::Unknown))
            .map_err(|error| match error {
                AppendError::NotLeader => GroupError::NotCoordinator,
                AppendError::Unknown => {
                    tracing::warn!(raft_group_id = %group, "outcome of a write is unknown");
                    GroupError::TimedOut
                }
                AppendError::Refused(why) => {
                    tracing::warn!(raft_group_id = %group, why, "log refused a write");
                    GroupError::TimedOut
                }
            });
        let unknown_before = match outcome {
            Ok(base) if base > next => self.read_between(next, base).await,
            _ => Ok(Vec::new()),
        };
        Appended {
            outcome,
            unknown_before,
        }
    }

    async fn read_between(&self, from: Offset, until: Offset) -> Result<Vec<Bytes>, ReadError> {
        let mut found = Vec::new();
        let mut next = from;
        while next < until {
            let before = next;
            for batch in each_batch(&self.log.read_committed(next, LOAD_CHUNK_MAX_BYTES).await?) {
                let batch = batch?;
                let header = chronik_types::record_batch::BatchHeader::parse(&batch)
                    .map_err(|error| unreadable(before, &error))?;
                if header.base_offset >= until {
                    return Ok(found);
                }
                next = header.next_offset();
                found.push(batch);
            }
            if next <= before {
                return Err(ReadError(format!("nothing at offset {before}")));
            }
        }
        Ok(found)
    }

    /// Hands the outcome to those who wait. The offset up to which the groups now know the log.
    fn finish_append(
        &self,
        writes: Vec<Write>,
        appended: Appended,
        next: Offset,
    ) -> Result<Offset, ReadError> {
        let now = self.shared.now();
        let mut partition = self.shared.lock();
        let records: i64 = writes.iter().map(Write::record_count).sum();
        let caught_up = appended.unknown_before.and_then(|batches| {
            for batch in &batches {
                partition
                    .catch_up(batch, now)
                    .map_err(|error| unreadable(next, &error))?;
            }
            Ok(())
        });
        partition.written(now, writes, appended.outcome);
        caught_up?;
        Ok(appended.outcome.map_or(next, |base| base.plus(records)))
    }
}

/// Pending for ever while nothing is in flight.
async fn outcome_of(in_flight: &mut Option<InFlight<'_>>) -> Appended {
    match in_flight {
        Some(in_flight) => in_flight.append.as_mut().await,
        None => std::future::pending().await,
    }
}

fn unreadable(offset: Offset, error: &dyn std::error::Error) -> ReadError {
    ReadError(format!("after offset {offset}: {error}"))
}

/// Single batches of pieces that may hold several, back to back.
fn each_batch(pieces: &[Bytes]) -> impl Iterator<Item = Result<Bytes, ReadError>> {
    pieces.iter().flat_map(|piece| {
        chronik_types::record_batch::batches(piece).map(move |batch| match batch {
            Ok((at, header)) => Ok(piece.slice(at..at + header.size_bytes())),
            Err(error) => Err(ReadError(error.to_string())),
        })
    })
}

/// The coordinators that run in this broker, by their partition. Cheap to clone.
#[derive(Clone)]
pub struct Coordinators {
    inner: Arc<CoordinatorsInner>,
}

struct CoordinatorsInner {
    config: Arc<GroupConfig>,
    by_group: Mutex<HashMap<RaftGroupId, Arc<Coordinator>>>,
    tasks: TaskTracker,
    stop: CancellationToken,
}

impl Coordinators {
    pub fn new(config: GroupConfig, stop: CancellationToken) -> Coordinators {
        Coordinators {
            inner: Arc::new(CoordinatorsInner {
                config: Arc::new(config),
                by_group: Mutex::default(),
                tasks: TaskTracker::new(),
                stop,
            }),
        }
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<RaftGroupId, Arc<Coordinator>>> {
        self.inner
            .by_group
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    pub fn get(&self, group: RaftGroupId) -> Option<Arc<Coordinator>> {
        self.lock().get(&group).cloned()
    }

    pub fn all(&self) -> Vec<Arc<Coordinator>> {
        self.lock().values().cloned().collect()
    }

    /// Starts a coordinator over a partition's log; replaces the one that was there. Must be called
    /// within a Tokio runtime.
    pub fn start<L: GroupLog>(&self, group: RaftGroupId, log: L) {
        let stop = self.inner.stop.child_token();
        let config = self.inner.config.clone();
        let coordinator = Coordinator::start(group, log, config, &self.inner.tasks, stop);
        if let Some(replaced) = self.lock().insert(group, Arc::new(coordinator)) {
            replaced.stop.cancel();
        }
    }

    /// Stops the coordinators whose partition `keep` does not want.
    pub fn retain(&self, keep: impl Fn(RaftGroupId) -> bool) {
        self.lock().retain(|group, coordinator| {
            let keep = keep(*group);
            if !keep {
                coordinator.stop.cancel();
            }
            keep
        });
    }

    /// Topics are gone from the cluster: so are the offsets committed for them.
    pub fn topics_removed(&self, topics: &[(Uuid, Arc<str>)]) {
        for coordinator in self.all() {
            coordinator.topics_removed(topics);
        }
    }

    /// Stops all, and waits for their tasks.
    pub async fn shutdown(&self) {
        self.inner.stop.cancel();
        self.inner.tasks.close();
        self.inner.tasks.wait().await;
        self.lock().clear();
    }
}
