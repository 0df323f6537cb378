//! Whole copies of a partition's log between replicas: segment files, and the state as of their end.
//!
//! Invariant: a copy holds committed entries only and ends exactly at the entry that its state is as
//! of. The receiving replica puts it in place only through Raft's own `install_snapshot`, and only
//! where its log ends below the copy's end; so no entry that it ever acknowledged is lost.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use chronik_storage::{Export, Installer, PartitionLog, StorageError};
use chronik_types::id::RaftGroupId;
use tokio::time::Instant;

use super::Replica;
use super::applied::Applied;
use super::codec::{self, DecodeError};
use super::log_store;
use super::raft_config::{LogId, PartitionSnapshot, SnapshotMeta, Vote};

/// A copy that nobody has read from for so long is let go, and Raft may purge past it.
const OFFER_TTL: Duration = Duration::from_secs(60);
/// Tries to take state and log together while the log start moves.
const OFFER_ATTEMPTS: usize = 8;

/// Why a copy cannot be given or taken.
#[derive(Debug, thiserror::Error)]
pub enum CopyError {
    #[error("nothing is applied yet")]
    Empty,
    #[error("the log start offset moves too fast")]
    Unsteady,
    #[error(transparent)]
    Storage(#[from] StorageError),
    #[error("the replica's state is not readable: {0}")]
    State(#[from] DecodeError),
    #[error("the copy ends at entry {manifest}, its state at {state:?}")]
    Mismatch { manifest: u64, state: Option<u64> },
    #[error("a task was cancelled")]
    Cancelled,
    #[error("raft refused the copy: {0}")]
    Raft(String),
}

/// A copy of this replica's log as it can be read by others.
pub struct Offer {
    pub last_log_id: LogId,
    pub export: Export,
    /// The replica's state as of `last_log_id`.
    pub state: Bytes,
    created: Instant,
    /// Milliseconds after `created` at which it was last read.
    used_ms: AtomicU64,
}

impl Offer {
    /// Keeps the copy for another while.
    pub fn touch(&self) {
        let since = u64::try_from(self.created.elapsed().as_millis()).unwrap_or(u64::MAX);
        self.used_ms.fetch_max(since, Ordering::Relaxed);
    }

    fn expires_at(&self) -> Instant {
        let used = Duration::from_millis(self.used_ms.load(Ordering::Relaxed));
        self.created + used + OFFER_TTL
    }
}

/// The files of another replica's log, complete and checked, with the state as of their end.
pub struct Fetched {
    installer: Installer,
    applied: Applied,
}

impl Fetched {
    /// `state` is what the giving replica sent with its manifest, which ends at `last_index`.
    pub fn new(installer: Installer, state: &[u8], last_index: u64) -> Result<Fetched, CopyError> {
        let applied = Applied::decode(state)?;
        let state = applied.log_id.map(|log_id| log_id.index);
        if state != Some(last_index) {
            return Err(CopyError::Mismatch {
                manifest: last_index,
                state,
            });
        }
        Ok(Fetched { installer, applied })
    }

    /// Puts the copy in the place of the log. Blocks; durable when it returns.
    pub(super) fn install(self, log: &PartitionLog) -> Result<Applied, StorageError> {
        let last_index = self.applied.log_id.map_or(0, |log_id| log_id.index);
        if log
            .last_entry_id()
            .is_some_and(|(last, _)| last >= last_index)
        {
            // The log came up to there by itself. What Raft lets stand up to the end of a snapshot
            // is what the snapshot holds, and entries above it were acknowledged: the log stays.
            log.set_committed(last_index);
        } else {
            self.installer.commit(self.applied.encode())?;
        }
        Ok(self.applied)
    }
}

impl std::fmt::Debug for Fetched {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "copy up to {:?}", self.applied.log_id)
    }
}

/// A copy that was not put in place.
pub struct Refused {
    pub error: CopyError,
    /// Its files, unless the log has taken them.
    pub installer: Option<Installer>,
}

impl Refused {
    fn of(error: CopyError, fetched: Option<Fetched>) -> Refused {
        let installer = fetched.map(|fetched| fetched.installer);
        Refused { error, installer }
    }
}

