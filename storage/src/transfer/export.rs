//! Sending: a view of a log up to one of its entries, whose files stay while it lives.
//!
//! Invariant: segments only grow, or go as a whole; with their sizes taken down and their deletion
//! held back, every byte of an export stays what it was.

use std::sync::Arc;

use bytes::Bytes;
use chronik_types::offset::Offset;

use super::manifest::{LogManifest, ManifestSegment, SegmentFile};
use crate::disk::read_full_at;
use crate::entry::{Purged, TermStart};
use crate::error::StorageError;
use crate::partition_log::state::LogState;
use crate::partition_log::{Log, PartitionLog};
use crate::segment::lookup::SegmentView;
use crate::segment::sidecar::{SlotKind, continuations_of};
use crate::segment::{FileKind, Segment};

/// Most bytes that one read gives.
const CHUNK_MAX_BYTES: usize = 8 << 20;

/// A log's content up to one entry, for reading in pieces. Its files stay until it is dropped.
pub struct Export {
    log: Arc<Log>,
    /// The last one is cut after the last entry.
    segments: Vec<Segment>,
    manifest: LogManifest,
}

impl PartitionLog {
    /// All of the log up to entry `upto_index`, which is committed, durable here, and not below the
    /// purged part; moves it to segments first. Waits for the disk.
    pub fn export(&self, upto_index: u64) -> Result<Export, StorageError> {
        let log = &self.log;
        log.core.poison.check()?;
        if log.lock().flushed_next <= upto_index {
            log.core.signals.flush_now(log.clone())?;
        }
        let (purged, term) = {
            let state = log.lock();
            log.check_usable(&state)?;
            let is_purged = state.purged.is_some_and(|purged| upto_index < purged.index);
            let term = state.term_at(upto_index);
            match term {
                Some(term) if !is_purged && upto_index < state.flushed_next => (state.purged, term),
                _ => return Err(log.index_out_of_range(&state, upto_index)),
            }
        };
        let next_offset = match purged {
            Some(Purged {
                index, next_offset, ..
            }) if index == upto_index => Some(next_offset),
            _ => log.offset_at(upto_index)?,
        };
        let mut export = {
            let mut state = log.lock();
            let next_offset = match next_offset {
                // What is purged since may have been compacted, and could not be cut.
                Some(next_offset) if !state.is_deleted && state.purged == purged => next_offset,
                _ => return Err(log.index_out_of_range(&state, upto_index)),
            };
            let manifest = LogManifest {
                log_start_offset: state.log_start.min(next_offset),
                next_offset,
                last_index: upto_index,
                last_term: term,
                term_starts: Vec::new(),
                cleaned_offset: state.cleaned_offset.min(next_offset),
                segments: Vec::new(),
            };
            Export::pinned(log, &mut state, manifest)
        };
        export.cut()?;
        Ok(export)
    }

    /// The log's files up to entry `upto_index`, which is committed and durable here, whether it is
    /// purged or not: for another replica that rebuilds damaged ones, and needs no state with them.
    /// Moves the entries to segments first. Waits for the disk.
    pub fn export_files(&self, upto_index: u64) -> Result<Export, StorageError> {
        let log = &self.log;
        log.core.poison.check()?;
        if log.lock().flushed_next <= upto_index {
            log.core.signals.flush_now(log.clone())?;
        }
        let mut export = {
            let mut state = log.lock();
            log.check_usable(&state)?;
            if upto_index >= state.flushed_next {
                return Err(log.index_out_of_range(&state, upto_index));
            }
            let manifest = LogManifest {
                log_start_offset: state.log_start,
                // Known when the last segment is cut.
                next_offset: Offset::ZERO,
                last_index: upto_index,
                last_term: state.stored_term_at(upto_index),
                term_starts: Vec::new(),
                cleaned_offset: state.cleaned_offset,
                segments: Vec::new(),
            };
            Export::pinned(log, &mut state, manifest)
        };
        // Not under the lock: an export that is dropped takes it.
        let last = export.segments.last();
        let last = last.ok_or_else(|| self.refused("nothing is left of it"))?;
        if last.is_compacted && last.next_index > upto_index + 1 {
            return Err(self.refused("its last segment was compacted and cannot be cut"));
        }
        export.cut()?;
        let manifest = &mut export.manifest;
        if let Some(last) = manifest.segments.last() {
            manifest.next_offset = last.next_offset;
        }
        manifest.log_start_offset = manifest.log_start_offset.min(manifest.next_offset);
        manifest.cleaned_offset = manifest.cleaned_offset.min(manifest.next_offset);
        Ok(export)
    }
}

