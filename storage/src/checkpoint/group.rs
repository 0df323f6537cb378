//! One log as the checkpoint, and a record of the WAL, know it.
//!
//! Invariant: what `encode` wrote comes back from `decode`; any other bytes give `None`, never a panic.

use bytes::Bytes;
use chronik_types::id::RaftGroupId;
use chronik_types::offset::Offset;

use super::VERSION;
use crate::clock::now_ms;
use crate::codec::Reader;
use crate::entry::{Purged, TermStart};
use crate::partition_log::state::{LogState, ReplicaState};
use crate::segment::Segment;

/// Least bytes of each repeated part, to bound what a count may reserve.
pub const GROUP_SIZE_MIN: usize = 48;
/// Of version 1; later ones are larger.
pub const SEGMENT_SIZE_MIN: usize = 88;
const FLAG_SEALED: u8 = 1;
const FLAG_COMPACTED: u8 = 2;
const TERM_START_SIZE: usize = 24;
const NONE: u32 = u32::MAX;

/// A log as the checkpoint knows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GroupCheckpoint {
    pub group: RaftGroupId,
    pub first_index: u64,
    pub flushed_next: u64,
    /// Log end offset after the flushed entries.
    pub flushed_offset: Offset,
    pub purged: Option<Purged>,
    pub log_start: Offset,
    pub cleaned_offset: Offset,
    pub generation: u32,
    pub committed_next: u64,
    pub replay_from_record: u64,
    pub segments: Vec<Segment>,
    /// Of the flushed entries.
    pub term_starts: Vec<TermStart>,
    pub vote: Option<Bytes>,
    pub replica_state: Option<ReplicaState>,
}

impl GroupCheckpoint {
    /// All that is flushed must be fsynced.
    pub fn capture(group: RaftGroupId, state: &mut LogState) -> Self {
        let starts = state.term_starts.iter();
        let term_starts = starts
            .filter(|s| s.first_index < state.flushed_next)
            .copied()
            .collect();
        // A log without anything on disk has no place yet.
        let has_place = !state.segments.is_empty() || state.durable_purged.is_some();
        GroupCheckpoint {
            group,
            first_index: if has_place { state.first_index } else { 0 },
            flushed_next: if has_place { state.flushed_next } else { 0 },
            flushed_offset: state.flushed_offset(),
            purged: state.durable_purged,
            log_start: state.durable_log_start,
            cleaned_offset: state.cleaned_offset,
            generation: state.generation,
            committed_next: state.committed_next.min(state.durable_next),
            replay_from_record: state.replay_from_record,
            segments: state.segments.clone(),
            term_starts,
            vote: state.vote.clone(),
            replica_state: state.checkpointed_replica_state().cloned(),
        }
    }

    pub fn into_state(self, segment_bytes: u64) -> LogState {
        let flushed_next = self.flushed_next;
        LogState {
            tail_first: flushed_next,
            tail_base: self.flushed_offset,
            purged: self.purged,
            durable_purged: self.purged,
            log_start: self.log_start,
            durable_log_start: self.log_start,
            cleaned_offset: self.cleaned_offset,
            generation: self.generation,
            recorded_next: flushed_next,
            first_index: self.first_index,
            flushed_next,
            ready_next: flushed_next,
            durable_next: flushed_next,
            // Clamped when the WAL is read.
            committed_next: self.committed_next.max(flushed_next),
            segments: self.segments,
            term_starts: self.term_starts,
            vote: self.vote,
            durable_replica_state: self.replica_state.clone(),
            replica_state: self.replica_state,
            replay_from_record: self.replay_from_record,
            segment_bytes,
            ..LogState::default()
        }
    }

    /// For a record of the WAL.
    pub fn encode_alone(&self) -> Bytes {
        let mut out = vec![VERSION];
        self.encode(&mut out);
        Bytes::from(out)
    }

    pub fn decode_alone(bytes: &[u8]) -> Option<Self> {
        let mut reader = Reader::new(bytes);
        let version = reader
            .u8()
            .filter(|version| (1..=VERSION).contains(version))?;
        let group = Self::decode(&mut reader, version, bytes.len())?;
        reader.is_at_end().then_some(group)
    }

