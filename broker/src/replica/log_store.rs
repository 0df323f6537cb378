//! openraft's log storage over the partition's log, and the one place where offsets are given out.
//!
//! Invariant: an entry's batches get their offsets when it is appended on its leader, from the end
//! of the very log it is appended to, so offsets are contiguous in the order of the Raft log.
//! Entries that come from a leader carry theirs, and must continue the log.

use std::fmt::Debug;
use std::io;
use std::ops::{Bound, RangeBounds, RangeInclusive};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use chronik_storage::{LogEntry, OnDurable, PartitionLog, Payload, StorageError};
use chronik_telemetry::SpanKind;
use chronik_telemetry::trace;
use chronik_types::epoch::LeaderEpoch;
use chronik_types::offset::Offset;
use chronik_types::record_batch;
use futures::{Stream, stream};
use openraft::entry::EntryPayload;
use openraft::storage::{IOFlushed, LogState, RaftLogReader, RaftLogStorage};
use tokio::sync::oneshot;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::codec;
use super::growth::Growth;
use super::in_flight::Pending;
use super::raft_config::{
    Batches, Entry, EntryData, LogId, REPLICATION_READ_SIZE_MAX, TypeConfig, Vote,
};
use super::traces::Traces;
use crate::blocking;

/// How often an append tries again while the storage's memory is full, and how often it says so.
const MEMORY_RETRY_MIN: Duration = Duration::from_millis(5);
const MEMORY_RETRY_MAX: Duration = Duration::from_millis(100);
const MEMORY_WARN_INTERVAL: Duration = Duration::from_secs(10);

/// The log of one group as openraft sees it. Clones share everything.
#[derive(Clone)]
pub struct LogStore {
    log: PartitionLog,
    traces: Arc<Traces>,
    growth: Arc<Growth>,
    /// The instance that this store serves is being closed: nothing waits for room any more.
    closing: CancellationToken,
}

/// The last entry that Raft cannot read any more.
pub(super) fn purged(log: &PartitionLog) -> Option<LogId> {
    log.purged()
        .map(|purged| codec::log_id(purged.term, purged.index))
}

fn io_error(error: StorageError) -> io::Error {
    io::Error::other(error)
}

fn invalid(what: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}

/// An entry of the log as Raft knows it.
pub(super) fn to_raft(entry: LogEntry, traces: &Traces) -> io::Result<Entry> {
    let payload = match entry.payload {
        Payload::Blank => EntryPayload::Blank,
        Payload::Membership(bytes) => {
            EntryPayload::Membership(codec::decode_membership(&bytes).map_err(invalid)?)
        }
        Payload::Control(bytes) => {
            let control = codec::decode_control(&bytes).map_err(invalid)?;
            EntryPayload::Normal(EntryData::Control(control))
        }
        Payload::Batches { bytes, .. } => {
            let batches = Batches::stamped(bytes, traces.get(entry.index));
            EntryPayload::Normal(EntryData::Batches(batches))
        }
    };
    Ok(Entry {
        log_id: codec::log_id(entry.term, entry.index),
        payload,
    })
}

impl LogStore {
    pub fn new(
        log: PartitionLog,
        traces: Arc<Traces>,
        growth: Arc<Growth>,
        closing: CancellationToken,
    ) -> LogStore {
        LogStore {
            log,
            traces,
            growth,
            closing,
        }
    }

    fn purged(&self) -> Option<LogId> {
        purged(&self.log)
    }

    /// The part of `range` that Raft may see, half-open.
    fn visible(&self, range: impl RangeBounds<u64>) -> std::ops::Range<u64> {
        let start = match range.start_bound() {
            Bound::Included(index) => *index,
            Bound::Excluded(index) => index.saturating_add(1),
            Bound::Unbounded => 0,
        };
        let end = match range.end_bound() {
            Bound::Included(index) => index.saturating_add(1),
            Bound::Excluded(index) => *index,
            Bound::Unbounded => u64::MAX,
        };
        let next = self
            .log
            .last_entry_id()
            .map_or(0, |(index, _)| index.saturating_add(1));
        start.max(self.log.first_index())..end.min(next)
    }