/// Copies of one replica's log, given and taken.
#[derive(Default)]
pub struct Copies {
    offer: Mutex<Option<Arc<Offer>>>,
    /// One copy is made at a time.
    making: tokio::sync::Mutex<()>,
    fetched: Mutex<Option<Fetched>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Copies {
    /// The end of the copy that others may be reading now.
    pub fn offered(&self) -> Option<LogId> {
        self.current().map(|offer| offer.last_log_id)
    }

    fn current(&self) -> Option<Arc<Offer>> {
        let offer = lock(&self.offer);
        let offer = offer.as_ref()?;
        (Instant::now() < offer.expires_at()).then(|| offer.clone())
    }

    /// The copy that Raft was told to install, if it ends at `last_log_id`.
    pub(super) fn take_fetched(&self, last_log_id: Option<LogId>) -> Option<Fetched> {
        let fetched = lock(&self.fetched).take();
        fetched.filter(|fetched| fetched.applied.log_id == last_log_id)
    }

    /// Lets go of the copy once nobody has read it for a while. A task of its own, which ends.
    async fn expire(
        state: std::sync::Weak<super::state_machine::ReplicaState>,
        group: RaftGroupId,
    ) {
        loop {
            let Some(at) = state.upgrade().and_then(|state| {
                let mut offer = lock(&state.copies.offer);
                let at = offer.as_ref()?.expires_at();
                if at <= Instant::now() {
                    *offer = None;
                    return None;
                }
                Some(at)
            }) else {
                tracing::debug!(raft_group_id = %group, "a copy of the log is let go");
                return;
            };
            tokio::time::sleep_until(at).await;
        }
    }
}

impl Replica {
    /// A copy of all that is applied now, or the one that others are reading already. May take as
    /// long as it takes to write what is in memory to segments.
    pub async fn offer_copy(&self) -> Result<Arc<Offer>, CopyError> {
        let _one = self.state.copies.making.lock().await;
        if let Some(offer) = self.state.copies.current() {
            offer.touch();
            return Ok(offer);
        }
        for _ in 0..OFFER_ATTEMPTS {
            let applied = self.state.snapshot();
            let last_log_id = applied.log_id.ok_or(CopyError::Empty)?;
            let log = self.log().clone();
            let export = tokio::task::spawn_blocking(move || log.export(last_log_id.index)).await;
            let export = export.map_err(|_| CopyError::Cancelled)??;
            // A log start that was applied in between may lie above the end of this copy.
            if export.manifest().log_start_offset > applied.high_watermark {
                continue;
            }
            let offer = Arc::new(Offer {
                last_log_id,
                export,
                state: applied.encode(),
                created: Instant::now(),
                used_ms: AtomicU64::new(0),
            });
            let before = lock(&self.state.copies.offer).replace(offer.clone());
            if before.is_none() {
                let state = Arc::downgrade(&self.state);
                tokio::spawn(Copies::expire(state, self.group_id()));
            }
            return Ok(offer);
        }
        Err(CopyError::Unsteady)
    }

    /// Whether this replica's log, as it is on the disk, has the leader's entry, and so all before.
    pub fn has_entry(&self, log_id: &LogId) -> bool {
        let log = self.log();
        if log.durable_index().is_none_or(|last| last < log_id.index) {
            return false;
        }
        match log_store::purged(log) {
            Some(purged) if purged.index > log_id.index => true,
            _ => {
                let term = log.term_at(log_id.index).ok().flatten();
                term == Some(codec::term(log_id))
            }
        }
    }

    /// Hands a copy to Raft, in the name of the leader with `vote`. When this returns the replica's
    /// log is the copy, or had come further by itself.
    pub async fn install_copy(&self, vote: Vote, fetched: Fetched) -> Result<(), Refused> {
        let Some(last_log_id) = fetched.applied.log_id else {
            return Err(Refused::of(CopyError::Empty, None));
        };
        // The library panics at such a pair.
        if codec::term(&last_log_id) > vote.leader_id.term {
            let error = CopyError::Raft("there is a newer leader".to_owned());
            return Err(Refused::of(error, Some(fetched)));
        }
        let meta = SnapshotMeta {
            last_log_id: Some(last_log_id),
            last_membership: fetched.applied.membership.clone(),
        };
        let raft = match self.engine().wake().await {
            Ok(raft) => raft,
            Err(error) => {
                let error = CopyError::Raft(error.to_string());
                return Err(Refused::of(error, Some(fetched)));
            }
        };
        *lock(&self.state.copies.fetched) = Some(fetched);
        let snapshot = PartitionSnapshot {
            meta,
            snapshot: Bytes::new(),
        };
        let response = raft.install_full_snapshot(vote, snapshot).await;
        let left = lock(&self.state.copies.fetched).take();
        let error = match response {
            Ok(response) if response.vote <= vote => return Ok(()),
            Ok(_) => CopyError::Raft("there is another leader".to_owned()),
            Err(fatal) => CopyError::Raft(fatal.to_string()),
        };
        Err(Refused::of(error, left))
    }
}

/// Term and index of a log id, for the wire.
pub fn parts(log_id: &LogId) -> (u64, u64) {
    (codec::term(log_id), log_id.index)
}
