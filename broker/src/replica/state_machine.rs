//! Applies committed entries: high watermark, producer state, and who the voters are.
//!
//! Invariant: applied in log order on every replica, from the log alone. The state is saved with
//! the log index that it belongs to, so a restart replays only what came after.

use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use bytes::{BufMut, Bytes, BytesMut};
use chronik_storage::PartitionLog;
use chronik_types::offset::Offset;
use chronik_types::record_batch;
use futures::{Stream, StreamExt};
use openraft::entry::EntryPayload;
use openraft::storage::{EntryResponder, RaftSnapshotBuilder, RaftStateMachine};
use tokio::sync::watch;
use tokio_util::sync::DropGuard;

use super::Leadership;
use super::codec::{self, DecodeError, Reader, put_count, put_version};
use super::producer_state::ProducerTable;
use super::raft_config::{AppendResult, Batches, Entry, LogId, StoredMembership, TypeConfig};
use super::traces::Traces;
use super::watermark::Watermark;

type SnapshotMeta = openraft::alias::SnapshotMetaOf<TypeConfig>;
type PartitionSnapshot = openraft::alias::SnapshotOf<TypeConfig, Bytes>;

/// Bytes applied between two saves of the state. What was applied since the last one is replayed
/// after a crash.
const SAVE_INTERVAL_BYTES: usize = 4 * 1024 * 1024;
/// A large state is saved less often, so that saving stays a fraction of the appended bytes.
const SAVE_COST_FACTOR: usize = 8;
/// Small entries must not keep the state from being saved for ever.
const ENTRY_OVERHEAD_BYTES: usize = 256;

/// The state as of one log index.
#[derive(Debug, Clone, Default)]
struct Applied {
    log_id: Option<LogId>,
    membership: StoredMembership,
    high_watermark: Offset,
    producers: ProducerTable,
}

impl Applied {
    fn encode(&self) -> Bytes {
        let mut out = BytesMut::new();
        put_version(&mut out);
        put_log_id(&mut out, &self.log_id);
        out.put_i64(self.high_watermark.0);
        put_log_id(&mut out, self.membership.log_id());
        for part in [
            codec::encode_membership(self.membership.membership()),
            self.producers.encode(),
        ] {
            put_count(&mut out, part.len());
            out.put(part);
        }
        out.freeze()
    }

    fn decode(bytes: &[u8]) -> Result<Applied, DecodeError> {
        let mut reader = Reader::new("replica state", bytes)?;
        let log_id = read_log_id(&mut reader)?;
        let high_watermark = Offset(reader.i64()?);
        let membership_log_id = read_log_id(&mut reader)?;
        let size = reader.count(bytes.len())?;
        let membership = codec::decode_membership(reader.bytes(size)?)?;
        let size = reader.count(bytes.len())?;
        let producers = ProducerTable::decode(reader.bytes(size)?)?;
        reader.end()?;
        let membership = StoredMembership::new(membership_log_id, membership);
        Ok(Applied {
            log_id,
            membership,
            high_watermark,
            producers,
        })
    }
}

fn put_log_id(out: &mut impl BufMut, log_id: &Option<LogId>) {
    out.put_u8(u8::from(log_id.is_some()));
    if let Some(log_id) = log_id {
        out.put_u64(codec::term(log_id));
        out.put_u64(log_id.index);
    }
}

fn read_log_id(reader: &mut Reader<'_>) -> Result<Option<LogId>, DecodeError> {
    match reader.u8()? {
        0 => Ok(None),
        1 => {
            let (term, index) = (reader.u64()?, reader.u64()?);
            Ok(Some(codec::log_id(term, index)))
        }
        _ => Err(reader.invalid()),
    }
}

/// What the state machine shares with the rest of its replica.
pub struct ReplicaState {
    log: PartitionLog,
    applied: Mutex<Applied>,
    /// Term of the last applied entry: a leader is ready when it is its own.
    applied_term: AtomicU64,
    voter_count: AtomicUsize,
    /// The replica is being shut down: Raft's end is no surprise.
    pub is_closing: AtomicBool,
    pub watermark: Arc<Watermark>,
    pub leadership: watch::Sender<Leadership>,
    pub traces: Arc<Traces>,
}

