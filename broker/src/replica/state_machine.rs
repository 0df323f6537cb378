//! Applies committed entries: high watermark, producer state, and who the voters are.
//!
//! Invariant: applied in log order on every replica, from the log alone. The state is saved with
//! the log index that it belongs to, so a restart replays only what came after.

use std::collections::BTreeSet;
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use chronik_storage::{LogEntry, PartitionLog, StorageError};
use chronik_types::id::ReplicaId;
use chronik_types::offset::Offset;
use chronik_types::record_batch;
use futures::{Stream, StreamExt};
use openraft::entry::EntryPayload;
use openraft::storage::{EntryResponder, RaftSnapshotBuilder, RaftStateMachine};
use tokio::sync::watch;
use tokio_util::sync::DropGuard;

use super::Leadership;
use super::applied::Applied;
use super::codec;
use super::copy::Copies;
use super::error::OpenError;
use super::growth::Growth;
use super::log_store;
use super::producer_state::ProducerTable;
use super::purge::{PurgeMarks, Upkeep};
use super::raft_config::{
    AppendResult, Batches, Control, Entry, EntryData, LogId, Membership, PartitionSnapshot,
    SnapshotMeta, StoredMembership, TypeConfig,
};
use super::rebuild::Rebuilding;
use super::traces::Traces;
use super::watermark::Watermark;

/// Bytes applied between two saves of the state. What was applied since the last one is replayed
/// after a crash.
const SAVE_INTERVAL_BYTES: usize = 4 * 1024 * 1024;
/// A large state is saved less often, so that saving stays a fraction of the appended bytes.
const SAVE_COST_FACTOR: usize = 8;
/// Small entries must not keep the state from being saved for ever.
const ENTRY_OVERHEAD_BYTES: usize = 256;

/// What the state machine shares with the rest of its replica.
pub struct ReplicaState {
    log: PartitionLog,
    applied: Mutex<Applied>,
    /// Term of the last applied entry: a leader is ready when it is its own.
    applied_term: AtomicU64,
    /// The replica is being shut down: Raft's end is no surprise.
    pub is_closing: AtomicBool,
    pub watermark: Arc<Watermark>,
    pub leadership: watch::Sender<Leadership>,
    pub traces: Arc<Traces>,
    /// Where the log was at certain sizes, to find how far it may be purged.
    pub marks: PurgeMarks,
    /// Copies of the log that are being given to other replicas, or taken from one.
    pub copies: Copies,
    pub rebuilding: Rebuilding,
    pub growth: Arc<Growth>,
}

impl ReplicaState {
    /// Takes up the state that was saved with the log, if there is one.
    pub fn load(log: PartitionLog, upkeep: Upkeep) -> Result<ReplicaState, OpenError> {
        let applied = match log.replica_state() {
            Some((_, bytes)) => Applied::decode(&bytes)?,
            None => Applied::default(),
        };
        let state = ReplicaState {
            applied_term: AtomicU64::new(applied.log_id.as_ref().map_or(0, codec::term)),
            is_closing: AtomicBool::new(false),
            watermark: Arc::default(),
            leadership: watch::Sender::new(Leadership::default()),
            traces: Arc::default(),
            marks: PurgeMarks::new(log.group_id(), upkeep),
            copies: Copies::default(),
            rebuilding: Rebuilding::default(),
            growth: Arc::default(),
            log,
            applied: Mutex::new(Applied::default()),
        };
        state.watermark.advance(applied.high_watermark);
        if applied.log_start_offset > state.log.log_start_offset() {
            state.set_log_start(applied.log_start_offset)?;
        }
        *state.applied() = applied;
        Ok(state)
    }

    /// The state as of the last applied entry.
    pub fn snapshot(&self) -> Applied {
        self.applied().clone()
    }

    /// Index of the last applied entry.
    pub fn applied_index(&self) -> Option<u64> {
        self.applied().log_id.map(|log_id| log_id.index)
    }

    /// It need not be durable at once: the entry that says it is, and so is the saved state.
    fn set_log_start(&self, offset: Offset) -> Result<(), StorageError> {
        self.log.set_log_start(offset, Box::new(|_| {}))
    }

    fn applied(&self) -> MutexGuard<'_, Applied> {
        self.applied.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Runs `read` on the producers as of the last applied entry.
    pub fn with_producers<T>(&self, read: impl FnOnce(&ProducerTable) -> T) -> T {
        read(&self.applied().producers)
    }

    /// Index and term of the last applied entry.
    pub fn applied_id(&self) -> Option<(u64, u64)> {
        let log_id = self.applied().log_id?;
        Some((log_id.index, codec::term(&log_id)))
    }

    /// Voters of the last applied membership; of both, while one gives way to another.
    pub fn voters(&self) -> BTreeSet<ReplicaId> {
        self.applied().membership.voter_ids().collect()
    }