    pub fn encode(&self, out: &mut Vec<u8>) {
        for number in [
            self.group.0,
            self.first_index,
            self.flushed_next,
            self.committed_next,
            self.replay_from_record,
        ] {
            out.extend_from_slice(&number.to_le_bytes());
        }
        for offset in [self.flushed_offset, self.log_start, self.cleaned_offset] {
            out.extend_from_slice(&offset.0.to_le_bytes());
        }
        out.extend_from_slice(&self.generation.to_le_bytes());
        out.push(u8::from(self.purged.is_some()));
        if let Some(purged) = self.purged {
            out.extend_from_slice(&purged.index.to_le_bytes());
            out.extend_from_slice(&purged.term.to_le_bytes());
            out.extend_from_slice(&purged.next_offset.0.to_le_bytes());
        }
        out.extend_from_slice(&(self.segments.len() as u32).to_le_bytes());
        for segment in &self.segments {
            encode_segment(out, segment);
        }
        out.extend_from_slice(&(self.term_starts.len() as u32).to_le_bytes());
        for start in &self.term_starts {
            out.extend_from_slice(&start.term.to_le_bytes());
            out.extend_from_slice(&start.first_index.to_le_bytes());
            out.extend_from_slice(&start.first_offset.0.to_le_bytes());
        }
        encode_bytes(out, self.vote.as_ref());
        encode_bytes(out, self.replica_state.as_ref().map(|state| &state.state));
        if let Some(state) = &self.replica_state {
            out.extend_from_slice(&state.index.to_le_bytes());
        }
    }

    pub fn decode(reader: &mut Reader<'_>, version: u8, left: usize) -> Option<Self> {
        let group = RaftGroupId(reader.u64()?);
        let first_index = reader.u64()?;
        let flushed_next = reader.u64()?;
        let committed_next = reader.u64()?;
        let replay_from_record = reader.u64()?;
        let place = match version {
            1 => None,
            _ => Some(decode_place(reader)?),
        };
        let count = bounded(reader.u32()?, left, SEGMENT_SIZE_MIN)?;
        let mut segments = (0..count)
            .map(|_| decode_segment(reader, version))
            .collect::<Option<Vec<_>>>()?;
        let place = place.unwrap_or_else(|| Place::of_version_1(&mut segments));
        let count = bounded(reader.u32()?, left, TERM_START_SIZE)?;
        let term_starts = (0..count)
            .map(|_| {
                Some(TermStart {
                    term: reader.u64()?,
                    first_index: reader.u64()?,
                    first_offset: Offset(reader.i64()?),
                })
            })
            .collect::<Option<_>>()?;
        let vote = decode_bytes(reader)?;
        let replica_state = match decode_bytes(reader)? {
            Some(state) => Some(ReplicaState {
                index: reader.u64()?,
                state,
            }),
            None => None,
        };
        Some(GroupCheckpoint {
            group,
            first_index,
            flushed_next,
            flushed_offset: place.flushed_offset,
            purged: place.purged,
            log_start: place.log_start,
            cleaned_offset: place.cleaned_offset,
            generation: place.generation,
            committed_next,
            replay_from_record,
            segments,
            term_starts,
            vote,
            replica_state,
        })
    }
}

pub fn bounded(count: u32, left: usize, size_min: usize) -> Option<usize> {
    let count = usize::try_from(count).ok()?;
    (count <= left / size_min).then_some(count)
}

fn encode_bytes(out: &mut Vec<u8>, bytes: Option<&Bytes>) {
    let length = bytes.map_or(NONE, |bytes| bytes.len() as u32);
    out.extend_from_slice(&length.to_le_bytes());
    out.extend_from_slice(bytes.map_or(&[], |bytes| bytes));
}

fn decode_bytes(reader: &mut Reader<'_>) -> Option<Option<Bytes>> {
    match reader.u32()? {
        NONE => Some(None),
        length => Some(Some(Bytes::copy_from_slice(reader.take(length as usize)?))),
    }
}

