//! Reads of a replica: fetch, offsets by time, and ends of leader epochs.
//!
//! Invariant: nothing at or above the high watermark is ever returned. Requests that name a leader
//! epoch are checked against this replica's before anything else.

use std::time::Duration;

use bytes::Bytes;
use chronik_storage::{StorageError, TermStart};
use chronik_types::epoch::LeaderEpoch;
use chronik_types::offset::Offset;
use chronik_types::record_batch::BatchHeader;
use tokio::time::timeout;

use super::records::{self, RecordTime};
use super::{Leadership, ReadError, Replica};
use crate::blocking;

/// "Not checked", where a request may name a leader epoch.
const NO_EPOCH: LeaderEpoch = LeaderEpoch(-1);

/// Special timestamps of ListOffsets (Kafka protocol).
const LATEST: i64 = -1;
const EARLIEST: i64 = -2;
const MAX_TIMESTAMP: i64 = -3;
const EARLIEST_LOCAL: i64 = -4;
const LATEST_TIERED: i64 = -5;
const EARLIEST_PENDING_UPLOAD: i64 = -6;

/// How long ListOffsets waits for a new leader to know its high watermark again.
const READY_WAIT: Duration = Duration::from_secs(2);

/// What a fetch asks of one partition.
#[derive(Debug, Clone, Copy)]
pub struct ReadRequest {
    pub offset: Offset,
    pub max_bytes: usize,
    /// -1: not checked.
    pub current_leader_epoch: LeaderEpoch,
    /// Epoch of the last record that the client has; -1: not checked (KIP-595).
    pub last_fetched_epoch: LeaderEpoch,
}

/// Where a leader epoch ends: the first offset that is not its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct EpochEnd {
    pub leader_epoch: LeaderEpoch,
    pub end_offset: Offset,
}

/// What a fetch gets from one partition.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ReadResult {
    pub high_watermark: Offset,
    pub log_start_offset: Offset,
    /// Whole batches, in order; the first may begin below the asked offset.
    pub records: Vec<Bytes>,
    /// The client's log went another way after this point; there are no records then.
    pub diverging: Option<EpochEnd>,
}

/// An answer of ListOffsets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TimestampOffset {
    pub offset: Offset,
    /// -1 where the question was not about time.
    pub timestamp: i64,
    pub leader_epoch: LeaderEpoch,
}

impl From<StorageError> for ReadError {
    fn from(error: StorageError) -> Self {
        match error {
            StorageError::OffsetOutOfRange {
                offset,
                log_start_offset,
                log_end_offset,
            } => ReadError::OffsetOutOfRange {
                offset,
                log_start_offset,
                log_end_offset,
            },
            StorageError::Corrupt { .. } => ReadError::Corrupt(error.to_string()),
            other => ReadError::Storage(other.to_string()),
        }
    }
}

impl Replica {
    /// Checks the leader epoch that a request names, then that this replica leads.
    fn check_leader(&self, requested: LeaderEpoch) -> Result<Leadership, ReadError> {
        let leadership = *self.state.leadership.borrow();
        let current = leadership.leader_epoch;
        if requested != NO_EPOCH && requested < current {
            return Err(ReadError::FencedLeaderEpoch { requested, current });
        }
        if requested != NO_EPOCH && requested > current {
            return Err(ReadError::UnknownLeaderEpoch { requested, current });
        }
        if leadership.is_leader {
            Ok(leadership)
        } else {
            Err(ReadError::NotLeader {
                leader: self.leader_hint(),
            })
        }
    }

    /// Committed batches for a consumer; leader only. That an offset lies beyond the end is as far as is known
    /// here: see `leads_still`.
    pub async fn read(&self, request: ReadRequest) -> Result<ReadResult, ReadError> {
        self.check_leader(request.current_leader_epoch)?;
        let high_watermark = self.high_watermark();
        #[cfg(feature = "sabotage")]
        let high_watermark = if crate::sabotage::is(crate::sabotage::Sabotage::ReadUncommitted) {
            self.log.log_end_offset()
        } else {
            high_watermark
        };
        let mut result = ReadResult {
            high_watermark,
            log_start_offset: self.log.log_start_offset(),
            records: Vec::new(),
            diverging: self.divergence(&request),
        };
        if result.diverging.is_none() {
            result.records = self
                .read_below(high_watermark, request.offset, request.max_bytes)
                .await?;
        }
        Ok(result)
    }

    fn divergence(&self, request: &ReadRequest) -> Option<EpochEnd> {
        if request.last_fetched_epoch == NO_EPOCH {
            return None;
        }
        let end = epoch_end(
            &self.epoch_starts(),
            self.log.log_end_offset(),
            request.last_fetched_epoch,
        )?;
        let diverges =
            end.leader_epoch < request.last_fetched_epoch || end.end_offset < request.offset;
        diverges.then_some(end)
    }