    /// Runs `read` on the last applied membership.
    pub fn with_membership<T>(&self, read: impl FnOnce(&Membership) -> T) -> T {
        read(self.applied().membership.membership())
    }

    /// Publishes what `change` makes of the leadership; waiting fetches look again if it changed.
    pub fn update_leadership(&self, change: impl FnOnce(&mut Leadership)) {
        let changed = self.leadership.send_if_modified(|leadership| {
            let before = *leadership;
            change(leadership);
            // Read under the watch's lock, after `applied_term` was stored: whichever of the state
            // machine and the metrics watcher comes second sees both sides.
            leadership.ready = leadership.is_leader
                && self.applied_term.load(Ordering::SeqCst)
                    == u64::try_from(leadership.leader_epoch.0).unwrap_or(u64::MAX);
            *leadership != before
        });
        if changed {
            self.watermark.wake_all();
        }
    }

    /// Hands the state over to the log, which writes it with its next checkpoint.
    pub fn save(&self) {
        let mut applied = self.applied();
        applied.producers.expire(now_ms());
        let Some(log_id) = applied.log_id else { return };
        let bytes = applied.encode();
        drop(applied);
        self.log.save_replica_state(log_id.index, bytes);
    }

    /// Applies one entry and returns the high watermark after it.
    fn apply(&self, entry: &Entry, now_ms: i64) -> io::Result<Offset> {
        let mut applied = self.applied();
        match &entry.payload {
            EntryPayload::Blank => {}
            EntryPayload::Membership(membership) => {
                applied.membership = StoredMembership::new(Some(entry.log_id), membership.clone());
            }
            EntryPayload::Normal(EntryData::Control(Control::LogStart(offset))) => {
                // Proposers ask for no more than their high watermark; whatever they do, nothing
                // above it may go.
                let offset = (*offset).min(applied.high_watermark);
                if offset > applied.log_start_offset {
                    applied.log_start_offset = offset;
                    self.set_log_start(offset).map_err(io::Error::other)?;
                    self.marks.ask();
                }
            }
            EntryPayload::Normal(EntryData::Batches(Batches { bytes, .. })) => {
                for batch in record_batch::batches(bytes) {
                    let (_, header) = batch.map_err(io::Error::other)?;
                    applied.producers.apply(&header, now_ms);
                    applied.high_watermark = header.next_offset();
                }
            }
        }
        applied.log_id = Some(entry.log_id);
        Ok(applied.high_watermark)
    }

    /// Takes over the state that came with a copy of another replica's log.
    fn install(&self, applied: Applied) {
        let (log_id, high_watermark) = (applied.log_id, applied.high_watermark);
        *self.applied() = applied;
        if let Some(log_id) = log_id {
            self.entry_applied(&log_id, high_watermark);
        }
    }

    /// Applies one entry, and tells all who follow that. The high watermark after it, and what the entry
    /// counts for until the next save, in bytes.
    fn take(&self, entry: &Entry, now_ms: i64) -> io::Result<(Offset, usize)> {
        let high_watermark = self.apply(entry, now_ms)?;
        self.entry_applied(&entry.log_id, high_watermark);
        let size = match &entry.payload {
            EntryPayload::Normal(EntryData::Batches(batches)) => batches.bytes.len(),
            EntryPayload::Normal(EntryData::Control(_))
            | EntryPayload::Blank
            | EntryPayload::Membership(_) => 0,
        };
        let size = size.saturating_add(ENTRY_OVERHEAD_BYTES);
        self.marks.applied(entry.log_id.index, size);
        Ok((high_watermark, size))
    }

    /// Applies committed entries while no Raft instance is open, and saves the state, as the closing of
    /// an instance would.
    pub(super) fn apply_at_rest(&self, entries: Vec<LogEntry>) -> io::Result<()> {
        let now_ms = now_ms();
        for entry in entries {
            let entry = log_store::to_raft(entry, &self.traces)?;
            self.take(&entry, now_ms)?;
        }
        self.save();
        Ok(())
    }

    fn entry_applied(&self, log_id: &LogId, high_watermark: Offset) {
        self.watermark.advance(high_watermark);
        self.traces.forget_applied(log_id.index);
        let term = codec::term(log_id);
        if self.applied_term.swap(term, Ordering::SeqCst) != term {
            self.update_leadership(|_| {});
        }
    }
}

