//! Segments that take the place of others: by compaction, or because the old ones are damaged.
//!
//! Invariant: it is applied once; a log that does not have all of the old segments side by side is
//! left alone.

use std::ops::Range;

use bytes::Bytes;
use chronik_types::offset::Offset;

use super::state::LogState;
use crate::checkpoint::{SEGMENT_SIZE_MIN, VERSION, decode_segment, encode_segment};
use crate::codec::Reader;
use crate::segment::{Segment, SegmentId};

/// Bytes of an id in a record.
const ID_SIZE: usize = 12;

const NOTHING: u8 = 0;
const COMPACTED: u8 = 1;
const REBUILT: u8 = 2;

/// Where the new segments are from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Origin {
    /// At most one, made of the old ones.
    Compaction,
    /// From another replica: the same committed entries, cut into files in another way and maybe
    /// compacted more or less.
    Replica,
}

/// Segments for others, and how far the log is clean with them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Replacement {
    pub old: Vec<SegmentId>,
    /// In order; none where nothing is replaced.
    pub new: Vec<Segment>,
    /// Of the whole log afterwards; compaction never lowers it, another replica's files may.
    pub cleaned_offset: Offset,
    pub origin: Origin,
}

impl Replacement {
    pub fn encode(&self) -> Bytes {
        let mut out = vec![VERSION];
        out.extend_from_slice(&self.cleaned_offset.0.to_le_bytes());
        out.extend_from_slice(&(self.old.len() as u32).to_le_bytes());
        for id in &self.old {
            out.extend_from_slice(&id.base_offset.0.to_le_bytes());
            out.extend_from_slice(&id.generation.to_le_bytes());
        }
        match self.origin {
            Origin::Compaction if self.new.is_empty() => out.push(NOTHING),
            Origin::Compaction => out.push(COMPACTED),
            Origin::Replica => {
                out.push(REBUILT);
                out.extend_from_slice(&(self.new.len() as u32).to_le_bytes());
            }
        }
        for segment in &self.new {
            encode_segment(&mut out, segment);
        }
        Bytes::from(out)
    }

    pub fn decode(bytes: &[u8]) -> Option<Self> {
        let mut reader = Reader::new(bytes);
        let version = reader.u8().filter(|version| *version == VERSION)?;
        let cleaned_offset = Offset(reader.i64()?);
        let count = reader.u32()? as usize;
        if count > bytes.len() / ID_SIZE {
            return None;
        }
        let id = |reader: &mut Reader<'_>| {
            Some(SegmentId {
                base_offset: Offset(reader.i64()?),
                generation: reader.u32()?,
            })
        };
        let old = (0..count).map(|_| id(&mut reader)).collect::<Option<_>>()?;
        let (origin, count) = match reader.u8()? {
            NOTHING => (Origin::Compaction, 0),
            COMPACTED => (Origin::Compaction, 1),
            REBUILT => (Origin::Replica, reader.u32()? as usize),
            _ => return None,
        };
        if count > bytes.len() / SEGMENT_SIZE_MIN {
            return None;
        }
        let new = (0..count)
            .map(|_| decode_segment(&mut reader, version))
            .collect::<Option<_>>()?;
        reader.is_at_end().then_some(Replacement {
            old,
            new,
            cleaned_offset,
            origin,
        })
    }
}

impl LogState {
    /// Where the old segments are, all of them side by side.
    pub fn place_of(&self, old: &[SegmentId]) -> Option<Range<usize>> {
        let Some(first) = old.first() else {
            return Some(0..0);
        };
        let at = self
            .segments
            .iter()
            .position(|segment| segment.id() == *first)?;
        let place = at..at.checked_add(old.len())?;
        let found = self.segments.get(place.clone())?.iter().map(Segment::id);
        found.eq(old.iter().copied()).then_some(place)
    }