    /// Up to `max_bytes` of entries, at least one; from memory where they are there.
    async fn read(&self, range: std::ops::Range<u64>, max_bytes: usize) -> io::Result<Vec<Entry>> {
        if range.is_empty() {
            return Ok(Vec::new());
        }
        let entries = match self.log.read_entries_cached(range.clone(), max_bytes) {
            Some(entries) => entries,
            None => blocking::run(&self.log, move |log| log.read_entries(range, max_bytes))
                .await
                .map_err(io::Error::other)?
                .map_err(io_error)?,
        };
        entries
            .into_iter()
            .map(|entry| to_raft(entry, &self.traces))
            .collect()
    }

    /// Exactly the entries of `range`, however many bytes they have.
    async fn read_all(&self, range: std::ops::Range<u64>) -> io::Result<Vec<Entry>> {
        let mut out: Vec<Entry> = Vec::new();
        let mut next = range.start;
        while next < range.end {
            let part = self.read(next..range.end, usize::MAX).await?;
            match part.last() {
                Some(last) => next = last.log_id.index.saturating_add(1),
                None => return Err(invalid(format!("log entry {next} is missing"))),
            }
            out.extend(part);
        }
        Ok(out)
    }

    /// Appends; waits while the storage holds all the data in memory that it may, for as long as
    /// that takes: an error here would end this instance of Raft. Flushes and other groups' commits make
    /// room in memory. The disk's room was asked for where the entries came in, since Raft does nothing else
    /// meanwhile, not even vote. A storage that fails or closes ends the wait, and so does the closing of the
    /// instance, which waits for this.
    async fn append_when_memory_allows(
        &self,
        entries: Vec<LogEntry>,
        when_durable: WhenDurable,
    ) -> io::Result<()> {
        let when_durable = Arc::new(Mutex::new(Some(when_durable)));
        let mut pause = MEMORY_RETRY_MIN;
        let mut warn_at = Instant::now() + MEMORY_WARN_INTERVAL;
        loop {
            match self
                .log
                .append(entries.clone(), self::callback(&when_durable))
            {
                Ok(()) => return Ok(()),
                Err(error @ StorageError::Overloaded { .. }) => {
                    if Instant::now() >= warn_at {
                        let raft_group_id = self.log.group_id();
                        tracing::warn!(%raft_group_id, %error, "an append waits for room in memory");
                        warn_at = Instant::now() + MEMORY_WARN_INTERVAL;
                    }
                }
                Err(error) => return Err(io_error(error)),
            }
            tokio::select! {
                () = tokio::time::sleep(pause) => {}
                () = self.closing.cancelled() => {
                    return Err(io::Error::other("the replica is closed while an append waits for room in memory"));
                }
            }
            pause = pause.saturating_mul(2).min(MEMORY_RETRY_MAX);
        }
    }

    /// The key log ids that openraft wants at its start: the last log id of each leader.
    fn last_of_each_term(&self, range: RangeInclusive<LogId>) -> Vec<LogId> {
        let (first, last) = (range.start(), range.end());
        let starts = self.log.term_starts();
        let mut out = Vec::new();
        for (position, start) in starts.iter().enumerate() {
            let end = match starts.get(position + 1) {
                Some(next) => next.first_index.saturating_sub(1).min(last.index),
                None => last.index,
            };
            if end >= first.index && start.first_index <= last.index {
                out.push(codec::log_id(start.term, end));
            }
        }
        out
    }
}

/// What an append leaves to be done once it is durable.
struct WhenDurable {
    pending: Vec<Pending>,
    spans: Vec<trace::Span>,
    flushed: IOFlushed<TypeConfig>,
}

impl WhenDurable {
    fn run(self, result: Result<(), StorageError>) {
        drop(self.spans);
        if result.is_ok() {
            for pending in self.pending {
                pending.durable();
            }
        }
        self.flushed.io_completed(result.map_err(io_error));
    }
}

/// A callback for one try of an append; `when_durable` stays where it is if the try is refused.
fn callback(when_durable: &Arc<Mutex<Option<WhenDurable>>>) -> OnDurable {
    let when_durable = when_durable.clone();
    Box::new(move |result| {
        let taken = when_durable
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        if let Some(when_durable) = taken {
            when_durable.run(result);
        }
    })
}

