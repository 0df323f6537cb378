//! What a log consists of, as one broker tells another.
//!
//! Invariant: a manifest that `check` accepted describes a possible log: its parts follow each other
//! in index and offset and end where it says. Any bytes decode to such a manifest, or to an error.

use std::sync::Arc;

use bytes::Bytes;
use chronik_types::offset::Offset;
use chronik_types::record_batch::crc32c;

use crate::codec::Reader;
use crate::entry::TermStart;
use crate::error::StorageError;
use crate::segment::sidecar::SLOT_SIZE;
use crate::segment::{Segment, SegmentId};

const VERSION: u8 = 1;
const SEGMENT_SIZE: usize = 65;
const TERM_START_SIZE: usize = 24;
/// Positions within a segment have 32 bits in its index, but for the last entry's.
const LOG_BYTES_MAX: u64 = 4 << 30;

/// The files of a segment that are sent; the receiver makes the indexes anew.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum SegmentFile {
    /// Record batches.
    Log,
    /// What the log's entries are in it.
    Sidecar,
}

/// A log up to one of its entries.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LogManifest {
    pub log_start_offset: Offset,
    /// Log end offset after the last entry.
    pub next_offset: Offset,
    pub last_index: u64,
    pub last_term: u64,
    pub term_starts: Vec<TermStart>,
    /// Below it compaction has removed older records of the same keys.
    pub cleaned_offset: Offset,
    pub segments: Vec<ManifestSegment>,
}

/// A segment, or the first part of one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ManifestSegment {
    pub base_offset: Offset,
    pub next_offset: Offset,
    pub first_index: u64,
    pub next_index: u64,
    pub log_bytes: u64,
    pub sidecar_bytes: u64,
    pub is_compacted: bool,
    pub created_ms: i64,
    pub appended_ms: i64,
}

impl ManifestSegment {
    pub fn file_bytes(&self, file: SegmentFile) -> u64 {
        match file {
            SegmentFile::Log => self.log_bytes,
            SegmentFile::Sidecar => self.sidecar_bytes,
        }
    }

    /// Whether the files of this one begin those of the other, if both are of the same log: entries that are
    /// committed are the same everywhere, and only compaction writes them anew.
    pub fn is_start_of(&self, other: &ManifestSegment) -> bool {
        self.base_offset == other.base_offset
            && self.first_index == other.first_index
            && self.log_bytes <= other.log_bytes
            && self.sidecar_bytes <= other.sidecar_bytes
            && !self.is_compacted
            && !other.is_compacted
    }

    pub(super) fn of(segment: &Segment) -> Self {
        ManifestSegment {
            base_offset: segment.base_offset,
            next_offset: segment.next_offset,
            first_index: segment.first_index,
            next_index: segment.next_index,
            log_bytes: segment.log_bytes,
            sidecar_bytes: segment.slots * SLOT_SIZE as u64,
            is_compacted: segment.is_compacted,
            created_ms: segment.created_ms,
            appended_ms: segment.appended_ms,
        }
    }

    /// The name under which a copy with this generation writes it.
    pub(super) fn id(&self, generation: u32) -> SegmentId {
        SegmentId {
            base_offset: self.base_offset,
            generation,
        }
    }

    /// The segment without what is found by reading it.
    pub(super) fn to_segment(self, generation: u32) -> Segment {
        Segment {
            next_offset: self.next_offset,
            next_index: self.next_index,
            log_bytes: self.log_bytes,
            slots: self.sidecar_bytes / SLOT_SIZE as u64,
            is_sealed: true,
            is_compacted: self.is_compacted,
            appended_ms: self.appended_ms,
            ..Segment::new(self.id(generation), self.first_index, self.created_ms)
        }
    }

    fn check(&self) -> Result<(), &'static str> {
        let width = self.next_offset.0.checked_sub(self.base_offset.0);
        if self.base_offset < Offset::ZERO || width.is_none_or(|width| width < 0) {
            return Err("a segment's offsets make no sense");
        }
        if self.next_index < self.first_index || self.next_index == u64::MAX {
            return Err("a segment's indexes make no sense");
        }
        let is_in_slots = self.sidecar_bytes.is_multiple_of(SLOT_SIZE as u64);
        if self.log_bytes > LOG_BYTES_MAX || self.sidecar_bytes > LOG_BYTES_MAX || !is_in_slots {
            return Err("a segment's sizes make no sense");
        }
        Ok(())
    }
}

impl LogManifest {
    /// Bytes of all files.
    pub fn total_bytes(&self) -> u64 {
        let bytes =
            |segment: &ManifestSegment| segment.log_bytes.saturating_add(segment.sidecar_bytes);
        self.segments.iter().map(bytes).fold(0, u64::saturating_add)
    }

