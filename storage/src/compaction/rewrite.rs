//! The second half of a pass: decides what stays of each batch, and writes it to a new segment.
//!
//! Invariant: a batch that stays keeps its base offset and last offset, so no offset changes its
//! meaning; one that goes leaves a gap.

use std::collections::{HashMap, HashSet};
use std::io::{self, IoSlice};

use bytes::Bytes;
use chronik_types::id::ProducerId;
use chronik_types::offset::Offset;
use chronik_types::record_batch::BatchHeader;

use super::keys::{Learned, uncleanable};
use super::records::{self, Filtered};
use crate::error::StorageError;
use crate::partition_log::Log;
use crate::segment::indexer::Indexer;
use crate::segment::sidecar::{self, Place, SLOT_SIZE, Slot};
use crate::segment::{FileKind, Segment, SegmentId};

const BUFFER_BYTES: usize = 1 << 20;
/// When a marker that had to stay is looked at again.
const RETRY_AFTER_MS: i64 = 60 * 60 * 1000;

/// Decides what stays; sees the batches in order, from the log's first on.
pub struct Retention<'a> {
    pub learned: &'a Learned,
    pub now_ms: i64,
    pub delete_retention_ms: i64,
    pub active_producers: &'a HashMap<ProducerId, Offset>,
    /// Producers of which a transaction's records stay, whose marker is still to come.
    pub has_records: HashSet<i64>,
    pub records_removed: u64,
}

impl Retention<'_> {
    /// What stays of a batch.
    pub fn of(
        &mut self,
        log: &Log,
        header: &BatchHeader,
        batch: &Bytes,
    ) -> Result<Filtered, StorageError> {
        let is_known = header.next_offset() <= self.learned.end;
        let result = match (is_known, header.is_control()) {
            (true, true) => self.marker(header, batch),
            (true, false) => self.data(header, batch),
            (false, _) => Ok(Filtered::Whole),
        };
        result.map_err(|e| uncleanable(log, header, &e))
    }

    /// A marker stays as long as records of its transaction do, and then until everybody had the
    /// time to see it.
    fn marker(&mut self, header: &BatchHeader, batch: &Bytes) -> io::Result<Filtered> {
        let body = records::body_of(header, batch)?;
        let found = records::records_of(header, &body)?;
        if records::is_abort(&found).is_none() || self.has_records.remove(&header.producer_id.0) {
            return Ok(Filtered::Whole);
        }
        match header.delete_horizon_ms() {
            None => {
                let all = vec![true; found.len()];
                records::filter(header, batch, &found, &all, Some(self.horizon()))
            }
            Some(horizon) if horizon > self.now_ms => Ok(Filtered::Whole),
            Some(_) if self.is_last_of_producer(header) => {
                // Or the log would be due again at once.
                let all = vec![true; found.len()];
                let later = self.now_ms.saturating_add(RETRY_AFTER_MS);
                let horizon = self.horizon().max(later);
                records::filter(header, batch, &found, &all, Some(horizon))
            }
            Some(_) => {
                self.records_removed += found.len() as u64;
                Ok(Filtered::Nothing)
            }
        }
    }

    fn data(&mut self, header: &BatchHeader, batch: &Bytes) -> io::Result<Filtered> {
        let body = records::body_of(header, batch)?;
        let found = records::records_of(header, &body)?;
        let is_aborted = self.learned.is_aborted(header);
        let is_over = header
            .delete_horizon_ms()
            .is_some_and(|at| at <= self.now_ms);
        let mut has_tombstone = false;
        let mut keep = Vec::with_capacity(found.len());
        for record in &found {
            let offset = header.base_offset.plus(i64::from(record.offset_delta));
            // Kafka's cleaner drops records without a key too.
            let is_newest = record
                .key
                .is_some_and(|key| !self.learned.is_superseded(key, offset));
            let stays = !is_aborted && is_newest && (record.value.is_some() || !is_over);
            has_tombstone |= stays && record.value.is_none();
            keep.push(stays);
        }
        let kept = keep.iter().filter(|keep| **keep).count();
        self.records_removed += (found.len() - kept) as u64;
        if kept > 0 && header.is_transactional() {
            self.has_records.insert(header.producer_id.0);
        }
        let needs_horizon = has_tombstone && header.delete_horizon_ms().is_none();
        let new_horizon = needs_horizon.then(|| self.horizon());
        match records::filter(header, batch, &found, &keep, new_horizon)? {
            Filtered::Nothing if !self.is_last_of_producer(header) => Ok(Filtered::Nothing),
            Filtered::Nothing if found.is_empty() => Ok(Filtered::Whole),
            Filtered::Nothing => records::emptied(header, batch).map(Filtered::Part),
            other => Ok(other),
        }
    }

    fn horizon(&self) -> i64 {
        self.now_ms.saturating_add(self.delete_retention_ms)
    }

    /// Without it the producer's next batch could not be told from a repeated one.
    fn is_last_of_producer(&self, header: &BatchHeader) -> bool {
        header.is_idempotent()
            && self.active_producers.get(&header.producer_id) == Some(&header.last_offset())
    }
}

