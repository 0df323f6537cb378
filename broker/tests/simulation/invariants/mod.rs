//! What must hold in every run, whatever fails: one property per file. Each looks at what it is
//! shown and says what is wrong, in words.

pub mod acked_records_survive;
pub mod idempotent_once_in_order;
pub mod life_after_healing;
pub mod one_leader_per_epoch;
pub mod reads_are_final;
pub mod refused_stays_out;
pub mod replicas_agree;
pub mod watermark_never_falls;

use std::hash::{DefaultHasher, Hash, Hasher};

use chronik_types::epoch::LeaderEpoch;
use chronik_types::offset::Offset;
use chronik_types::record_batch::{self, BatchHeader};

/// A batch by what its producer sent, wherever it came to lie: its bytes from the CRC on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BatchKey(u64);

/// A batch in a log.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stored {
    pub key: BatchKey,
    pub base_offset: Offset,
    pub next_offset: Offset,
    pub leader_epoch: LeaderEpoch,
    /// Of all its bytes.
    pub hash: u64,
    pub header: BatchHeader,
}

/// Bytes of a batch that its producer does not decide: base offset, length, epoch, magic.
const STAMPED_BYTES: usize = 17;

fn hash(bytes: &[u8]) -> u64 {
    let mut hasher = DefaultHasher::new();
    bytes.hash(&mut hasher);
    hasher.finish()
}

impl BatchKey {
    pub fn of(batch: &[u8]) -> BatchKey {
        BatchKey(hash(&batch[STAMPED_BYTES..]))
    }
}

/// The batches in bytes that were read from a log, back to back.
pub fn stored(bytes: &[u8]) -> Result<Vec<Stored>, String> {
    let mut all = Vec::new();
    for batch in record_batch::batches(bytes) {
        let (at, header) = batch.map_err(|error| format!("bytes that are no batch: {error}"))?;
        let batch = &bytes[at..at + header.size_bytes()];
        header
            .verify_crc(batch)
            .map_err(|error| format!("a damaged batch was read: {error}"))?;
        all.push(Stored {
            key: BatchKey::of(batch),
            base_offset: header.base_offset,
            next_offset: header.next_offset(),
            leader_epoch: header.leader_epoch,
            hash: hash(batch),
            header,
        });
    }
    Ok(all)
}
