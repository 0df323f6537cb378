//! The first half of a pass: learns the newest offset of every key, and which transactions were
//! aborted.
//!
//! Invariant: only committed records count as newest. What is learned covers all up to `end` and no
//! transaction lies across it, so what it says of a record is final. Memory is bounded: where the map
//! is full, the pass ends, and the next one goes on from there.

use std::collections::HashMap;
use std::collections::hash_map::RandomState;
use std::hash::{BuildHasher, Hasher};
use std::ops::ControlFlow;

use bytes::Bytes;
use chronik_types::offset::Offset;
use chronik_types::record_batch::BatchHeader;

use super::records::{self, Record};
use crate::error::StorageError;
use crate::partition_log::Log;
use crate::segment::Segment;
use crate::segment::verify::Pace;

/// What a key costs in the map, with the room that a hash map leaves free.
const BYTES_PER_KEY: usize = 64;
const KEYS_MIN: usize = 16;

/// A key's place in the map. Two hashes with secret seeds: that two keys meet is as good as
/// impossible, also for who chooses them.
type Hash = (u64, u64);

/// What a pass knows of the log.
pub struct Learned {
    hashers: [RandomState; 2],
    newest: HashMap<Hash, i64>,
    /// By producer: the first offset of each aborted transaction, and its marker's.
    aborted: HashMap<i64, Vec<(Offset, Offset)>>,
    /// Up to here all is known.
    pub end: Offset,
    keys_max: usize,
    pending: HashMap<i64, Pending>,
    pending_keys: usize,
    is_full: bool,
}

/// A transaction whose marker did not come yet.
struct Pending {
    first_offset: Offset,
    keys: Vec<(Hash, i64)>,
}

impl Learned {
    pub fn new(start: Offset, map_max_bytes: usize) -> Self {
        Learned {
            hashers: [RandomState::new(), RandomState::new()],
            newest: HashMap::new(),
            aborted: HashMap::new(),
            end: start,
            keys_max: (map_max_bytes / BYTES_PER_KEY).max(KEYS_MIN),
            pending: HashMap::new(),
            pending_keys: 0,
            is_full: false,
        }
    }

    /// Reads the part of `segments` from `self.end` on. Gives `Break` if `pace` did.
    pub fn learn(
        &mut self,
        log: &Log,
        segments: &[Segment],
        read_bytes: &mut u64,
        pace: &mut Pace<'_>,
    ) -> Result<ControlFlow<()>, StorageError> {
        let start = self.end;
        for segment in segments.iter().filter(|s| s.next_offset > start) {
            let is_full = std::cell::Cell::new(false);
            let mut visit = |_: &_, header: &BatchHeader, _: u64, batch: &Bytes| {
                if header.next_offset() > start && !is_full.get() {
                    self.batch(log, header, batch)?;
                    is_full.set(self.is_full);
                }
                Ok(())
            };
            let mut has_stopped = false;
            let mut paced = |bytes: u64| {
                *read_bytes += bytes;
                has_stopped = pace(bytes).is_break();
                match has_stopped || is_full.get() {
                    true => ControlFlow::Break(()),
                    false => ControlFlow::Continue(()),
                }
            };
            let verified = log.view(*segment).verify(&mut visit, &mut paced);
            let _ = log
                .explain(segment, verified)?
                .ok_or(StorageError::Superseded)?;
            if has_stopped {
                return Ok(ControlFlow::Break(()));
            }
            if self.is_full {
                break;
            }
            self.end = segment.next_offset;
        }
        // A transaction that is still open is for a later pass, as a whole.
        let open = self
            .pending
            .drain()
            .map(|(_, pending)| pending.first_offset);
        self.end = open.fold(self.end, Offset::min);
        Ok(ControlFlow::Continue(()))
    }

    /// Whether a later record of this key is known.
    pub fn is_superseded(&self, key: &[u8], offset: Offset) -> bool {
        let newest = self.newest.get(&self.hash(key));
        newest.is_some_and(|newest| *newest > offset.0)
    }

    pub fn is_aborted(&self, header: &BatchHeader) -> bool {
        header.is_transactional()
            && self
                .aborted
                .get(&header.producer_id.0)
                .is_some_and(|ranges| {
                    let is_in = |(first, marker): &(Offset, Offset)| {
                        (*first..*marker).contains(&header.base_offset)
                    };
                    ranges.iter().any(is_in)
                })
    }

    fn batch(
        &mut self,
        log: &Log,
        header: &BatchHeader,
        batch: &Bytes,
    ) -> Result<(), StorageError> {
        let body = records::body_of(header, batch);
        let body = body.map_err(|e| uncleanable(log, header, &e))?;
        let records = records::records_of(header, &body);
        let records = records.map_err(|e| uncleanable(log, header, &e))?;
        let used = self.newest.len() + self.pending_keys;
        if used > 0 && used + records.len() > self.keys_max {
            self.is_full = true;
            return Ok(());
        }
        self.end = header.next_offset();
        if header.is_control() {
            self.marker(header, &records);
            return Ok(());
        }
        for record in &records {
            let Some(key) = record.key else { continue };
            let hash = self.hash(key);
            let offset = header.base_offset.0 + i64::from(record.offset_delta);
            if header.is_transactional() {
                self.pending_keys += 1;
                let pending = self.pending_of(header);
                pending.keys.push((hash, offset));
            } else {
                self.found(hash, offset);
            }
        }
        if header.is_transactional() {
            self.pending_of(header);
        }
        Ok(())
    }

    fn pending_of(&mut self, header: &BatchHeader) -> &mut Pending {
        let pending = self.pending.entry(header.producer_id.0);
        pending.or_insert_with(|| Pending {
            first_offset: header.base_offset,
            keys: Vec::new(),
        })
    }

    fn marker(&mut self, header: &BatchHeader, records: &[Record<'_>]) {
        let Some(is_abort) = records::is_abort(records) else {
            return;
        };
        let producer = header.producer_id.0;
        let Some(pending) = self.pending.remove(&producer) else {
            return;
        };
        self.pending_keys -= pending.keys.len();
        if is_abort {
            let range = (pending.first_offset, header.base_offset);
            self.aborted.entry(producer).or_default().push(range);
        } else {
            for (hash, offset) in pending.keys {
                self.found(hash, offset);
            }
        }
    }

    fn found(&mut self, hash: Hash, offset: i64) {
        let newest = self.newest.entry(hash).or_insert(offset);
        *newest = offset.max(*newest);
    }

    fn hash(&self, key: &[u8]) -> Hash {
        let [first, second] = self.hashers.each_ref().map(|state| {
            let mut hasher = state.build_hasher();
            hasher.write(key);
            hasher.finish()
        });
        (first, second)
    }
}

/// The batch's bytes are what was appended, but no records.
pub fn uncleanable(log: &Log, header: &BatchHeader, error: &std::io::Error) -> StorageError {
    StorageError::Uncleanable {
        group: log.group,
        offset: header.base_offset,
        why: error.to_string().into(),
    }
}
