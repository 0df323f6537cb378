//! What a partition remembers of idempotent producers (KIP-98): epoch and the last batches of each,
//! so that a retry gets the answer of the first try and nothing is appended twice or out of order.
//!
//! Invariant: every replica builds the table from the committed log. `check` never changes it; only
//! `apply` does, with committed batches, and `expire`, which may forget a producer but never
//! remembers one differently.

use std::collections::{HashMap, VecDeque};

use bytes::{BufMut, Bytes, BytesMut};
use chronik_types::epoch::ProducerEpoch;
use chronik_types::id::ProducerId;
use chronik_types::offset::Offset;
use chronik_types::record_batch::{BatchHeader, sequence_plus};

use super::codec::{DecodeError, Reader, put_count, put_version};
use super::error::AppendError;

/// Batches remembered per producer: its largest number of requests in flight (KIP-98).
const BATCHES_MAX: usize = 5;
/// Producers remembered per partition; beyond it the one that was silent for longest goes.
pub const PRODUCERS_MAX: usize = 10_000;
/// Kafka's producer.id.expiration.ms.
pub const PRODUCER_EXPIRATION_MS: i64 = 24 * 60 * 60 * 1000;

/// What is needed of a batch to check its sequence.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sequence {
    pub producer_id: ProducerId,
    pub epoch: ProducerEpoch,
    pub first: i32,
    pub last: i32,
}

impl Sequence {
    /// None for a batch that is not idempotent.
    pub fn of(header: &BatchHeader) -> Option<Sequence> {
        header.is_idempotent().then(|| Sequence {
            producer_id: header.producer_id,
            epoch: header.producer_epoch,
            first: header.base_sequence,
            last: header.last_sequence(),
        })
    }
}

/// What `check` found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// The batch comes next.
    Append,
    /// The batch is in the log already, at this base offset.
    Duplicate(Offset),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Batch {
    first: i32,
    last: i32,
    base_offset: Offset,
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Producer {
    epoch: ProducerEpoch,
    /// Oldest first, at most `BATCHES_MAX`; all of `epoch`.
    batches: VecDeque<Batch>,
    /// Offset of its last batch: who was silent for longest has the lowest.
    last_offset: Offset,
    last_seen_ms: i64,
}

/// The idempotent producers of one partition.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ProducerTable {
    producers: HashMap<ProducerId, Producer>,
}

/// The rules that relate a batch to its producer's last one. `last` is the last sequence number in
/// `current` epoch, if there is one.
fn check_next(
    sequence: &Sequence,
    current: ProducerEpoch,
    last: Option<i32>,
) -> Result<(), AppendError> {
    if sequence.epoch < current {
        return Err(AppendError::InvalidProducerEpoch {
            producer_id: sequence.producer_id,
            epoch: sequence.epoch,
            current,
        });
    }
    // A new epoch starts at 0.
    let expected = match last {
        Some(last) if sequence.epoch == current => sequence_plus(last, 1),
        _ => 0,
    };
    if sequence.first != expected {
        return Err(AppendError::OutOfOrderSequence {
            producer_id: sequence.producer_id,
            sequence: sequence.first,
            expected,
        });
    }
    Ok(())
}

impl ProducerTable {
    /// Whether the batch may be appended after all that is in the log.
    pub fn check(&self, sequence: &Sequence) -> Result<Verdict, AppendError> {
        // A producer that is not known may begin anywhere: its earlier records may be gone by
        // retention, or it was silent for too long (Kafka does the same since 2.5).
        let Some(producer) = self.producers.get(&sequence.producer_id) else {
            return Ok(Verdict::Append);
        };
        if sequence.epoch == producer.epoch {
            let same = |b: &&Batch| b.first == sequence.first && b.last == sequence.last;
            if let Some(batch) = producer.batches.iter().find(same) {
                return Ok(Verdict::Duplicate(batch.base_offset));
            }
        }
        check_next(
            sequence,
            producer.epoch,
            producer.batches.back().map(|b| b.last),
        )?;
        Ok(Verdict::Append)
    }

    /// Takes in a committed batch.
    pub fn apply(&mut self, header: &BatchHeader, now_ms: i64) {
        let Some(sequence) = Sequence::of(header) else {
            return;
        };
        let producer = self
            .producers
            .entry(sequence.producer_id)
            .or_insert_with(|| Producer {
                epoch: sequence.epoch,
                batches: VecDeque::with_capacity(BATCHES_MAX),
                last_offset: header.last_offset(),
                last_seen_ms: now_ms,
            });
        if producer.epoch != sequence.epoch {
            producer.epoch = sequence.epoch;
            producer.batches.clear();
        }
        if producer.batches.len() == BATCHES_MAX {
            producer.batches.pop_front();
        }
        producer.batches.push_back(Batch {
            first: sequence.first,
            last: sequence.last,
            base_offset: header.base_offset,
        });
        producer.last_offset = header.last_offset();
        producer.last_seen_ms = now_ms;
        if self.producers.len() > PRODUCERS_MAX {
            self.forget_longest_silent();
        }
    }

