//! Writes committed entries to the end of a partition's segments, in a few large writes.
//!
//! Invariant: nothing is published by the appender; the caller replaces the log's segments with
//! `finish`'s result after all writes are done, so readers never see bytes that are not there.

use std::io::{self, IoSlice};

use bytes::Bytes;
use chronik_types::epoch::LeaderEpoch;
use chronik_types::id::RaftGroupId;
use chronik_types::record_batch::batches;

use super::indexer::Indexer;
use super::open_files::OpenFiles;
use super::sidecar::Place;
use super::{FileKind, Segment, SegmentId, dir_of, sidecar};
use crate::entry::{LogEntry, Payload};
use crate::error::StorageError;

/// Appends to the segments of one log.
pub struct Appender<'a> {
    files: &'a OpenFiles,
    group: RaftGroupId,
    segment_bytes: u64,
    generation: u32,
    now_ms: i64,
    /// The segment that is being written, with all that is buffered counted in.
    segment: Segment,
    /// The same without what is buffered.
    written: Segment,
    is_new: bool,
    done: Vec<Segment>,
    log: Vec<Bytes>,
    sidecar: Vec<u8>,
    indexer: Indexer,
}

impl<'a> Appender<'a> {
    /// Goes on in `segment`, which may be a new one.
    pub fn new(
        files: &'a OpenFiles,
        group: RaftGroupId,
        segment_bytes: u64,
        segment: Segment,
        generation: u32,
        now_ms: i64,
    ) -> Self {
        Appender {
            files,
            group,
            // Positions in the offset index have 32 bits.
            segment_bytes: segment_bytes.min(1 << 31),
            generation,
            now_ms,
            segment,
            written: segment,
            is_new: segment.slots == 0,
            done: Vec::new(),
            log: Vec::new(),
            sidecar: Vec::new(),
            indexer: Indexer::default(),
        }
    }

    pub fn append(&mut self, entry: &LogEntry) -> Result<(), StorageError> {
        let size = match &entry.payload {
            Payload::Batches { bytes, .. } => bytes.len() as u64,
            _ => 0,
        };
        if self.must_roll(size, entry) {
            self.write()?;
            let id = SegmentId {
                base_offset: self.segment.next_offset,
                generation: self.generation,
            };
            let next = Segment::new(id, entry.index, self.now_ms);
            self.segment.is_sealed = true;
            self.done.push(std::mem::replace(&mut self.segment, next));
            self.written = next;
            self.is_new = true;
        }
        let position = self.segment.log_bytes;
        let (mut max_timestamp, mut leader_epoch) = (i64::MIN, LeaderEpoch(0));
        if let Payload::Batches {
            bytes, next_offset, ..
        } = &entry.payload
        {
            (max_timestamp, leader_epoch) = self.index_batches(bytes);
            self.segment.log_bytes += size;
            self.segment.next_offset = *next_offset;
            self.log.push(bytes.clone());
        }
        let next_offset = self.segment.next_offset;
        let place = Place {
            position,
            next_offset,
            max_timestamp,
            leader_epoch,
        };
        self.segment.slots += sidecar::encode(&mut self.sidecar, entry, place);
        self.segment.next_index = entry.index + 1;
        self.segment.appended_ms = self.now_ms;
        Ok(())
    }

    /// Writes what is buffered, and gives the segments: those that are sealed, and last the active
    /// one. The first of them is the one the appender started with.
    pub fn finish(mut self) -> Result<Vec<Segment>, StorageError> {
        self.write()?;
        self.done.push(self.segment);
        Ok(self.done)
    }

    fn must_roll(&self, size: u64, entry: &LogEntry) -> bool {
        let Payload::Batches { next_offset, .. } = &entry.payload else {
            return false;
        };
        let is_full = self.segment.log_bytes + size > self.segment_bytes;
        // Offsets in the indexes are 32 bits from the base offset.
        let is_wide =
            next_offset.0.saturating_sub(self.segment.base_offset.0) > i64::from(i32::MAX);
        self.segment.log_bytes > 0 && (is_full || is_wide)
    }

    /// Adds the batches of an entry to the indexes, and gives their largest timestamp and leader epoch.
    fn index_batches(&mut self, bytes: &Bytes) -> (i64, LeaderEpoch) {
        let mut largest = i64::MIN;
        let mut leader_epoch = LeaderEpoch(0);
        for (at, header) in batches(bytes).flatten() {
            let position = self.segment.log_bytes + at as u64;
            self.indexer.add(&mut self.segment, &header, position);
            largest = largest.max(header.max_timestamp);
            leader_epoch = header.leader_epoch;
        }
        (largest, leader_epoch)
    }

    fn write(&mut self) -> Result<(), StorageError> {
        if self.sidecar.is_empty() {
            return Ok(());
        }
        if self.is_new {
            let dir = dir_of(self.files.partitions(), self.group);
            self.files
                .disk()
                .create_dir_all(&dir)
                .map_err(|e| StorageError::io("cannot make", &dir, e))?;
        }
        let log: Vec<IoSlice<'_>> = self.log.iter().map(|bytes| IoSlice::new(bytes)).collect();
        self.write_file(FileKind::Log, &log)?;
        self.write_file(
            FileKind::OffsetIndex,
            &[IoSlice::new(&self.indexer.offset_index)],
        )?;
        self.write_file(
            FileKind::TimeIndex,
            &[IoSlice::new(&self.indexer.time_index)],
        )?;
        self.write_file(FileKind::Sidecar, &[IoSlice::new(&self.sidecar)])?;
        self.log.clear();
        self.indexer.clear();
        self.sidecar.clear();
        self.written = self.segment;
        self.is_new = false;
        Ok(())
    }

    /// A file is made when its first byte comes: an idle partition has few bytes and few files.
    fn write_file(&self, kind: FileKind, parts: &[IoSlice<'_>]) -> Result<(), StorageError> {
        if parts.iter().all(|part| part.is_empty()) {
            return Ok(());
        }
        let id = self.segment.id();
        let position = self.written.file_bytes(kind);
        let write = || -> io::Result<()> {
            let file = self.files.open(self.group, id, kind, position == 0)?;
            if position == 0 && file.size()? > 0 {
                // Left by a crash before this part of the log was checkpointed.
                file.set_size(0)?;
            }
            file.write_at(parts, position)
        };
        write().map_err(|e| {
            StorageError::io("cannot write", &self.files.path(self.group, id, kind), e)
        })
    }
}