    /// Whether it has this entry in the term that its batches say.
    pub(super) fn is_in_term(&self, index: u64, leader_epoch: i64) -> bool {
        let starts = &self.term_starts;
        let after = starts.partition_point(|start| start.first_index <= index);
        let start = after.checked_sub(1).and_then(|at| starts.get(at));
        start.is_some_and(|start| i64::try_from(start.term) == Ok(leader_epoch))
    }

    pub fn encode(&self) -> Bytes {
        let mut out = vec![VERSION, 0, 0, 0, 0];
        for offset in [self.log_start_offset, self.next_offset, self.cleaned_offset] {
            out.extend_from_slice(&offset.0.to_le_bytes());
        }
        for number in [self.last_index, self.last_term] {
            out.extend_from_slice(&number.to_le_bytes());
        }
        out.extend_from_slice(&(self.term_starts.len() as u32).to_le_bytes());
        for start in &self.term_starts {
            out.extend_from_slice(&start.term.to_le_bytes());
            out.extend_from_slice(&start.first_index.to_le_bytes());
            out.extend_from_slice(&start.first_offset.0.to_le_bytes());
        }
        out.extend_from_slice(&(self.segments.len() as u32).to_le_bytes());
        for segment in &self.segments {
            for number in [segment.base_offset.0, segment.next_offset.0] {
                out.extend_from_slice(&number.to_le_bytes());
            }
            for number in [
                segment.first_index,
                segment.next_index,
                segment.log_bytes,
                segment.sidecar_bytes,
            ] {
                out.extend_from_slice(&number.to_le_bytes());
            }
            out.push(u8::from(segment.is_compacted));
            for number in [segment.created_ms, segment.appended_ms] {
                out.extend_from_slice(&number.to_le_bytes());
            }
        }
        let crc = crc32c(&out[5..]);
        out[1..5].copy_from_slice(&crc.to_le_bytes());
        Bytes::from(out)
    }

    /// Reads and checks what `encode` wrote.
    pub fn decode(bytes: &[u8]) -> Result<LogManifest, StorageError> {
        let mut reader = Reader::new(bytes);
        let (version, crc) = (reader.u8(), reader.u32());
        if version != Some(VERSION) {
            return Err(invalid("it is of another version"));
        }
        if crc != Some(crc32c(bytes.get(5..).unwrap_or_default())) {
            return Err(invalid("its checksum is wrong"));
        }
        let manifest = Self::decode_fields(&mut reader, bytes.len());
        let manifest = manifest.ok_or_else(|| invalid("it is cut short"))?;
        manifest.check()?;
        Ok(manifest)
    }

    fn decode_fields(reader: &mut Reader<'_>, size: usize) -> Option<LogManifest> {
        let log_start_offset = Offset(reader.i64()?);
        let next_offset = Offset(reader.i64()?);
        let cleaned_offset = Offset(reader.i64()?);
        let (last_index, last_term) = (reader.u64()?, reader.u64()?);
        let count = reader.u32()? as usize;
        if count > size / TERM_START_SIZE {
            return None;
        }
        let term_start = |reader: &mut Reader<'_>| {
            Some(TermStart {
                term: reader.u64()?,
                first_index: reader.u64()?,
                first_offset: Offset(reader.i64()?),
            })
        };
        let term_starts = (0..count)
            .map(|_| term_start(reader))
            .collect::<Option<_>>()?;
        let count = reader.u32()? as usize;
        if count > size / SEGMENT_SIZE {
            return None;
        }
        let segment = |reader: &mut Reader<'_>| {
            Some(ManifestSegment {
                base_offset: Offset(reader.i64()?),
                next_offset: Offset(reader.i64()?),
                first_index: reader.u64()?,
                next_index: reader.u64()?,
                log_bytes: reader.u64()?,
                sidecar_bytes: reader.u64()?,
                is_compacted: reader.u8()? != 0,
                created_ms: reader.i64()?,
                appended_ms: reader.i64()?,
            })
        };
        let segments = (0..count).map(|_| segment(reader)).collect::<Option<_>>()?;
        reader.is_at_end().then_some(LogManifest {
            log_start_offset,
            next_offset,
            last_index,
            last_term,
            term_starts,
            cleaned_offset,
            segments,
        })
    }

    /// Whether there can be such a log.
    pub(super) fn check(&self) -> Result<(), StorageError> {
        self.check_parts().map_err(invalid)
    }

    fn check_parts(&self) -> Result<(), &'static str> {
        for segment in &self.segments {
            segment.check()?;
        }
        for pair in self.segments.windows(2) {
            let (a, b) = (&pair[0], &pair[1]);
            // Entries without records may be in no segment.
            if a.next_offset != b.base_offset || a.next_index > b.first_index {
                return Err("its segments do not follow each other");
            }
            if a.base_offset == b.base_offset && a.log_bytes > 0 {
                return Err("two of its segments have one name");
            }
        }
        let first = self
            .segments
            .first()
            .map_or(self.next_offset, |s| s.base_offset);
        if self.log_start_offset < first || self.log_start_offset > self.next_offset {
            return Err("its log start is not in it");
        }
        if self.last_index == u64::MAX {
            return Err("its last index makes no sense");
        }
        if let Some(last) = self.segments.last()
            && (last.next_index > self.last_index + 1 || last.next_offset != self.next_offset)
        {
            return Err("its segments do not end with its last entry");
        }
        let rises = |pair: &[TermStart]| {
            pair[0].term < pair[1].term
                && pair[0].first_index < pair[1].first_index
                && pair[0].first_offset <= pair[1].first_offset
        };
        let last_term = self.term_starts.last().map(|start| start.term);
        if !self.term_starts.windows(2).all(rises) || last_term.is_some_and(|t| t != self.last_term)
        {
            return Err("its terms are out of order");
        }
        Ok(())
    }
}

