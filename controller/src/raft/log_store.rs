//! Raft log and vote over the database.
//!
//! Invariant: an entry is readable as soon as `append` returns and reported durable only after the
//! transaction that holds it is synced. Writes reach the disk in the order in which they came. The
//! newest entries stay in memory up to a budget; older ones are read from the database.

use std::collections::BTreeMap;
use std::fmt::Debug;
use std::io;
use std::ops::{Bound, RangeBounds};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use openraft::storage::{IOFlushed, LogState, RaftLogReader, RaftLogStorage};
use openraft::{EntryPayload, OptionalSend};
use tokio::sync::watch;

use super::codec;
use super::type_config::{Entry, LogId, RaftVote, TypeConfig};
use crate::db::{Contents, Db, DbError};

/// Bytes of commands that stay in memory.
const CACHE_BYTES_MAX: usize = 32 * 1024 * 1024;
/// Bytes of commands in one message to a follower.
const MESSAGE_BYTES_MAX: usize = 1024 * 1024;

/// Cheap to clone; all clones are one log.
#[derive(Debug, Clone)]
pub struct LogStore {
    db: Db,
    cache: Arc<Mutex<Cache>>,
    growth: Growth,
}

/// How many bytes of commands the log holds, about. Cheap to clone; all clones are one.
#[derive(Debug, Clone, Default)]
pub struct Growth {
    bytes: watch::Sender<u64>,
}

impl Growth {
    /// Waits until there are more than `max`.
    pub async fn exceeds(&self, max: u64) {
        let mut bytes = self.bytes.subscribe();
        // It ends with the last clone, and `self` is one.
        let _ = bytes.wait_for(|bytes| *bytes > max).await;
    }
}

#[derive(Debug, Default)]
struct Cache {
    entries: BTreeMap<u64, Entry>,
    bytes: usize,
    last: Option<LogId>,
    purged: Option<LogId>,
    vote: Option<RaftVote>,
}

impl LogStore {
    pub fn new(db: Db, contents: &mut Contents) -> Result<Self, DbError> {
        let mut cache = Cache {
            vote: contents.vote.map(codec::vote_from_row),
            purged: contents.purged.map(codec::log_id),
            ..Cache::default()
        };
        cache.last = cache.purged;
        let mut bytes = 0_u64;
        for row in std::mem::take(&mut contents.log) {
            let entry = codec::entry_from_row(row)?;
            bytes = bytes.saturating_add(size(&entry) as u64);
            cache.push(entry);
        }
        let growth = Growth::default();
        growth.bytes.send_replace(bytes);
        Ok(Self {
            db,
            cache: Arc::new(Mutex::new(cache)),
            growth,
        })
    }

    pub fn growth(&self) -> Growth {
        self.growth.clone()
    }

    fn lock(&self) -> MutexGuard<'_, Cache> {
        self.cache.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Entries of `start..end` that exist, from memory where possible.
    async fn read(&self, start: u64, end: u64) -> io::Result<Vec<Entry>> {
        if start >= end {
            return Ok(Vec::new());
        }
        let (cached, missing_end) = {
            let cache = self.lock();
            let cached: Vec<Entry> = cache
                .entries
                .range(start..end)
                .map(|(_, entry)| entry.clone())
                .collect();
            (cached, cache.uncached_end(start, end))
        };
        if missing_end <= start {
            return Ok(cached);
        }
        // The worker reads after all appends that were sent before.
        let rows = self.db.read_log(start..=missing_end - 1).await?;
        let mut entries = Vec::with_capacity(rows.len() + cached.len());
        for row in rows {
            entries.push(codec::entry_from_row(row)?);
        }
        entries.extend(cached);
        Ok(entries)
    }
}

impl Cache {
    fn push(&mut self, entry: Entry) {
        self.last = Some(entry.log_id);
        self.bytes = self.bytes.saturating_add(size(&entry));
        if let Some(replaced) = self.entries.insert(entry.log_id.index, entry) {
            self.bytes = self.bytes.saturating_sub(size(&replaced));
        }
        while self.bytes > CACHE_BYTES_MAX && self.entries.len() > 1 {
            if let Some((_, oldest)) = self.entries.pop_first() {
                self.bytes = self.bytes.saturating_sub(size(&oldest));
            }
        }
    }