impl Export {
    /// Pins the segments that reach above the manifest's log start, up to its last entry.
    fn pinned(log: &Arc<Log>, state: &mut LogState, mut manifest: LogManifest) -> Export {
        let (upto_index, log_start) = (manifest.last_index, manifest.log_start_offset);
        let wanted = |segment: &&Segment| {
            segment.first_index <= upto_index && segment.next_offset > log_start
        };
        let segments: Vec<Segment> = state.segments.iter().filter(wanted).copied().collect();
        let known = |start: &&TermStart| start.first_index <= upto_index;
        manifest.term_starts = state.term_starts.iter().filter(known).copied().collect();
        segments.iter().for_each(|segment| state.pin(segment.id()));
        Export {
            log: log.clone(),
            segments,
            manifest,
        }
    }

    pub fn manifest(&self) -> &LogManifest {
        &self.manifest
    }

    /// Up to `max_bytes` of a segment's file from `position` on; nothing at its end. Reads the disk.
    /// The bytes are checked by the receiver.
    pub fn read_chunk(
        &self,
        segment: usize,
        file: SegmentFile,
        position: u64,
        max_bytes: usize,
    ) -> Result<Bytes, StorageError> {
        let Some(segment) = self.segments.get(segment) else {
            return Ok(Bytes::new());
        };
        let kind = file.kind();
        let left = segment.file_bytes(kind).saturating_sub(position);
        let size = left.min(max_bytes.min(CHUNK_MAX_BYTES) as u64) as usize;
        if size == 0 {
            return Ok(Bytes::new());
        }
        let mut bytes = vec![0; size];
        self.log.check_usable(&self.log.lock())?;
        let read = self.view(*segment).read_exact(kind, &mut bytes, position);
        match self.log.explain(segment, read) {
            Ok(Some(())) => Ok(Bytes::from(bytes)),
            // It left the log meanwhile, but not the disk.
            Ok(None) => self.reread(segment, kind, bytes, position),
            Err(error) => Err(error),
        }
    }

    fn reread(
        &self,
        segment: &Segment,
        kind: FileKind,
        mut bytes: Vec<u8>,
        position: u64,
    ) -> Result<Bytes, StorageError> {
        let path = self.log.core.files.path(self.log.group, segment.id(), kind);
        let file = self
            .log
            .core
            .files
            .open(self.log.group, segment.id(), kind, false);
        let count = file.and_then(|file| read_full_at(&*file, &mut bytes, position));
        match count {
            Ok(count) if count == bytes.len() => Ok(Bytes::from(bytes)),
            Ok(_) => Err(StorageError::corrupt(
                &path,
                position,
                "the file is shorter than it was",
            )),
            Err(error) => Err(StorageError::io("cannot read", &path, error)),
        }
    }

    fn view(&self, segment: Segment) -> SegmentView<'_> {
        SegmentView {
            files: &self.log.core.files,
            group: self.log.group,
            segment,
        }
    }

    /// Leaves out of the last segment what comes after the last entry.
    fn cut(&mut self) -> Result<(), StorageError> {
        let last_index = self.manifest.last_index;
        if let Some(last) = self.segments.last().copied()
            && last.next_index > last_index + 1
        {
            let (number, slot) = self.view(last).slot_of_index(last_index)?;
            let (bytes, slots) = match slot.kind {
                SlotKind::Batches => (u64::from(slot.length), 0),
                SlotKind::Membership | SlotKind::Control => (0, continuations_of(slot.length)),
                SlotKind::Blank | SlotKind::Continuation | SlotKind::Compacted => (0, 0),
            };
            if let Some(last) = self.segments.last_mut() {
                last.log_bytes = slot.position + bytes;
                last.slots = number + 1 + slots;
                last.next_offset = slot.next_offset;
                last.next_index = last_index + 1;
            }
        }
        self.manifest.segments = self.segments.iter().map(ManifestSegment::of).collect();
        Ok(())
    }
}

impl Drop for Export {
    fn drop(&mut self) {
        let mut state = self.log.lock();
        let ids = self.segments.iter().map(Segment::id);
        let doomed: Vec<_> = ids.filter(|id| state.unpin(*id)).collect();
        // Its folder went with a deleted log; one that has come since may have files of these names.
        if state.is_deleted {
            return;
        }
        drop(state);
        for id in doomed {
            self.log.core.files.remove(self.log.group, id);
        }
    }
}

impl SegmentFile {
    pub(super) fn kind(self) -> FileKind {
        match self {
            SegmentFile::Log => FileKind::Log,
            SegmentFile::Sidecar => FileKind::Sidecar,
        }
    }
}
