//! The task of one partition: loads its groups when the replica leads, moves writes to the log, and
//! keeps time.
//!
//! Invariant: one append is in flight at a time, so that the log has the writes in the order of the
//! decisions; nobody is answered before the outcome of the write that the answer promises.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use chronik_types::epoch::LeaderEpoch;
use chronik_types::offset::Offset;
use chronik_types::record_batch::{BatchHeader, batches};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::coordinator::Shared;
use super::loaded::Loaded;
use super::log::{AppendError, GroupLog, ReadError, led_epoch};
use super::partition::Write;
use super::state::GroupError;
use crate::replica::Leadership;

/// Bytes asked from the log at a time while loading.
const LOAD_CHUNK_MAX_BYTES: usize = 4 * 1024 * 1024;
/// Pause after a failed load.
const LOAD_RETRY_INTERVAL: Duration = Duration::from_millis(500);
/// Longest sleep; the deadlines are then looked at again.
const SLEEP_MAX: Duration = Duration::from_secs(3_600);

/// The task of one partition.
pub(super) struct Driver<L> {
    pub shared: Arc<Shared>,
    pub log: L,
    pub stop: CancellationToken,
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
    pub async fn run(self, mut leadership: watch::Receiver<Leadership>) {
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
                let header =
                    BatchHeader::parse(&batch).map_err(|error| unreadable(before, &error))?;
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
        batches(piece).map(move |batch| match batch {
            Ok((at, header)) => Ok(piece.slice(at..at + header.size_bytes())),
            Err(error) => Err(ReadError(error.to_string())),
        })
    })
}
