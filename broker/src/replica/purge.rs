//! How far Raft may forget the log: what it forgets stays in the segments for consumers.
//!
//! Invariant: nothing is purged that is not applied and saved in the replica's state, nor past the
//! end of a copy that another replica is taking of this log.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use chronik_types::id::{ProducerId, RaftGroupId};
use chronik_types::offset::Offset;
use openraft::RaftMetrics;
use openraft::errors::Fatal;
use tokio::sync::mpsc;

use super::Replica;
use super::log_store;
use super::raft_config::{Raft, TypeConfig};

/// Distance between two marks.
const MARK_BYTES: u64 = 4 * 1024 * 1024;
/// How long the library may take to take note of a snapshot.
const SNAPSHOT_TIMEOUT: Duration = Duration::from_secs(10);

/// Entries among which the next instance of a leader may have to search its followers' logs. In no more than these it
/// begins with the first one, and sends them all.
const REMEMBERED_AT_REST_MAX: u64 = 16;

/// How a replica asks for `log_life` to look after it.
#[derive(Debug, Clone)]
pub struct Upkeep {
    /// None: nobody looks after replicas (tests).
    pub wanted: Option<mpsc::UnboundedSender<RaftGroupId>>,
    /// Bytes of entries that Raft keeps readable for followers that are a little behind.
    pub keep_bytes: u64,
}

impl Default for Upkeep {
    fn default() -> Self {
        Upkeep {
            wanted: None,
            keep_bytes: 64 * 1024 * 1024,
        }
    }
}

/// Why the log was not purged. It is tried again with the next occasion.
#[derive(Debug, thiserror::Error)]
pub enum PurgeError {
    #[error("the replica's raft does not run: {0}")]
    Stopped(String),
    #[error("raft took no note of the snapshot in time")]
    TimedOut,
}

impl From<Fatal<TypeConfig>> for PurgeError {
    fn from(fatal: Fatal<TypeConfig>) -> Self {
        PurgeError::Stopped(fatal.to_string())
    }
}

/// Log indexes at certain sizes of the log since the replica was opened.
#[derive(Debug)]
pub struct PurgeMarks {
    group: RaftGroupId,
    upkeep: Upkeep,
    /// Upkeep was asked for and has not come yet.
    is_asked: AtomicBool,
    inner: Mutex<Inner>,
}

#[derive(Debug, Default)]
struct Inner {
    /// Bytes applied, with an overhead for each entry.
    applied_bytes: u64,
    /// Oldest first: the last index of the first so many bytes.
    marks: VecDeque<(u64, u64)>,
    /// The first entry that was not purged when this last was looked at, in bytes.
    purged_bytes: u64,
}