    /// Committed batches from `offset` on, whole, in order; the first may begin below `offset`.
    /// Empty at the high watermark. Any replica may be asked.
    pub async fn read_committed_from(
        &self,
        offset: Offset,
        max_bytes: usize,
    ) -> Result<Vec<Bytes>, ReadError> {
        self.read_below(self.high_watermark(), offset, max_bytes)
            .await
    }

    async fn read_below(
        &self,
        limit: Offset,
        from: Offset,
        max_bytes: usize,
    ) -> Result<Vec<Bytes>, ReadError> {
        let (log_start_offset, log_end_offset) =
            (self.log.log_start_offset(), self.log.log_end_offset());
        if from < log_start_offset || from > log_end_offset {
            let offset = from;
            return Err(ReadError::OffsetOutOfRange {
                offset,
                log_start_offset,
                log_end_offset,
            });
        }
        // Written, but not committed yet: nothing to see.
        if from >= limit {
            return Ok(Vec::new());
        }
        if let Some(batches) = self.log.read_cached(from, limit, max_bytes) {
            return Ok(batches);
        }
        self.on_disk(move |log| log.read(from, limit, max_bytes))
            .await
    }

    /// Runs a read that may touch the disk where blocking is allowed.
    async fn on_disk<T: Send + 'static>(
        &self,
        read: impl FnOnce(&chronik_storage::PartitionLog) -> Result<T, StorageError> + Send + 'static,
    ) -> Result<T, ReadError> {
        blocking::run(&self.log, read)
            .await
            .map_err(|error| ReadError::Storage(error.to_string()))?
            .map_err(ReadError::from)
    }

    /// ListOffsets; None: there is no such record. Leader only.
    pub async fn list_offset(
        &self,
        timestamp: i64,
        current_leader_epoch: LeaderEpoch,
    ) -> Result<Option<TimestampOffset>, ReadError> {
        self.check_leader(current_leader_epoch)?;
        let is_start = matches!(timestamp, EARLIEST | EARLIEST_LOCAL);
        let leadership = match self.wait_until_ready().await {
            // Without a majority the start is what was last known, as for Kafka's new leaders. Records below
            // the high watermark can be read then too.
            Err(_) if is_start => self.check_leader(current_leader_epoch)?,
            settled => settled?,
        };
        let limit = self.high_watermark();
        let at = |offset| {
            let leader_epoch = self.epoch_of(offset);
            Some(TimestampOffset {
                offset,
                timestamp: -1,
                leader_epoch,
            })
        };
        match timestamp {
            LATEST => Ok(Some(TimestampOffset {
                offset: limit,
                timestamp: -1,
                leader_epoch: leadership.leader_epoch,
            })),
            EARLIEST | EARLIEST_LOCAL => Ok(at(self.log.log_start_offset())),
            // Nothing is tiered.
            LATEST_TIERED | EARLIEST_PENDING_UPLOAD => Ok(None),
            MAX_TIMESTAMP => {
                let batch = self
                    .on_disk(move |log| log.max_timestamp_batch(limit))
                    .await?;
                self.record_in(batch, |record, header| {
                    record.timestamp == header.max_timestamp
                })
                .await
            }
            timestamp if timestamp < 0 => Err(ReadError::UnsupportedTimestamp(timestamp)),
            timestamp => {
                let batch = self
                    .on_disk(move |log| log.batch_for_timestamp(timestamp, limit))
                    .await?;
                self.record_in(batch, move |record, _| record.timestamp >= timestamp)
                    .await
            }
        }
    }

    /// A new leader may not know yet how far its predecessor had committed: an answer from before
    /// could go back behind what was answered then.
    async fn wait_until_ready(&self) -> Result<Leadership, ReadError> {
        let mut receiver = self.state.leadership.subscribe();
        let settled = receiver.wait_for(|l| !l.is_leader || l.ready);
        match timeout(READY_WAIT, settled).await {
            Ok(Ok(leadership)) if leadership.ready => Ok(*leadership),
            _ => Err(ReadError::NotLeader {
                leader: self.leader_hint(),
            }),
        }
    }

    /// The first record of `batch` that is `wanted`, found where decompressing may take its time.
    async fn record_in(
        &self,
        batch: Option<Bytes>,
        wanted: impl Fn(RecordTime, &BatchHeader) -> bool + Send + 'static,
    ) -> Result<Option<TimestampOffset>, ReadError> {
        let Some(batch) = batch else { return Ok(None) };
        let search = move |_: &_| {
            let header = BatchHeader::parse(&batch).map_err(|error| error.to_string())?;
            let found = records::find_record(&batch, |record| wanted(record, &header))
                .map_err(|error| error.to_string())?;
            Ok(found.map(|record| TimestampOffset {
                offset: record.offset,
                timestamp: record.timestamp,
                leader_epoch: header.leader_epoch,
            }))
        };
        blocking::run(&self.log, search)
            .await
            .map_err(|error| ReadError::Storage(error.to_string()))?
            .map_err(ReadError::Corrupt)
    }

    /// Where leader epochs begin, as far as their records are still there.
    fn epoch_starts(&self) -> Vec<TermStart> {
        let mut starts = self.log.term_starts();
        forget_below(&mut starts, self.log.log_start_offset());
        starts
    }

    /// The epoch in which the record at `offset` was written, or would be.
    fn epoch_of(&self, offset: Offset) -> LeaderEpoch {
        let starts = self.log.term_starts();
        let covering = starts
            .iter()
            .rev()
            .find(|start| start.first_offset <= offset);
        covering.map_or(LeaderEpoch(0), |start| epoch_of_term(start.term))
    }

    /// OffsetForLeaderEpoch; None: the epoch is not known here. Leader only.
    pub fn epoch_end_offset(
        &self,
        current_leader_epoch: LeaderEpoch,
        leader_epoch: LeaderEpoch,
    ) -> Result<Option<EpochEnd>, ReadError> {
        self.check_leader(current_leader_epoch)?;
        Ok(epoch_end(
            &self.epoch_starts(),
            self.log.log_end_offset(),
            leader_epoch,
        ))
    }
}