impl ReplicaState {
    /// Takes up the state that was saved with the log, if there is one.
    pub fn load(log: PartitionLog) -> Result<ReplicaState, DecodeError> {
        let applied = match log.replica_state() {
            Some((_, bytes)) => Applied::decode(&bytes)?,
            None => Applied::default(),
        };
        let state = ReplicaState {
            log,
            applied_term: AtomicU64::new(applied.log_id.as_ref().map_or(0, codec::term)),
            voter_count: AtomicUsize::new(applied.membership.voter_ids().count()),
            is_closing: AtomicBool::new(false),
            watermark: Arc::default(),
            leadership: watch::Sender::new(Leadership::default()),
            traces: Arc::default(),
            applied: Mutex::new(Applied::default()),
        };
        state.watermark.advance(applied.high_watermark);
        *state.applied() = applied;
        Ok(state)
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

    /// Voters of the last applied membership.
    pub fn voter_count(&self) -> usize {
        self.voter_count.load(Ordering::Relaxed)
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
                self.voter_count
                    .store(membership.voter_ids().count(), Ordering::Relaxed);
            }
            EntryPayload::Normal(Batches { bytes, .. }) => {
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

    fn entry_applied(&self, log_id: &LogId, high_watermark: Offset) {
        self.watermark.advance(high_watermark);
        self.traces.forget_upto(log_id.index);
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

/// openraft's state machine: owned by its worker, state shared with the replica.
pub struct StateMachine {
    state: Arc<ReplicaState>,
    /// Bytes applied since the state was saved.
    unsaved_bytes: usize,
    save_interval_bytes: usize,
    /// Snapshots are never taken in operation, since the log is never purged; openraft's storage
    /// suite does.
    snapshot: Arc<Mutex<Option<(SnapshotMeta, Bytes)>>>,
    /// Dropped with this: from then on nothing of this instance applies anything.
    _ended: Option<DropGuard>,
}

impl StateMachine {
    pub fn new(state: Arc<ReplicaState>) -> StateMachine {
        StateMachine {
            state,
            unsaved_bytes: 0,
            save_interval_bytes: SAVE_INTERVAL_BYTES,
            snapshot: Arc::default(),
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

pub struct SnapshotBuilder {
    state: Arc<ReplicaState>,
    snapshot: Arc<Mutex<Option<(SnapshotMeta, Bytes)>>>,
}

fn snapshot_of((meta, data): (SnapshotMeta, Bytes)) -> PartitionSnapshot {
    PartitionSnapshot {
        meta,
        snapshot: data,
    }
}

impl RaftSnapshotBuilder<TypeConfig> for SnapshotBuilder {
    type SnapshotData = Bytes;

    async fn build_snapshot(&mut self) -> io::Result<PartitionSnapshot> {
        let applied = self.state.applied();
        let meta = SnapshotMeta {
            last_log_id: applied.log_id,
            last_membership: applied.membership.clone(),
        };
        let snapshot = (meta, applied.encode());
        drop(applied);
        *self.snapshot.lock().unwrap_or_else(PoisonError::into_inner) = Some(snapshot.clone());
        Ok(snapshot_of(snapshot))
    }
}

impl RaftStateMachine<TypeConfig> for StateMachine {
    /// The replica's state; the records themselves come with the log.
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
            let high_watermark = self.state.apply(&entry, now_ms)?;
            self.state.entry_applied(&entry.log_id, high_watermark);
            if let Some(responder) = responder {
                responder.send(AppendResult { high_watermark });
            }
            let size = match &entry.payload {
                EntryPayload::Normal(batches) => batches.bytes.len(),
                EntryPayload::Blank | EntryPayload::Membership(_) => 0,
            };
            self.unsaved_bytes = self
                .unsaved_bytes
                .saturating_add(size)
                .saturating_add(ENTRY_OVERHEAD_BYTES);
            self.save_if_due();
        }
        Ok(())
    }

    async fn get_snapshot_builder(&mut self) -> SnapshotBuilder {
        SnapshotBuilder {
            state: self.state.clone(),
            snapshot: self.snapshot.clone(),
        }
    }

    async fn install_snapshot(&mut self, meta: &SnapshotMeta, data: Bytes) -> io::Result<()> {
        let applied = Applied::decode(&data).map_err(io::Error::other)?;
        let (log_id, high_watermark) = (applied.log_id, applied.high_watermark);
        self.state
            .voter_count
            .store(applied.membership.voter_ids().count(), Ordering::Relaxed);
        *self.state.applied() = applied;
        if let Some(log_id) = log_id {
            self.state.entry_applied(&log_id, high_watermark);
        }
        *self.snapshot.lock().unwrap_or_else(PoisonError::into_inner) = Some((meta.clone(), data));
        Ok(())
    }

    async fn get_current_snapshot(&mut self) -> io::Result<Option<PartitionSnapshot>> {
        let snapshot = self.snapshot.lock().unwrap_or_else(PoisonError::into_inner);
        Ok(snapshot.clone().map(snapshot_of))
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use chronik_types::id::{BrokerId, ReplicaId};

    use super::*;
    use crate::replica::raft_config::Membership;

    #[test]
    fn the_state_round_trips_and_survives_truncation() {
        let voter = ReplicaId {
            broker_id: BrokerId(1),
            incarnation: 3,
        };
        let membership = Membership::new_with_defaults(vec![BTreeSet::from([voter])], []);
        let applied = Applied {
            log_id: Some(codec::log_id(4, 77)),
            membership: StoredMembership::new(Some(codec::log_id(1, 0)), membership),
            high_watermark: Offset(1234),
            producers: ProducerTable::default(),
        };
        let bytes = applied.encode();
        let decoded = Applied::decode(&bytes).unwrap();
        assert_eq!(decoded.log_id, applied.log_id);
        assert_eq!(decoded.membership, applied.membership);
        assert_eq!(decoded.high_watermark, applied.high_watermark);
        for end in 0..bytes.len() {
            assert!(Applied::decode(&bytes[..end]).is_err(), "{end}");
        }
    }
}