impl PurgeMarks {
    pub fn new(group: RaftGroupId, upkeep: Upkeep) -> PurgeMarks {
        PurgeMarks {
            group,
            upkeep,
            is_asked: AtomicBool::new(false),
            inner: Mutex::default(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Counts an applied entry.
    pub fn applied(&self, index: u64, size_bytes: usize) {
        let mut inner = self.lock();
        inner.applied_bytes = inner.applied_bytes.saturating_add(size_bytes as u64);
        let applied_bytes = inner.applied_bytes;
        let last = inner.marks.back().map_or(0, |(_, bytes)| *bytes);
        if applied_bytes.saturating_sub(last) < MARK_BYTES {
            return;
        }
        inner.marks.push_back((index, applied_bytes));
        let kept = applied_bytes.saturating_sub(inner.purged_bytes);
        drop(inner);
        // Twice, so that purging is rare.
        if kept >= self.upkeep.keep_bytes.saturating_mul(2) {
            self.ask();
        }
    }

    pub fn keep_bytes(&self) -> u64 {
        self.upkeep.keep_bytes
    }

    /// Asks `log_life` to look after the replica soon.
    pub fn ask(&self) {
        if let Some(wanted) = &self.upkeep.wanted
            && !self.is_asked.swap(true, Ordering::SeqCst)
        {
            // It ends before the replicas do.
            let _ = wanted.send(self.group);
        }
    }

    /// What happens from now on may ask again.
    pub fn heard(&self) {
        self.is_asked.store(false, Ordering::SeqCst);
    }

    /// The last index that is at least `keep_bytes` behind the last applied one. Older marks are
    /// dropped: the caller purges up to there.
    pub fn take_target(&self) -> Option<u64> {
        let mut inner = self.lock();
        let limit = inner.applied_bytes.checked_sub(self.upkeep.keep_bytes)?;
        let mut target = None;
        while let Some((index, bytes)) = inner.marks.front().copied()
            && bytes <= limit
        {
            inner.marks.pop_front();
            inner.purged_bytes = bytes;
            target = Some(index);
        }
        target
    }
}

impl Replica {
    /// Asks `log_life` to look after this replica soon.
    pub fn ask_upkeep(&self) {
        self.state.marks.ask();
    }

    /// For `log_life`, before it looks at the replica: what comes from now on asks again.
    pub fn upkeep_begins(&self) {
        self.state.marks.heard();
    }

    /// How far Raft need not keep entries for followers that are a little behind.
    pub fn purge_target(&self) -> Option<u64> {
        self.state.marks.take_target()
    }

    /// Last offset of every idempotent producer that is remembered.
    pub fn active_producers(&self) -> impl Iterator<Item = (ProducerId, Offset)> + use<> {
        let offsets: Vec<_> = self
            .state
            .with_producers(|producers| producers.last_offsets().collect());
        offsets.into_iter()
    }

    /// Before a new replica is added: if Raft remembers more than followers a little behind need, it
    /// forgets all it may, so that the new one gets the log's files instead of every entry.
    pub async fn purge_for_new_replica(&self) -> Result<(), PurgeError> {
        let purged = log_store::purged(self.log()).map(|purged| purged.index);
        let segments = self.log().segments();
        let remembered = segments
            .iter()
            .filter(|segment| Some(segment.last_index) > purged)
            .fold(0u64, |sum, segment| sum.saturating_add(segment.size_bytes));
        match self.state.applied_index() {
            Some(applied) if remembered > self.state.marks.keep_bytes() => {
                self.purge_awake(applied).await
            }
            _ => Ok(()),
        }
    }

    /// Lets Raft forget the entries up to `index`, or what of them it may forget. On a leader it
    /// takes effect when no connected follower reads there any more. A follower that rests is left alone.
    pub async fn purge(&self, index: u64) -> Result<(), PurgeError> {
        let Some(index) = self.purge_limit(index) else {
            return Ok(());
        };
        match self.leading_raft().await {
            Some(raft) => self.purge_upto(&raft, index).await,
            None => Ok(()),
        }
    }

    /// As `purge`, and wakes a replica that rests: what Raft remembers is not compacted.
    pub async fn purge_awake(&self, index: u64) -> Result<(), PurgeError> {
        let Some(index) = self.purge_limit(index) else {
            return Ok(());
        };
        let raft = self.wake().await;
        let raft = raft.map_err(|error| PurgeError::Stopped(error.to_string()))?;
        self.purge_upto(&raft, index).await
    }

    /// Before the Raft of a leader that may rest is closed: the next one searches its followers' logs anew, among the
    /// entries that are remembered. Where all of them have all there is, the last one is enough.
    pub async fn purge_before_rest(&self, idle: Duration) -> Result<(), PurgeError> {
        let last = self.log().last_entry_id().map_or(0, |(index, _)| index);
        if last.saturating_sub(self.log().first_index()) <= REMEMBERED_AT_REST_MAX {
            return Ok(());
        }
        let Some(raft) = self.engine().about_to_rest(idle) else {
            return Ok(());
        };
        let Some(index) = self.purge_limit(last - 1) else {
            return Ok(());
        };
        self.purge_upto(&raft, index).await?;
        let is_purged = |metrics: &RaftMetrics<TypeConfig>| {
            let purged = metrics.purged.as_ref();
            purged.is_some_and(|purged| purged.index >= index)
        };
        let wait = raft.wait(Some(SNAPSHOT_TIMEOUT));
        let purged = wait.metrics(is_purged, "a purge before a rest").await;
        purged.map_err(|_| PurgeError::TimedOut)?;
        Ok(())
    }

    /// How far up to `index` there is something that may go now.
    fn purge_limit(&self, index: u64) -> Option<u64> {
        let applied = self.state.applied_index();
        let pinned = self.state.copies.offered().map(|log_id| log_id.index);
        let limits = applied.into_iter().chain(pinned);
        let index = limits.min()?.min(index);
        let purged = log_store::purged(self.log());
        purged
            .is_none_or(|purged| purged.index < index)
            .then_some(index)
    }

    async fn purge_upto(&self, raft: &Raft, index: u64) -> Result<(), PurgeError> {
        let saved = self.log().replica_state().map(|(saved, _)| saved);
        if saved.is_none_or(|saved| saved < index) {
            self.state.save();
        }
        raft.trigger().snapshot().await?;
        let wait = raft.wait(Some(SNAPSHOT_TIMEOUT));
        let noted = wait.metrics(
            |metrics| {
                metrics
                    .snapshot
                    .as_ref()
                    .is_some_and(|snapshot| snapshot.index >= index)
            },
            "snapshot for a purge",
        );
        noted.await.map_err(|_| PurgeError::TimedOut)?;
        raft.trigger().purge_log(index).await?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: usize = 1024 * 1024;

    fn marks() -> (PurgeMarks, mpsc::UnboundedReceiver<RaftGroupId>) {
        let (wanted, asked) = mpsc::unbounded_channel();
        let upkeep = Upkeep {
            wanted: Some(wanted),
            keep_bytes: 16 * MIB as u64,
        };
        (PurgeMarks::new(RaftGroupId(7), upkeep), asked)
    }

    #[test]
    fn what_is_kept_is_never_a_target() {
        let (marks, _asked) = marks();
        for index in 0..16 {
            marks.applied(index, MIB);
        }
        assert_eq!(marks.take_target(), None);
        for index in 16..32 {
            marks.applied(index, MIB);
        }
        // 32 MiB applied: the first 16 may go, which end with entry 15.
        assert_eq!(marks.take_target(), Some(15));
        assert_eq!(marks.take_target(), None);
    }

    #[test]
    fn upkeep_is_asked_for_once_until_it_comes() {
        let (marks, mut asked) = marks();
        for index in 0..64 {
            marks.applied(index, MIB);
        }
        assert_eq!(asked.try_recv(), Ok(RaftGroupId(7)));
        assert!(asked.try_recv().is_err());
        marks.heard();
        assert_eq!(marks.take_target(), Some(47));
        marks.applied(64, MIB);
        assert!(asked.try_recv().is_err(), "just purged");
        for index in 65..100 {
            marks.applied(index, MIB);
        }
        assert_eq!(asked.try_recv(), Ok(RaftGroupId(7)));
    }
}
