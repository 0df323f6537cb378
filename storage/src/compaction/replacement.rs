//! What compaction changes in a log: one segment takes the place of some.
//!
//! Invariant: it is applied once; a log that does not have all of the old segments side by side is
//! left alone.

use std::ops::Range;

use bytes::Bytes;
use chronik_types::offset::Offset;

use crate::checkpoint::{VERSION, decode_segment, encode_segment};
use crate::codec::Reader;
use crate::partition_log::state::LogState;
use crate::segment::{Segment, SegmentId};

/// Bytes of an id in a record.
const ID_SIZE: usize = 12;

/// A segment for others, and how far the log is clean with it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Replacement {
    pub old: Vec<SegmentId>,
    /// None where nothing is replaced.
    pub new: Option<Segment>,
    pub cleaned_offset: Offset,
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
        out.push(u8::from(self.new.is_some()));
        if let Some(segment) = &self.new {
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
        let new = match reader.u8()? {
            0 => None,
            _ => Some(decode_segment(&mut reader, version)?),
        };
        reader.is_at_end().then_some(Replacement {
            old,
            new,
            cleaned_offset,
        })
    }
}

impl LogState {
    /// Where the old segments are, all of them side by side.
    pub fn place_of(&self, replacement: &Replacement) -> Option<Range<usize>> {
        let Some(first) = replacement.old.first() else {
            return Some(0..0);
        };
        let at = self
            .segments
            .iter()
            .position(|segment| segment.id() == *first)?;
        let place = at..at.checked_add(replacement.old.len())?;
        let found = self.segments.get(place.clone())?.iter().map(Segment::id);
        found.eq(replacement.old.iter().copied()).then_some(place)
    }

    /// Gives the segments whose place was taken; none if they are not there (any more).
    pub fn apply_replacement(&mut self, replacement: &Replacement) -> Vec<SegmentId> {
        let Some(place) = self.place_of(replacement) else {
            return Vec::new();
        };
        self.segments.splice(place, replacement.new);
        self.cleaned_offset = self.cleaned_offset.max(replacement.cleaned_offset);
        if let Some(new) = replacement.new {
            self.next_generation = self.next_generation.max(new.generation.saturating_add(1));
        }
        replacement.old.clone()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_replacement_round_trips_and_is_applied_once() {
        let id = |base_offset, generation| SegmentId {
            base_offset: Offset(base_offset),
            generation,
        };
        let segment = |base_offset, generation| Segment::new(id(base_offset, generation), 0, 9);
        let replacement = Replacement {
            old: vec![id(10, 0), id(20, 2)],
            new: Some(segment(10, 3)),
            cleaned_offset: Offset(25),
        };
        let bytes = replacement.encode();
        assert_eq!(Replacement::decode(&bytes), Some(replacement.clone()));
        for size in 0..bytes.len() {
            assert_eq!(Replacement::decode(&bytes[..size]), None);
        }
        let mut state = LogState {
            segments: vec![
                segment(0, 0),
                segment(10, 0),
                segment(20, 2),
                segment(30, 0),
            ],
            ..LogState::default()
        };
        assert_eq!(state.apply_replacement(&replacement), replacement.old);
        let ids: Vec<_> = state.segments.iter().map(Segment::id).collect();
        assert_eq!(ids, [id(0, 0), id(10, 3), id(30, 0)]);
        assert_eq!(state.cleaned_offset, Offset(25));
        assert!(state.apply_replacement(&replacement).is_empty());
        state.segments = vec![segment(10, 0), segment(30, 0)];
        assert!(state.apply_replacement(&replacement).is_empty());
    }
}