    /// Gives the segments whose place was taken; none if they are not there (any more).
    pub fn apply_replacement(&mut self, replacement: &Replacement) -> Vec<SegmentId> {
        let Some(place) = self.place_of(&replacement.old) else {
            return Vec::new();
        };
        let is_at_front = place.start == 0;
        self.segments.splice(place, replacement.new.iter().copied());
        let generations = replacement.new.iter().map(|segment| segment.generation);
        let next = generations.max().map_or(0, |last| last.saturating_add(1));
        self.next_generation = self.next_generation.max(next);
        match replacement.origin {
            Origin::Compaction => {
                self.cleaned_offset = self.cleaned_offset.max(replacement.cleaned_offset);
            }
            Origin::Replica => {
                // A segment that is made here next may have the offset of one that was replaced, or
                // of the last new one, but never its name; nor that of one that is on its way.
                self.generation = self.generation.max(self.next_generation);
                self.next_generation = self.generation.saturating_add(1);
                self.cleaned_offset = replacement.cleaned_offset;
                if is_at_front {
                    // The other replica may keep more or less of what is below the log start.
                    let first = self.segments.first().map(|segment| segment.first_index);
                    self.first_index = first.unwrap_or(self.first_index);
                }
            }
        }
        replacement.old.clone()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id(base_offset: i64, generation: u32) -> SegmentId {
        SegmentId {
            base_offset: Offset(base_offset),
            generation,
        }
    }

    fn segment(base_offset: i64, generation: u32) -> Segment {
        Segment::new(id(base_offset, generation), 0, 9)
    }

    fn check_codec(replacement: &Replacement) {
        let bytes = replacement.encode();
        assert_eq!(Replacement::decode(&bytes).as_ref(), Some(replacement));
        for size in 0..bytes.len() {
            assert_eq!(Replacement::decode(&bytes[..size]), None);
        }
        // Flipped bits are found by the checksum of the WAL's frame; here they must do no harm.
        for bit in 0..bytes.len() * 8 {
            let mut damaged = bytes.to_vec();
            damaged[bit / 8] ^= 1 << (bit % 8);
            let _ = Replacement::decode(&damaged);
        }
    }

    fn log() -> LogState {
        LogState {
            segments: vec![
                segment(0, 0),
                segment(10, 0),
                segment(20, 2),
                segment(30, 0),
            ],
            ..LogState::default()
        }
    }

    #[test]
    fn a_replacement_round_trips_and_is_applied_once() {
        let replacement = Replacement {
            old: vec![id(10, 0), id(20, 2)],
            new: vec![segment(10, 3)],
            cleaned_offset: Offset(25),
            origin: Origin::Compaction,
        };
        check_codec(&replacement);
        check_codec(&Replacement {
            old: Vec::new(),
            new: Vec::new(),
            ..replacement.clone()
        });
        let mut state = log();
        assert_eq!(state.apply_replacement(&replacement), replacement.old);
        let ids: Vec<_> = state.segments.iter().map(Segment::id).collect();
        assert_eq!(ids, [id(0, 0), id(10, 3), id(30, 0)]);
        assert_eq!(state.cleaned_offset, Offset(25));
        assert!(state.apply_replacement(&replacement).is_empty());
        state.segments = vec![segment(10, 0), segment(30, 0)];
        assert!(state.apply_replacement(&replacement).is_empty());
    }

    #[test]
    fn several_segments_of_another_replica_take_the_place_of_some() {
        let replacement = Replacement {
            old: vec![id(0, 0), id(10, 0)],
            new: vec![segment(0, 4), segment(7, 4), segment(14, 4)],
            cleaned_offset: Offset(3),
            origin: Origin::Replica,
        };
        check_codec(&replacement);
        let mut state = log();
        state.cleaned_offset = Offset(9);
        assert_eq!(state.apply_replacement(&replacement), replacement.old);
        let ids: Vec<_> = state.segments.iter().map(Segment::id).collect();
        let expected = [id(0, 4), id(7, 4), id(14, 4), id(20, 2), id(30, 0)];
        assert_eq!(ids, expected);
        assert_eq!(state.cleaned_offset, Offset(3));
        assert_eq!((state.generation, state.next_generation), (5, 6));
        assert!(state.apply_replacement(&replacement).is_empty());
        // Others that are on their way were given 5 to 8.
        let mut state = log();
        state.next_generation = 9;
        state.apply_replacement(&replacement);
        assert_eq!((state.generation, state.next_generation), (9, 10));
    }
}