/// What version 2 added to a group.
struct Place {
    flushed_offset: Offset,
    purged: Option<Purged>,
    log_start: Offset,
    cleaned_offset: Offset,
    generation: u32,
}

impl Place {
    fn of_version_1(segments: &mut [Segment]) -> Place {
        if let Some((_, sealed)) = segments.split_last_mut() {
            sealed
                .iter_mut()
                .for_each(|segment| segment.is_sealed = true);
        }
        let (first, last) = (segments.first(), segments.last());
        Place {
            flushed_offset: last.map_or(Offset::ZERO, |segment| segment.next_offset),
            purged: None,
            log_start: first.map_or(Offset::ZERO, |segment| segment.base_offset),
            cleaned_offset: Offset::ZERO,
            generation: 0,
        }
    }
}

fn decode_place(reader: &mut Reader<'_>) -> Option<Place> {
    let flushed_offset = Offset(reader.i64()?);
    let log_start = Offset(reader.i64()?);
    let cleaned_offset = Offset(reader.i64()?);
    let generation = reader.u32()?;
    let purged = match reader.u8()? {
        0 => None,
        _ => Some(Purged {
            index: reader.u64()?,
            term: reader.u64()?,
            next_offset: Offset(reader.i64()?),
        }),
    };
    Some(Place {
        flushed_offset,
        purged,
        log_start,
        cleaned_offset,
        generation,
    })
}

pub fn encode_segment(out: &mut Vec<u8>, segment: &Segment) {
    for number in [segment.base_offset.0, segment.next_offset.0] {
        out.extend_from_slice(&number.to_le_bytes());
    }
    for number in [
        segment.first_index,
        segment.next_index,
        segment.log_bytes,
        segment.slots,
        segment.offset_index_entries,
        segment.time_index_entries,
        segment.unindexed_bytes,
    ] {
        out.extend_from_slice(&number.to_le_bytes());
    }
    for number in [
        segment.max_timestamp,
        segment.indexed_timestamp,
        segment.first_timestamp,
        segment.created_ms,
        segment.appended_ms,
        segment.delete_horizon_ms,
    ] {
        out.extend_from_slice(&number.to_le_bytes());
    }
    out.extend_from_slice(&segment.generation.to_le_bytes());
    let sealed = if segment.is_sealed { FLAG_SEALED } else { 0 };
    let compacted = if segment.is_compacted {
        FLAG_COMPACTED
    } else {
        0
    };
    out.push(sealed | compacted);
}

pub fn decode_segment(reader: &mut Reader<'_>, version: u8) -> Option<Segment> {
    let mut segment = Segment {
        base_offset: Offset(reader.i64()?),
        next_offset: Offset(reader.i64()?),
        first_index: reader.u64()?,
        next_index: reader.u64()?,
        log_bytes: reader.u64()?,
        slots: reader.u64()?,
        offset_index_entries: reader.u64()?,
        time_index_entries: reader.u64()?,
        unindexed_bytes: reader.u64()?,
        max_timestamp: reader.i64()?,
        indexed_timestamp: reader.i64()?,
        first_timestamp: i64::MIN,
        created_ms: 0,
        appended_ms: 0,
        delete_horizon_ms: i64::MAX,
        generation: 0,
        is_sealed: false,
        is_compacted: false,
    };
    if version == 1 {
        // Nothing better is known: its age counts from the first start with this version.
        segment.first_timestamp = segment.max_timestamp;
        (segment.created_ms, segment.appended_ms) = (now_ms(), now_ms());
        return Some(segment);
    }
    segment.first_timestamp = reader.i64()?;
    segment.created_ms = reader.i64()?;
    segment.appended_ms = reader.i64()?;
    segment.delete_horizon_ms = reader.i64()?;
    segment.generation = reader.u32()?;
    let flags = reader.u8()?;
    segment.is_sealed = flags & FLAG_SEALED != 0;
    segment.is_compacted = flags & FLAG_COMPACTED != 0;
    Some(segment)
}
