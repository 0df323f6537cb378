//! Damaged segments of a log, taken anew from another replica.
//!
//! ```text
//! own    |   a   |   b X   |   c   |  d  |- tail ->      X: damaged
//! other  | 1 |  2  |   3   |   4   |   5   |- tail ->
//!        |<-- taken: 1 2 3 -->|                           in the place of a b
//! ```
//!
//! Invariant: segments hold committed entries, which are the same on every replica. What takes the
//! place of others begins and ends where they did, so the log keeps its end, its tail, its vote and
//! all that Raft may read; a crash leaves the old segments or the new ones.

use std::ops::Range;

use chronik_types::offset::Offset;

use super::install::Installer;
use super::manifest::{LogManifest, ManifestSegment};
use crate::entry::TermStart;
use crate::error::StorageError;
use crate::partition_log::state::LogState;
use crate::partition_log::{Origin, PartitionLog, Replacement};
use crate::segment::{Segment, SegmentId};

/// What segments that are on their way shall replace. Goes with their installer.
#[derive(Debug)]
pub struct Rebuild {
    old: Vec<SegmentId>,
}

impl PartitionLog {
    /// The last entry that another replica's files must reach, so that damaged segments can be rebuilt
    /// from them; `None`: nothing is damaged. With `all`, the end of what is committed. May write what
    /// is in memory to segments.
    pub fn rebuild_end(&self, all: bool) -> Result<Option<u64>, StorageError> {
        let log = &self.log;
        // Only the last one can be open.
        let is_open = |state: &LogState| {
            let last = state.segments.last();
            last.is_some_and(|last| !last.is_sealed && state.is_damaged(last))
        };
        let must_roll = {
            let state = log.lock();
            log.check_usable(&state)?;
            if state.damage().is_none() {
                return Ok(None);
            }
            all || is_open(&state)
        };
        if must_roll {
            self.roll()?;
        }
        let state = log.lock();
        log.check_usable(&state)?;
        let mut segments = state.segments.iter().rev();
        let last = segments.find(|segment| must_roll || segment.is_sealed);
        Ok(last.map(|segment| segment.next_index.saturating_sub(1)))
    }

    /// Starts to replace the damaged segments, and as many others as must go with them, by those of
    /// `manifest`, an `Export` of files. The installer's manifest has those that are to come. `None`:
    /// nothing is damaged. Waits for the disk.
    pub fn rebuild(
        &self,
        manifest: LogManifest,
    ) -> Result<Option<(Installer, Rebuild)>, StorageError> {
        manifest.check()?;
        let (old, theirs) = {
            let state = self.log.lock();
            self.log.check_usable(&state)?;
            if state.damage().is_none() {
                return Ok(None);
            }
            let (place, theirs) = state.choose(&manifest).map_err(|why| self.refused(why))?;
            let old = state.segments[place].iter().map(Segment::id);
            (old.collect(), theirs)
        };
        let manifest = LogManifest {
            segments: manifest.segments[theirs].to_vec(),
            ..manifest
        };
        let installer = Installer::new(self.log.clone(), manifest)?;
        Ok(Some((installer, Rebuild { old })))
    }

    pub(super) fn refused(&self, why: &'static str) -> StorageError {
        StorageError::NotRebuilt {
            group: self.log.group,
            why,
        }
    }
}

impl Rebuild {
    /// Puts the segments, all of them received, in the place of the damaged ones. Durable when it
    /// returns. Waits for the disk.
    pub fn commit(self, mut installer: Installer) -> Result<(), StorageError> {
        let mut new = installer.finish()?;
        // One without records is gone on with: its successor would have its name.
        if let Some(last) = new.last_mut() {
            last.is_sealed = last.next_offset > last.base_offset;
        }
        let replacement = Replacement {
            old: self.old,
            new,
            cleaned_offset: installer.manifest().cleaned_offset,
            origin: Origin::Replica,
        };
        installer.commit_by(|log| log.core.signals.replace(log.clone(), replacement))
    }
}

