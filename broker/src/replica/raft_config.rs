//! The openraft types and settings of a partition's Raft group.
//!
//! Invariant: only `replica` and `peers` name openraft types; all encodings are in `codec`, none is
//! openraft's. Every timeout and bound that Raft uses for partitions is in this file.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use chronik_telemetry::trace::TraceContext;
use chronik_types::id::ReplicaId;
use chronik_types::offset::Offset;
use chronik_types::record_batch;
use openraft::impls::leader_id_std;
use openraft::{OptionalSend, SnapshotPolicy};

use super::in_flight::Pending;
use super::state_machine::StateMachine;

/// openraft's types for one partition.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct TypeConfig;

impl openraft::RaftTypeConfig for TypeConfig {
    type D = EntryData;
    type R = AppendResult;
    type NodeId = ReplicaId;
    /// Addresses are the cluster image's business.
    type Node = ();
    type Term = u64;
    /// At most one leader per term, so that the term can be Kafka's leader epoch.
    type LeaderId = leader_id_std::LeaderId<u64, ReplicaId>;
    type Vote = openraft::impls::Vote<Self::LeaderId>;
    type Payload = openraft::EntryPayload<Self::D, Self::NodeId, Self::Node>;
    type Entry = openraft::alias::DefaultEntryOf<Self>;
    type AsyncRuntime = openraft::impls::TokioRuntime;
    type Responder<T>
        = openraft::impls::OneshotResponder<Self, T>
    where
        T: OptionalSend + 'static;
    type Batch<T>
        = openraft::impls::InlineBatch<T>
    where
        T: OptionalSend + 'static;
    type ErrorSource = openraft::impls::BoxedErrorSource;
}

pub type Raft = openraft::Raft<TypeConfig, StateMachine>;
pub type Entry = openraft::alias::EntryOf<TypeConfig>;
pub type EntryPayload = openraft::EntryPayload<EntryData, ReplicaId, ()>;
pub type LogId = openraft::alias::LogIdOf<TypeConfig>;
pub type Vote = openraft::alias::VoteOf<TypeConfig>;
pub type LeaderId = openraft::alias::LeaderIdOf<TypeConfig>;
pub type CommittedLeaderId = openraft::alias::CommittedLeaderIdOf<TypeConfig>;
pub type Membership = openraft::Membership<ReplicaId, ()>;
pub type StoredMembership = openraft::alias::StoredMembershipOf<TypeConfig>;
pub type SnapshotMeta = openraft::alias::SnapshotMetaOf<TypeConfig>;
/// What a leader sends to a follower.
pub type AppendRequest = openraft::raft::AppendEntriesRequest<TypeConfig>;
pub type PartitionSnapshot = openraft::alias::SnapshotOf<TypeConfig, Bytes>;

/// The data of one Raft entry.
#[derive(Debug, Clone)]
pub enum EntryData {
    Batches(Batches),
    Control(Control),
}

impl fmt::Display for EntryData {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            EntryData::Batches(batches) => batches.fmt(f),
            EntryData::Control(Control::LogStart(offset)) => write!(f, "log start {offset}"),
        }
    }
}

/// What a partition's leader tells all replicas through the log. Takes an index and no offset.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Control {
    /// Records below this offset are gone; never above the high watermark of its proposer.
    LogStart(Offset),
}

/// Record batches v2 of one partition, back to back.
pub struct Batches {
    /// Stamped with offsets and leader epoch, except in a proposal that the leader's log store has
    /// not taken yet (`pending` is there).
    pub bytes: Bytes,
    /// Leader-local: who waits for this entry. Never on disk, never sent.
    pub pending: Option<Pending>,
    /// Leader-local and on the wire to followers, never on disk: the trace of a sampled request.
    pub trace: Option<TraceContext>,
}

impl Batches {
    /// Batches as they come from a leader or from disk: stamped.
    pub fn stamped(bytes: Bytes, trace: Option<TraceContext>) -> Batches {
        Batches {
            bytes,
            pending: None,
            trace,
        }
    }
}