fn invalid(why: &'static str) -> StorageError {
    StorageError::InvalidManifest {
        why: Arc::from(why),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn manifest() -> LogManifest {
        let segment = |number: i64| ManifestSegment {
            base_offset: Offset(10 * number),
            next_offset: Offset(10 * number + 10),
            first_index: 5 * number as u64,
            next_index: 5 * number as u64 + 5,
            log_bytes: 1000,
            sidecar_bytes: 5 * SLOT_SIZE as u64,
            is_compacted: number == 0,
            created_ms: 7,
            appended_ms: 8,
        };
        let start = |term, first_index| TermStart {
            term,
            first_index,
            first_offset: Offset(2 * first_index as i64),
        };
        LogManifest {
            log_start_offset: Offset(3),
            next_offset: Offset(30),
            last_index: 14,
            last_term: 4,
            term_starts: vec![start(2, 0), start(4, 7)],
            cleaned_offset: Offset(10),
            segments: (0..3).map(segment).collect(),
        }
    }

    #[test]
    fn a_manifest_round_trips_and_damage_to_it_is_found() {
        let bytes = manifest().encode();
        assert_eq!(LogManifest::decode(&bytes).unwrap(), manifest());
        assert_eq!(manifest().total_bytes(), 3 * (1000 + 5 * SLOT_SIZE as u64));
        for bit in 0..bytes.len() * 8 {
            let mut damaged = bytes.to_vec();
            damaged[bit / 8] ^= 1 << (bit % 8);
            assert!(LogManifest::decode(&damaged).is_err(), "bit {bit}");
        }
        for size in 0..bytes.len() {
            assert!(LogManifest::decode(&bytes[..size]).is_err(), "size {size}");
        }
    }

    #[test]
    fn a_log_that_cannot_be_is_refused() {
        let check = |change: &dyn Fn(&mut LogManifest)| {
            let mut manifest = manifest();
            change(&mut manifest);
            assert!(
                LogManifest::decode(&manifest.encode()).is_err(),
                "{manifest:?}"
            );
        };
        check(&|m| m.segments[1].base_offset = Offset(11));
        check(&|m| m.segments[1].next_index = 12);
        check(&|m| m.segments[2].next_index = 16);
        check(&|m| m.segments[2].next_offset = Offset(20));
        check(&|m| m.segments[2].log_bytes = u64::MAX);
        check(&|m| m.segments[2].sidecar_bytes += 1);
        check(&|m| m.segments[0].base_offset = Offset(i64::MIN));
        check(&|m| m.log_start_offset = Offset(31));
        check(&|m| m.log_start_offset = Offset(-1));
        check(&|m| m.last_index = u64::MAX);
        check(&|m| m.last_term = 3);
        check(&|m| m.term_starts.reverse());
        check(&|m| m.segments.clear());
    }

    proptest! {
        #[test]
        fn any_bytes_decode_or_fail_without_panic(
            body in proptest::collection::vec(0u8..4, 0..300),
        ) {
            let mut bytes = vec![VERSION];
            bytes.extend(crc32c(&body).to_le_bytes());
            bytes.extend(body);
            let _ = LogManifest::decode(&bytes);
        }
    }
}