impl LogState {
    /// Which own segments are to be replaced by which of the other's: as few as there can be.
    fn choose(&self, manifest: &LogManifest) -> Result<(Range<usize>, Range<usize>), &'static str> {
        let theirs = &manifest.segments;
        if !self.has_terms_of(manifest) {
            return Err("the other replica has other terms");
        }
        let is_reached = |own: &Segment| own.next_index <= manifest.last_index + 1;
        let own = &self.segments[..self.segments.partition_point(is_reached)];
        let first = own.iter().position(|segment| self.is_damaged(segment));
        let last = own.iter().rposition(|segment| self.is_damaged(segment));
        let (Some(first), Some(last)) = (first, last) else {
            return Err("the other replica's files end before what is damaged");
        };
        let starts = (0..=first).rev().filter_map(|at| {
            let fits = |number: &usize| self.begins_with(at, &theirs[*number]);
            let number = (0..theirs.len()).rev().find(fits)?;
            Some((at, number))
        });
        let starts: Vec<(usize, usize)> = starts.collect();
        let ends = (last..own.len()).filter_map(|at| {
            let fits = |number: &usize| self.ends_with(at, &theirs[*number]);
            let number = (0..theirs.len()).rev().find(fits)?;
            Some((at + 1, number + 1))
        });
        let ends: Vec<(usize, usize)> = ends.collect();
        let nearest = starts.first().into_iter();
        let furthest = starts.last().into_iter();
        for (start, first) in nearest.chain(furthest).copied() {
            for (end, last) in ends.iter().copied() {
                let place = start..end;
                if first < last
                    && self.may_take(&place, &theirs[first..last], manifest.cleaned_offset)
                {
                    return Ok((place, first..last));
                }
            }
        }
        Err("the other replica's files do not fit")
    }

    /// How far the log is clean with the new segments in this place; `None`: they may not take it.
    pub fn cleaned_with(&self, place: &Range<usize>, replacement: &Replacement) -> Option<Offset> {
        let new: Vec<_> = replacement.new.iter().map(ManifestSegment::of).collect();
        let cleaned = replacement.cleaned_offset;
        self.may_take(place, &new, cleaned)
            .then_some(match place.start {
                0 => cleaned,
                _ => self.cleaned_offset,
            })
    }

    /// Entries from here on are read by Raft, and must all be there. Only what is durable counts.
    fn first_read_index(&self) -> u64 {
        let purged = self.durable_purged.map_or(0, |purged| purged.index + 1);
        self.first_index.max(purged)
    }

    /// Whether the other's segment may be the first in the place of the own one and of later ones.
    fn begins_with(&self, at: usize, new: &ManifestSegment) -> bool {
        let own = &self.segments[at];
        let is_same = (new.base_offset, new.first_index) == (own.base_offset, own.first_index);
        let read_from = self.first_read_index();
        let is_below = new.first_index <= read_from && own.first_index <= read_from;
        let is_in_order = match at.checked_sub(1) {
            // Nothing below the log start is missed.
            None => new.base_offset <= own.base_offset.max(self.durable_log_start),
            Some(before) => {
                new.base_offset == own.base_offset
                    && new.first_index >= self.segments[before].next_index
            }
        };
        is_same || (is_below && is_in_order)
    }

    /// Same for the last one.
    fn ends_with(&self, at: usize, new: &ManifestSegment) -> bool {
        let own = &self.segments[at];
        // Entries without records that Raft does not read may be missing.
        let is_below = own.next_index <= self.first_read_index();
        new.next_offset == own.next_offset
            && (new.next_index == own.next_index || (is_below && new.next_index < own.next_index))
    }

    /// Whether the new segments may take the place of the own ones there.
    fn may_take(&self, place: &Range<usize>, new: &[ManifestSegment], cleaned: Offset) -> bool {
        let (Some(first), Some(last)) = (new.first(), new.last()) else {
            return false;
        };
        let Some(end) = place.end.checked_sub(1).filter(|end| *end >= place.start) else {
            return false;
        };
        if !self.begins_with(place.start, first) || !self.ends_with(end, last) {
            return false;
        }
        // What one replica removed since it has a later record of the same key, or has seen a
        // tombstone for long enough, must not come back on another one behind that: where compaction
        // has been on either, all of its work is taken from one of them.
        let clean = self.cleaned_offset.max(cleaned);
        let is_behind = first.base_offset >= clean;
        let is_all = place.start == 0 && last.next_offset >= clean;
        (is_behind || is_all) && self.is_readable(new) && self.has_own_names(place, new)
    }

    /// Whether Raft can read on as before.
    fn is_readable(&self, new: &[ManifestSegment]) -> bool {
        let mut next = self.first_read_index();
        for (number, segment) in new.iter().enumerate() {
            if segment.next_index <= next {
                continue;
            }
            // What lies before the first one is in segments that stay.
            let follows = number == 0 || segment.first_index <= next;
            if segment.is_compacted || !follows {
                return false;
            }
            next = segment.next_index;
        }
        true
    }

    /// Base offsets rise; only the last segment of a log may be without records.
    fn has_own_names(&self, place: &Range<usize>, new: &[ManifestSegment]) -> bool {
        let before = self.segments[..place.start].last().map(|s| s.base_offset);
        let after = self.segments.get(place.end).map(|s| s.base_offset);
        let offsets = new.iter().map(|segment| segment.base_offset);
        let offsets: Vec<Offset> = before.into_iter().chain(offsets).chain(after).collect();
        offsets.windows(2).all(|pair| pair[0] < pair[1])
    }

    /// Whether both logs have the same terms, as far as both know.
    fn has_terms_of(&self, manifest: &LogManifest) -> bool {
        let theirs = &manifest.term_starts;
        let (Some(own_first), Some(their_first)) = (self.term_starts.first(), theirs.first())
        else {
            return false;
        };
        let from = own_first.first_index.max(their_first.first_index);
        let is_common = |start: &&TermStart| {
            start.first_index >= from && start.first_index <= manifest.last_index
        };
        let their_term = |index: u64| {
            let after = theirs.partition_point(|start| start.first_index <= index);
            after.checked_sub(1).map(|at| theirs[at].term)
        };
        let own = self.term_starts.iter().filter(is_common);
        let their = theirs.iter().filter(is_common);
        own.map(|start| start.first_index)
            .chain(their.map(|start| start.first_index))
            .chain([from.min(manifest.last_index)])
            .all(|index| their_term(index) == Some(self.stored_term_at(index)))
    }
}

#[cfg(test)]
#[path = "rebuild_test.rs"]
mod tests;