impl Clone for Batches {
    /// A copy has no waiters; the bytes are shared.
    fn clone(&self) -> Self {
        Batches {
            bytes: self.bytes.clone(),
            pending: None,
            trace: self.trace.clone(),
        }
    }
}

impl fmt::Debug for Batches {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl fmt::Display for Batches {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match record_batch::BatchHeader::parse(&self.bytes) {
            Ok(first) => write!(
                f,
                "batches at {} ({} B)",
                first.base_offset,
                self.bytes.len()
            ),
            Err(_) => write!(f, "batches ({} B)", self.bytes.len()),
        }
    }
}

/// What applying an entry answers to its proposer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AppendResult {
    /// High watermark after this entry.
    pub high_watermark: Offset,
}

impl fmt::Display for AppendResult {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "high watermark {}", self.high_watermark)
    }
}

/// Timing of partition groups. Ticks are off, so election timeouts only matter as the length of
/// the leader lease and where the leadership driver turns ticks on as a fallback.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RaftTiming {
    pub heartbeat_interval: Duration,
    pub election_timeout_min: Duration,
    pub election_timeout_max: Duration,
}

impl Default for RaftTiming {
    fn default() -> Self {
        Self {
            heartbeat_interval: Duration::from_millis(500),
            election_timeout_min: Duration::from_millis(1500),
            election_timeout_max: Duration::from_millis(3000),
        }
    }
}

/// Entries read for one replication message, in bytes; a larger entry goes alone.
pub const REPLICATION_READ_SIZE_MAX: usize = 1024 * 1024;
/// Entries of one replication message.
const REPLICATION_ENTRIES_MAX: u64 = 1024;
/// openraft's own queues per group. One proposal is in flight per partition, so these are only
/// ever filled by Raft messages.
const CHANNEL_SIZE: u64 = 256;

/// openraft's settings, shared by all groups of a broker.
pub fn raft_config(timing: RaftTiming) -> Arc<openraft::Config> {
    let millis = |d: Duration| u64::try_from(d.as_millis()).unwrap_or(u64::MAX);
    Arc::new(openraft::Config {
        cluster_name: "partition".to_owned(),
        heartbeat_interval: millis(timing.heartbeat_interval),
        election_timeout_min: millis(timing.election_timeout_min),
        election_timeout_max: millis(timing.election_timeout_max),
        heartbeat_min_interval: Some(millis(timing.heartbeat_interval)),
        enable_tick: false,
        enable_pre_vote: Some(true),
        // It would also hold back the heartbeat that wakes a resting group.
        quorum_loss_probe_interval: None,
        // A restarted leader must not go on in its old term: entries of that term that it wrote
        // before may not be applied yet, and "the term's first entry is applied" would then not
        // mean that its producer state is complete.
        enable_leader_restore: Some(false),
        // The replica itself decides when it snapshots and purges (`purge`).
        snapshot_policy: SnapshotPolicy::Never,
        max_in_snapshot_log_to_keep: u64::MAX / 2,
        max_payload_entries: REPLICATION_ENTRIES_MAX,
        api_channel_size: Some(CHANNEL_SIZE),
        notification_channel_size: Some(CHANNEL_SIZE),
        state_machine_channel_size: Some(64),
        // Of statistics that are built out, and whose room is taken all the same.
        log_stage_capacity: Some(1),
        ..openraft::Config::default()
    })
}

/// For an instance that leads on where the one before it, in this process, was closed for rest: then all that
/// was sent in its term is in the log, and applied.
pub fn leading_on(config: &openraft::Config) -> Arc<openraft::Config> {
    Arc::new(openraft::Config {
        enable_leader_restore: Some(true),
        ..config.clone()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn openraft_accepts_the_default_timing() {
        let config = raft_config(RaftTiming::default());
        openraft::Config::clone(&config).validate().unwrap();
        // A suppressed heartbeat must not be mistaken for a dead leader where ticks are on.
        let tick = config.heartbeat_interval * 13 / 64;
        let longest_silence = config.heartbeat_interval * 2 + tick;
        assert!(
            longest_silence < config.election_timeout_min,
            "{longest_silence}"
        );
    }
}
