//! The coordinator's seam to its log: one partition of `__consumer_offsets`. The real one is the
//! partition's replica (`replica_log`); tests have one in memory.
//!
//! Invariant: `Unknown` is the only outcome after which the records may be in the log.

use std::future::Future;

use bytes::Bytes;
use chronik_types::epoch::LeaderEpoch;
use chronik_types::offset::Offset;
use tokio::sync::watch;

use crate::replica::Leadership;

/// Why records were not appended, or not known to be.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum AppendError {
    #[error("this replica does not lead in that leader epoch")]
    NotLeader,
    #[error("the outcome is unknown")]
    Unknown,
    #[error("the log refused the records: {0}")]
    Refused(String),
}

/// Why the log cannot be read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the log cannot be read: {0}")]
pub struct ReadError(pub String);

/// One replicated log.
pub trait GroupLog: Send + Sync + 'static {
    /// Appends record batches while this replica leads in `leader_epoch`. Resolves with the offset
    /// of the first record when it is committed.
    fn append(
        &self,
        leader_epoch: LeaderEpoch,
        records: Bytes,
    ) -> impl Future<Output = Result<Offset, AppendError>> + Send;

    /// Committed batches from `from` on, whole, in order; the first may begin below `from`. Empty
    /// only at the high watermark.
    fn read_committed(
        &self,
        from: Offset,
        max_bytes: usize,
    ) -> impl Future<Output = Result<Vec<Bytes>, ReadError>> + Send;

    fn log_start_offset(&self) -> Offset;

    /// On a leader that is ready it covers everything committed in earlier leader epochs.
    fn high_watermark(&self) -> Offset;

    fn leadership(&self) -> watch::Receiver<Leadership>;
}

/// The epoch in which this replica leads, once its high watermark is complete.
pub(super) fn led_epoch(leadership: &Leadership) -> Option<LeaderEpoch> {
    (leadership.is_leader && leadership.ready).then_some(leadership.leader_epoch)
}