fn epoch_of_term(term: u64) -> LeaderEpoch {
    // Terms that do not fit were refused when they were appended.
    LeaderEpoch::try_from(term).unwrap_or(LeaderEpoch(i32::MAX))
}

/// Forgets the epochs that end at or below the log start; the one that holds it begins there, as in
/// Apache Kafka's cache of leader epochs.
fn forget_below(starts: &mut Vec<TermStart>, log_start_offset: Offset) {
    let gone = starts.partition_point(|start| start.first_offset <= log_start_offset);
    starts.drain(..gone.saturating_sub(1));
    if let Some(first) = starts.first_mut() {
        first.first_offset = first.first_offset.max(log_start_offset);
    }
}

/// The largest epoch not above `asked`, and where it ends (KIP-101, KIP-279).
fn epoch_end(starts: &[TermStart], log_end_offset: Offset, asked: LeaderEpoch) -> Option<EpochEnd> {
    let asked_term = u64::try_from(asked.0).ok()?;
    let latest = starts.last()?;
    if asked_term == latest.term {
        return Some(EpochEnd {
            leader_epoch: asked,
            end_offset: log_end_offset,
        });
    }
    // Above the latest: unknown here.
    let next = starts.iter().position(|start| start.term > asked_term)?;
    let end_offset = starts.get(next)?.first_offset;
    let leader_epoch = match next.checked_sub(1).and_then(|floor| starts.get(floor)) {
        Some(floor) => epoch_of_term(floor.term),
        None => asked,
    };
    Some(EpochEnd {
        leader_epoch,
        end_offset,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn epochs_end_where_the_next_begins() {
        let start = |term, first_index, offset| TermStart {
            term,
            first_index,
            first_offset: Offset(offset),
        };
        let starts = [start(1, 1, 0), start(3, 5, 10), start(6, 9, 25)];
        let check = |asked, expected: Option<(i32, i64)>| {
            let end = epoch_end(&starts, Offset(40), LeaderEpoch(asked));
            assert_eq!(
                end.map(|e| (e.leader_epoch.0, e.end_offset.0)),
                expected,
                "{asked}"
            );
        };
        check(0, Some((0, 0)));
        check(1, Some((1, 10)));
        check(2, Some((1, 10)));
        check(3, Some((3, 25)));
        check(5, Some((3, 25)));
        check(6, Some((6, 40)));
        check(7, None);
        check(-1, None);
        // Epoch 1 is gone, and epoch 3 begins with what is left of it.
        let mut left = starts.to_vec();
        forget_below(&mut left, Offset(12));
        let end = |asked| epoch_end(&left, Offset(40), LeaderEpoch(asked));
        let ends = [1, 2, 3, 6].map(|asked| end(asked).map(|e| (e.leader_epoch.0, e.end_offset.0)));
        assert_eq!(
            ends,
            [Some((1, 12)), Some((2, 12)), Some((3, 25)), Some((6, 40))]
        );
        assert_eq!(epoch_end(&[], Offset(0), LeaderEpoch(1)), None);
    }
}