/// Writes offsets and epoch into the batches of an entry; they begin at `base_offset`.
fn stamp(bytes: Bytes, base_offset: Offset, epoch: LeaderEpoch) -> io::Result<(Bytes, Offset)> {
    // The proposer built the buffer and gave it away, so it is unique and nothing is copied.
    let mut buffer = bytes
        .try_into_mut()
        .unwrap_or_else(|shared| BytesMut::from(&shared[..]));
    let mut offset = base_offset;
    let mut position = 0;
    while position < buffer.len() {
        let header = record_batch::BatchHeader::parse(&buffer[position..]).map_err(invalid)?;
        record_batch::stamp(&mut buffer[position..], offset, epoch);
        offset = offset.plus(i64::from(header.last_offset_delta)).plus(1);
        position += header.size_bytes();
    }
    Ok((buffer.freeze(), offset))
}

/// The offset after the stamped batches of an entry, which must begin at `base_offset`.
fn check_stamped(bytes: &[u8], base_offset: Offset) -> io::Result<Offset> {
    let mut expected = base_offset;
    for batch in record_batch::batches(bytes) {
        let (_, header) = batch.map_err(invalid)?;
        if header.base_offset != expected || header.last_offset_delta < 0 {
            return Err(invalid(format!(
                "batch at offset {} with last offset delta {} does not continue the log at {}",
                header.base_offset, header.last_offset_delta, expected
            )));
        }
        expected = header.next_offset();
    }
    Ok(expected)
}

/// Runs a write and waits until it is durable.
pub(super) async fn durably(
    write: impl FnOnce(OnDurable) -> Result<(), StorageError>,
) -> io::Result<()> {
    let (on_durable, receiver) = told_when_durable();
    write(on_durable).map_err(io_error)?;
    receiver.await.map_err(io::Error::other)?.map_err(io_error)
}

fn told_when_durable() -> (OnDurable, oneshot::Receiver<Result<(), StorageError>>) {
    let (sender, receiver) = oneshot::channel();
    let on_durable: OnDurable = Box::new(move |result| {
        // Nobody waits any more if Raft is shutting down.
        let _ = sender.send(result);
    });
    (on_durable, receiver)
}

impl RaftLogReader<TypeConfig> for LogStore {
    async fn try_get_log_entries<RB>(&mut self, range: RB) -> io::Result<Vec<Entry>>
    where
        RB: RangeBounds<u64> + Clone + Debug + Send,
    {
        self.read_all(self.visible(range)).await
    }

    /// For replication: as much as fits one message.
    async fn limited_get_log_entries(&mut self, start: u64, end: u64) -> io::Result<Vec<Entry>> {
        let range = self.visible(start..end);
        if range.start != start && start < end {
            return Err(invalid(format!("log entry {start} is missing")));
        }
        self.read(range, REPLICATION_READ_SIZE_MAX).await
    }

    /// For apply: piece by piece, so that a long catch-up is never in memory at once.
    async fn entries_stream<RB>(
        &mut self,
        range: RB,
    ) -> impl Stream<Item = io::Result<Entry>> + Send
    where
        RB: RangeBounds<u64> + Clone + Debug + Send,
    {
        struct State {
            store: LogStore,
            range: std::ops::Range<u64>,
            ready: std::vec::IntoIter<Entry>,
        }
        let range = self.visible(range);
        let state = State {
            store: self.clone(),
            range,
            ready: Vec::new().into_iter(),
        };
        Box::pin(stream::try_unfold(state, |mut state| async move {
            if let Some(entry) = state.ready.next() {
                return Ok(Some((entry, state)));
            }
            if state.range.is_empty() {
                return Ok(None);
            }
            let part = state
                .store
                .read(state.range.clone(), REPLICATION_READ_SIZE_MAX)
                .await?;
            let Some(last) = part.last() else {
                return Err(invalid(format!(
                    "log entry {} is missing",
                    state.range.start
                )));
            };
            state.range.start = last.log_id.index.saturating_add(1);
            state.ready = part.into_iter();
            Ok(state.ready.next().map(|entry| (entry, state)))
        }))
    }

    async fn read_vote(&mut self) -> io::Result<Option<Vote>> {
        self.log
            .vote()
            .map(|bytes| codec::decode_vote(&bytes).map_err(invalid))
            .transpose()
    }