    /// End of the part of `start..end` that is in the log and not in memory.
    fn uncached_end(&self, start: u64, end: u64) -> u64 {
        let first_in_log = self
            .purged
            .map_or(0, |purged| purged.index.saturating_add(1));
        let next_index = self.last.map_or(0, |last| last.index.saturating_add(1));
        // After a truncation there may be entries, none of them in memory.
        let first_cached = self
            .entries
            .first_key_value()
            .map_or(next_index, |(index, _)| *index);
        if first_cached <= first_in_log.max(start) {
            start
        } else {
            first_cached.min(end)
        }
    }

    fn retain(&mut self, keep: impl Fn(u64) -> bool) {
        self.entries.retain(|index, _| keep(*index));
        self.bytes = self.entries.values().map(size).sum();
    }
}

fn size(entry: &Entry) -> usize {
    match &entry.payload {
        EntryPayload::Normal(proposal) => proposal.0.len().saturating_add(64),
        EntryPayload::Blank | EntryPayload::Membership(_) => 64,
    }
}

impl RaftLogReader<TypeConfig> for LogStore {
    async fn try_get_log_entries<RB>(&mut self, range: RB) -> io::Result<Vec<Entry>>
    where
        RB: RangeBounds<u64> + Clone + Debug + OptionalSend,
    {
        let start = match range.start_bound() {
            Bound::Included(start) => *start,
            Bound::Excluded(start) => start.saturating_add(1),
            Bound::Unbounded => 0,
        };
        let end = match range.end_bound() {
            Bound::Included(end) => end.saturating_add(1),
            Bound::Excluded(end) => *end,
            Bound::Unbounded => u64::MAX,
        };
        self.read(start, end).await
    }

    async fn read_vote(&mut self) -> io::Result<Option<RaftVote>> {
        Ok(self.lock().vote)
    }

    async fn limited_get_log_entries(&mut self, start: u64, end: u64) -> io::Result<Vec<Entry>> {
        let mut entries = self.read(start, end).await?;
        let mut bytes = 0_usize;
        let fitting = entries
            .iter()
            .take_while(|entry| {
                bytes = bytes.saturating_add(size(entry));
                bytes <= MESSAGE_BYTES_MAX
            })
            .count();
        entries.truncate(fitting.max(1));
        Ok(entries)
    }
}

impl RaftLogStorage<TypeConfig> for LogStore {
    type LogReader = Self;

    async fn get_log_state(&mut self) -> io::Result<LogState<TypeConfig>> {
        let cache = self.lock();
        Ok(LogState {
            last_purged_log_id: cache.purged,
            last_log_id: cache.last,
        })
    }

    async fn get_log_reader(&mut self) -> Self {
        self.clone()
    }

    async fn save_vote(&mut self, vote: &RaftVote) -> io::Result<()> {
        self.db.save_vote(codec::vote_row(vote)).await?;
        self.lock().vote = Some(*vote);
        Ok(())
    }

    async fn append<I>(&mut self, entries: I, callback: IOFlushed<TypeConfig>) -> io::Result<()>
    where
        I: IntoIterator<Item = Entry> + OptionalSend,
        I::IntoIter: OptionalSend,
    {
        let mut rows = Vec::new();
        let mut bytes = 0_u64;
        {
            let mut cache = self.lock();
            for entry in entries {
                rows.push(codec::log_row(&entry)?);
                bytes = bytes.saturating_add(size(&entry) as u64);
                cache.push(entry);
            }
        }
        let grown = |known: &mut u64| *known = known.saturating_add(bytes);
        self.growth.bytes.send_modify(grown);
        let done = Box::new(|result: Result<(), DbError>| {
            callback.io_completed(result.map_err(io::Error::from));
        });
        self.db.append(rows, done).await;
        Ok(())
    }

    async fn truncate_after(&mut self, last_log_id: Option<LogId>) -> io::Result<()> {
        let index = last_log_id.map(|log_id| log_id.index);
        {
            let mut cache = self.lock();
            cache.retain(|cached| index.is_some_and(|index| cached <= index));
            // Nothing changes where the log ends before that already.
            cache.last = cache.last.min(last_log_id.max(cache.purged));
        }
        Ok(self.db.truncate_after(index).await?)
    }

    async fn purge(&mut self, log_id: LogId) -> io::Result<()> {
        {
            let mut cache = self.lock();
            cache.purged = cache.purged.max(Some(log_id));
            cache.last = cache.last.max(Some(log_id));
            cache.retain(|cached| cached > log_id.index);
            // The newest entries, which are what is left, are in memory.
            self.growth.bytes.send_replace(cache.bytes as u64);
        }
        Ok(self.db.purge(codec::position(&log_id)).await?)
    }
}