/// Milliseconds since the Unix epoch.
pub fn now_ms() -> i64 {
    let since = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    i64::try_from(since.as_millis()).unwrap_or(i64::MAX)
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// openraft's state machine: owned by its worker, state shared with the replica.
pub struct StateMachine {
    state: Arc<ReplicaState>,
    /// Bytes applied since the state was saved.
    unsaved_bytes: usize,
    save_interval_bytes: usize,
    /// What openraft was told last.
    told: Arc<Mutex<Option<(SnapshotMeta, Bytes)>>>,
    /// Dropped with this: from then on nothing of this instance applies anything.
    _ended: Option<DropGuard>,
}

impl StateMachine {
    pub fn new(state: Arc<ReplicaState>) -> StateMachine {
        StateMachine {
            state,
            unsaved_bytes: 0,
            save_interval_bytes: SAVE_INTERVAL_BYTES,
            told: Arc::default(),
            _ended: None,
        }
    }

    /// Tells by `ended` when it is gone.
    pub fn telling(mut self, ended: DropGuard) -> StateMachine {
        self._ended = Some(ended);
        self
    }

    fn save_if_due(&mut self) {
        if self.unsaved_bytes >= self.save_interval_bytes {
            self.state.save();
            self.unsaved_bytes = 0;
            let state_size = self
                .state
                .log
                .replica_state()
                .map_or(0, |(_, bytes)| bytes.len());
            self.save_interval_bytes =
                SAVE_INTERVAL_BYTES.max(state_size.saturating_mul(SAVE_COST_FACTOR));
        }
    }
}

/// Says that everything applied is in a snapshot: it is, in the log and the saved state. openraft
/// only wants to know how far it may purge.
pub struct SnapshotBuilder {
    state: Arc<ReplicaState>,
    told: Arc<Mutex<Option<(SnapshotMeta, Bytes)>>>,
}

impl RaftSnapshotBuilder<TypeConfig> for SnapshotBuilder {
    type SnapshotData = Bytes;

    async fn build_snapshot(&mut self) -> io::Result<PartitionSnapshot> {
        let applied = self.state.snapshot();
        let snapshot = applied.encode();
        let meta = SnapshotMeta {
            last_log_id: applied.log_id,
            last_membership: applied.membership,
        };
        *lock(&self.told) = Some((meta.clone(), snapshot.clone()));
        Ok(PartitionSnapshot { meta, snapshot })
    }
}

impl RaftStateMachine<TypeConfig> for StateMachine {
    /// Between replicas of this process only, and mostly empty: other replicas fetch the log's files
    /// and the state that goes with them (`copy`).
    type SnapshotData = Bytes;
    type SnapshotBuilder = SnapshotBuilder;

    async fn applied_state(&mut self) -> io::Result<(Option<LogId>, StoredMembership)> {
        let applied = self.state.applied();
        Ok((applied.log_id, applied.membership.clone()))
    }

    async fn apply<S>(&mut self, mut entries: S) -> io::Result<()>
    where
        S: Stream<Item = io::Result<EntryResponder<TypeConfig>>> + Unpin + Send,
    {
        let now_ms = now_ms();
        while let Some(item) = entries.next().await {
            let (entry, responder) = item?;
            let (high_watermark, size) = self.state.take(&entry, now_ms)?;
            if let Some(responder) = responder {
                responder.send(AppendResult { high_watermark });
            }
            self.unsaved_bytes = self.unsaved_bytes.saturating_add(size);
            self.save_if_due();
        }
        Ok(())
    }

    async fn get_snapshot_builder(&mut self) -> SnapshotBuilder {
        SnapshotBuilder {
            state: self.state.clone(),
            told: self.told.clone(),
        }
    }

    /// The log's files were fetched before (`copy`); here they take the place of the old ones.
    async fn install_snapshot(&mut self, meta: &SnapshotMeta, data: Bytes) -> io::Result<()> {
        let applied = match self.state.copies.take_fetched(meta.last_log_id) {
            Some(fetched) => {
                let log = self.state.log.clone();
                tokio::task::spawn_blocking(move || fetched.install(&log))
                    .await
                    .map_err(io::Error::other)?
                    .map_err(io::Error::other)?
            }
            // The log has these entries already, and only the state is to follow.
            None => Applied::decode(&data).map_err(io::Error::other)?,
        };
        self.unsaved_bytes = 0;
        *lock(&self.told) = Some((meta.clone(), applied.encode()));
        self.state.install(applied);
        Ok(())
    }

    /// What a follower needs before it can go on with this log: at least the purge point. Where a
    /// copy is being fetched it is that copy's end, so that the follower goes on right behind it.
    async fn get_current_snapshot(&mut self) -> io::Result<Option<PartitionSnapshot>> {
        let Some(purged) = log_store::purged(&self.state.log) else {
            let told = lock(&self.told).clone();
            return Ok(told.map(|(meta, snapshot)| PartitionSnapshot { meta, snapshot }));
        };
        let offered = self.state.copies.offered().filter(|id| *id >= purged);
        Ok(Some(PartitionSnapshot {
            meta: SnapshotMeta {
                last_log_id: Some(offered.unwrap_or(purged)),
                last_membership: self.state.applied().membership.clone(),
            },
            snapshot: Bytes::new(),
        }))
    }
}