    /// Forgets producers that sent nothing for a day.
    pub fn expire(&mut self, now_ms: i64) {
        let oldest = now_ms.saturating_sub(PRODUCER_EXPIRATION_MS);
        self.producers
            .retain(|_, producer| producer.last_seen_ms >= oldest);
    }

    /// Every producer with the offset of its last record.
    pub fn last_offsets(&self) -> impl Iterator<Item = (ProducerId, Offset)> + '_ {
        self.producers
            .iter()
            .map(|(id, producer)| (*id, producer.last_offset))
    }

    pub fn len(&self) -> usize {
        self.producers.len()
    }

    pub fn is_empty(&self) -> bool {
        self.producers.is_empty()
    }

    /// Forgets a tenth at once, so that the search for the oldest is rare.
    fn forget_longest_silent(&mut self) {
        let mut offsets: Vec<Offset> = self.producers.values().map(|p| p.last_offset).collect();
        let (_, threshold, _) = offsets.select_nth_unstable(PRODUCERS_MAX / 10);
        let threshold = *threshold;
        self.producers
            .retain(|_, producer| producer.last_offset > threshold);
    }

    pub fn encode(&self) -> Bytes {
        let mut out = BytesMut::new();
        put_version(&mut out);
        put_count(&mut out, self.producers.len());
        for (id, producer) in &self.producers {
            out.put_i64(id.0);
            out.put_i16(producer.epoch.0);
            out.put_i64(producer.last_offset.0);
            out.put_i64(producer.last_seen_ms);
            put_count(&mut out, producer.batches.len());
            for batch in &producer.batches {
                out.put_i32(batch.first);
                out.put_i32(batch.last);
                out.put_i64(batch.base_offset.0);
            }
        }
        out.freeze()
    }

    pub fn decode(bytes: &[u8]) -> Result<ProducerTable, DecodeError> {
        let mut reader = Reader::new("producer state", bytes)?;
        let mut table = ProducerTable::default();
        for _ in 0..reader.count(PRODUCERS_MAX)? {
            let id = ProducerId(reader.i64()?);
            let mut producer = Producer {
                epoch: ProducerEpoch(reader.i16()?),
                last_offset: Offset(reader.i64()?),
                last_seen_ms: reader.i64()?,
                batches: VecDeque::with_capacity(BATCHES_MAX),
            };
            for _ in 0..reader.count(BATCHES_MAX)? {
                producer.batches.push_back(Batch {
                    first: reader.i32()?,
                    last: reader.i32()?,
                    base_offset: Offset(reader.i64()?),
                });
            }
            table.producers.insert(id, producer);
        }
        reader.end()?;
        Ok(table)
    }
}

/// The table as it will be once the batches of the entry that is being put together are applied.
#[derive(Debug)]
pub struct Staging<'a> {
    table: &'a ProducerTable,
    /// Epoch and last sequence per producer of the entry.
    staged: HashMap<ProducerId, (ProducerEpoch, i32)>,
}

/// What `Staging::check` found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StagedVerdict {
    Append,
    Duplicate(Offset),
    /// Not decided by the table alone, because of a batch that stands earlier in the same entry:
    /// ask again when that one is applied.
    AfterThisEntry,
}

impl<'a> Staging<'a> {
    pub fn new(table: &'a ProducerTable) -> Self {
        Staging {
            table,
            staged: HashMap::new(),
        }
    }

    /// Checks a batch, and counts it as part of the entry if it may be appended.
    pub fn check(&mut self, sequence: &Sequence) -> Result<StagedVerdict, AppendError> {
        if let Some((epoch, last)) = self.staged.get(&sequence.producer_id) {
            if check_next(sequence, *epoch, Some(*last)).is_err() {
                // It may be a retry of a batch of this entry, whose offset is not known yet, or an
                // error; the table knows when the entry is applied.
                return Ok(StagedVerdict::AfterThisEntry);
            }
        } else if let Verdict::Duplicate(offset) = self.table.check(sequence)? {
            return Ok(StagedVerdict::Duplicate(offset));
        }
        self.staged
            .insert(sequence.producer_id, (sequence.epoch, sequence.last));
        Ok(StagedVerdict::Append)
    }
}