    async fn get_key_log_ids(&mut self, range: RangeInclusive<LogId>) -> io::Result<Vec<LogId>> {
        Ok(self.last_of_each_term(range))
    }
}

impl RaftLogStorage<TypeConfig> for LogStore {
    type LogReader = LogStore;

    async fn get_log_state(&mut self) -> io::Result<LogState<TypeConfig>> {
        let last_purged_log_id = self.purged();
        let last = self
            .log
            .last_entry_id()
            .map(|(index, term)| codec::log_id(term, index));
        Ok(LogState {
            last_purged_log_id,
            last_log_id: last.max(last_purged_log_id),
        })
    }

    async fn get_log_reader(&mut self) -> LogStore {
        self.clone()
    }

    async fn save_vote(&mut self, vote: &Vote) -> io::Result<()> {
        let bytes = codec::encode_vote(vote);
        durably(|on_durable| self.log.save_vote(bytes, on_durable)).await
    }

    async fn save_committed(&mut self, committed: Option<LogId>) -> io::Result<()> {
        if let Some(committed) = committed {
            self.log.set_committed(committed.index);
        }
        Ok(())
    }

    async fn read_committed(&mut self) -> io::Result<Option<LogId>> {
        let Some(index) = self.log.committed() else {
            return Ok(None);
        };
        let term = self.log.term_at(index).map_err(io_error)?;
        Ok(term.map(|term| codec::log_id(term, index)))
    }

    async fn append<I>(&mut self, entries: I, callback: IOFlushed<TypeConfig>) -> io::Result<()>
    where
        I: IntoIterator<Item = Entry> + Send,
        I::IntoIter: Send,
    {
        let mut end = self.log.log_end_offset();
        let mut when_durable = WhenDurable {
            pending: Vec::new(),
            spans: Vec::new(),
            flushed: callback,
        };
        let mut out = Vec::new();
        for entry in entries {
            let (index, term) = (entry.log_id.index, codec::term(&entry.log_id));
            let payload = match entry.payload {
                EntryPayload::Blank => Payload::Blank,
                EntryPayload::Membership(m) => Payload::Membership(codec::encode_membership(&m)),
                EntryPayload::Normal(EntryData::Control(control)) => {
                    Payload::Control(codec::encode_control(control))
                }
                EntryPayload::Normal(EntryData::Batches(batches)) => {
                    let Batches {
                        bytes,
                        pending,
                        trace,
                    } = batches;
                    let base_offset = end;
                    let bytes = match pending {
                        Some(pending) => {
                            let epoch = LeaderEpoch::try_from(term).map_err(invalid)?;
                            let (bytes, next) = stamp(bytes, base_offset, epoch)?;
                            pending.appended(base_offset, index);
                            when_durable.pending.push(pending);
                            end = next;
                            bytes
                        }
                        None => {
                            end = check_stamped(&bytes, base_offset)?;
                            bytes
                        }
                    };
                    if let Some(trace) = trace {
                        let span = trace::span(Some(&trace), "wal.append", SpanKind::Internal);
                        when_durable.spans.extend(span);
                        self.traces.insert(index, trace);
                    }
                    Payload::Batches {
                        bytes,
                        base_offset,
                        next_offset: end,
                    }
                }
            };
            out.push(LogEntry {
                index,
                term,
                payload,
            });
        }
        let appended = self.append_when_memory_allows(out, when_durable).await;
        self.growth.grew(self.log.group_id());
        appended
    }

    async fn truncate_after(&mut self, last_log_id: Option<LogId>) -> io::Result<()> {
        let index = last_log_id.map(|log_id| log_id.index);
        durably(|on_durable| self.log.truncate_after(index, on_durable)).await
    }

    /// Moves the first entry that Raft may read; the records stay until the log start offset passes
    /// them. The replica's state as of `log_id` or later was saved before (`Replica::purge`).
    async fn purge(&mut self, log_id: LogId) -> io::Result<()> {
        let (on_durable, receiver) = told_when_durable();
        // It looks the entry up, which may need the disk.
        blocking::run(&self.log, move |log| log.purge(log_id.index, on_durable))
            .await
            .map_err(io::Error::other)?
            .map_err(io_error)?;
        receiver.await.map_err(io::Error::other)?.map_err(io_error)
    }
}