/// A segment that is written in place of others. Its files go if it is not taken.
pub struct Writer<'a> {
    log: &'a Log,
    pub segment: Segment,
    /// Those that it takes the place of.
    pub old: Vec<SegmentId>,
    pub is_changed: bool,
    log_buffer: Vec<u8>,
    sidecar_buffer: Vec<u8>,
    indexer: Indexer,
    /// Bytes of each file that are written.
    written: HashMap<FileKind, u64>,
    is_taken: bool,
}

impl<'a> Writer<'a> {
    pub fn new(log: &'a Log, first: &Segment) -> Result<Self, StorageError> {
        let id = SegmentId {
            base_offset: first.base_offset,
            generation: log.take_generation()?,
        };
        let mut segment = Segment::new(id, first.first_index, first.created_ms);
        segment.is_sealed = true;
        segment.is_compacted = true;
        Ok(Writer {
            log,
            segment,
            old: Vec::new(),
            is_changed: false,
            log_buffer: Vec::new(),
            sidecar_buffer: Vec::new(),
            indexer: Indexer::default(),
            written: HashMap::new(),
            is_taken: false,
        })
    }

    /// Adds what stays of a batch. Gives the bytes that were written to the disk.
    pub fn batch(&mut self, slot: &Slot, batch: &Bytes) -> Result<u64, StorageError> {
        let header = BatchHeader::parse(batch).map_err(|e| {
            let path = self
                .log
                .core
                .files
                .path(self.log.group, self.segment.id(), FileKind::Log);
            StorageError::io("cannot write", &path, io::Error::other(e))
        })?;
        let position = self.segment.log_bytes;
        self.indexer.add(&mut self.segment, &header, position);
        let place = Place {
            position,
            next_offset: header.next_offset(),
            max_timestamp: header.max_timestamp,
            leader_epoch: header.leader_epoch,
        };
        let length = header.size_bytes() as u32;
        let base = header.base_offset;
        sidecar::encode_compacted(&mut self.sidecar_buffer, slot.index, base, place, length);
        self.log_buffer.extend_from_slice(batch);
        self.segment.log_bytes += u64::from(length);
        self.segment.slots += 1;
        match self.log_buffer.len() >= BUFFER_BYTES {
            true => self.write(),
            false => Ok(0),
        }
    }

    /// All of an old segment was added.
    pub fn end_of(&mut self, old: &Segment) {
        self.segment.next_offset = old.next_offset;
        self.segment.next_index = old.next_index;
        self.segment.appended_ms = old.appended_ms;
        self.is_changed |= !self.old.is_empty();
        self.old.push(old.id());
    }

    /// Writes the rest and fsyncs all.
    pub fn finish(&mut self) -> Result<u64, StorageError> {
        let bytes = self.write()?;
        let files = &self.log.core.files;
        for kind in FileKind::ALL {
            if self.segment.file_bytes(kind) > 0 {
                let (group, id) = (self.log.group, self.segment.id());
                self.log.core.sync_file(group, id, kind)?;
            }
        }
        let dir = crate::segment::dir_of(files.partitions(), self.log.group);
        let synced = files.disk().sync_dir(&dir);
        synced.map_err(|e| self.log.core.sync_failed(&dir, e))?;
        debug_assert_eq!(
            self.segment.file_bytes(FileKind::Sidecar) % SLOT_SIZE as u64,
            0
        );
        Ok(bytes)
    }

    /// From now on the log has this segment.
    pub fn taken(mut self) {
        self.is_taken = true;
    }

    fn write(&mut self) -> Result<u64, StorageError> {
        let mut total = 0;
        let buffers = [
            (FileKind::Log, &mut self.log_buffer),
            (FileKind::Sidecar, &mut self.sidecar_buffer),
            (FileKind::OffsetIndex, &mut self.indexer.offset_index),
            (FileKind::TimeIndex, &mut self.indexer.time_index),
        ];
        for (kind, buffer) in buffers {
            if buffer.is_empty() {
                continue;
            }
            let files = &self.log.core.files;
            let position = self.written.entry(kind).or_default();
            let file = files.open(self.log.group, self.segment.id(), kind, true);
            let written = file.and_then(|file| file.write_at(&[IoSlice::new(buffer)], *position));
            written.map_err(|e| {
                let path = files.path(self.log.group, self.segment.id(), kind);
                StorageError::io("cannot write", &path, e)
            })?;
            *position += buffer.len() as u64;
            total += buffer.len() as u64;
            buffer.clear();
        }
        Ok(total)
    }
}

impl Drop for Writer<'_> {
    fn drop(&mut self) {
        // Of a deleted log too: a later log of its group may have made the folder again, with other names.
        if !self.is_taken {
            self.log
                .core
                .files
                .remove(self.log.group, self.segment.id());
        }
    }
}
