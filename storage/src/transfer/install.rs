//! Taking in: receives segment files beside a log's own, checks them, and makes them its content.
//!
//! Invariant: the log changes by one record of the WAL, written after all files are fsynced. A crash
//! before it leaves files that no log refers to; the next start keeps those of a copy of a whole log, for
//! the next install to go on with, and removes the rest.

use std::collections::HashMap;
use std::ops::ControlFlow;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use bytes::Bytes;
use chronik_types::id::RaftGroupId;
use chronik_types::offset::Offset;
use chronik_types::record_batch::BatchHeader;

use super::manifest::{LogManifest, ManifestSegment, SegmentFile};
use super::unfinished::{self, BegunCopy, Received};
use crate::checkpoint::GroupCheckpoint;
use crate::entry::Purged;
use crate::error::StorageError;
use crate::pace::HalfOfTheTime;
use crate::partition_log::Log;
use crate::partition_log::state::ReplicaState;
use crate::segment::indexer::Indexer;
use crate::segment::lookup::SegmentView;
use crate::segment::sidecar::Slot;
use crate::segment::{FileKind, Segment, SegmentId, dir_of};
use crate::storage::Storage;
use crate::sync::lock;

/// Most bytes of a replica's state that an install takes.
const STATE_MAX_BYTES: usize = 256 << 20;

/// What is received goes to the disk in such pieces. All of it at once, at the end, would hold up the
/// fsyncs of the WAL for as long as it takes.
const SYNC_BYTES: usize = 1 << 20;

/// Segment files on their way into a log. Nothing of the log changes before `commit`.
pub struct Installer {
    log: Arc<Log>,
    manifest: LogManifest,
    generation: u32,
    parts: Vec<Mutex<Part>>,
    /// Of all parts.
    received_bytes: AtomicU64,
    /// It has a description on the disk; a rebuild has none.
    is_described: bool,
    is_committed: bool,
}

/// One segment that is received.
#[derive(Default)]
struct Part {
    received: Received,
    /// Written since the last fsync.
    unsynced_bytes: usize,
    /// Set when all of it was checked and fsynced.
    checked: Option<Segment>,
}

/// What the flusher needs to replace a log's content. All files are on disk.
pub struct InstallRequest {
    pub log: Arc<Log>,
    pub content: GroupCheckpoint,
}

impl Storage {
    /// Starts to replace the content of the group's log, or to make one; goes on with what a process
    /// before has left of that, if it is of use. Several at a time for one group do not disturb each
    /// other; the last one that is committed stays. Waits for the disk.
    pub fn install(
        &self,
        group: RaftGroupId,
        manifest: LogManifest,
    ) -> Result<Installer, StorageError> {
        manifest.check()?;
        let log = self.open_log(group)?.log;
        if let Some(left) = log.core.unfinished.take(group) {
            let mut installer = Installer::of(log, left);
            installer.is_described = true;
            return installer.go_on(manifest);
        }
        let mut installer = Installer::new(log, manifest)?;
        unfinished::begin(&installer.log.core)?;
        installer.is_described = true;
        installer.describe()?;
        Ok(installer)
    }
}

fn received_of(parts: &[Mutex<Part>]) -> u64 {
    parts.iter().map(|part| lock(part).received.bytes()).sum()
}

impl Installer {
    /// For a manifest that was checked.
    pub(super) fn new(log: Arc<Log>, manifest: LogManifest) -> Result<Installer, StorageError> {
        log.core.announce_files()?;
        let generation = log.take_generation()?;
        let dir = dir_of(log.core.files.partitions(), log.group);
        let disk = log.core.files.disk();
        disk.create_dir_all(&dir)
            .map_err(|e| StorageError::io("cannot make", &dir, e))?;
        let received = vec![Received::default(); manifest.segments.len()];
        let begun = BegunCopy {
            generation,
            manifest,
            received,
        };
        Ok(Installer::of(log, begun))
    }

    fn of(log: Arc<Log>, begun: BegunCopy) -> Installer {
        let part = |received| Part {
            received,
            ..Part::default()
        };
        let parts = begun.received.into_iter().map(part);
        let parts: Vec<Mutex<Part>> = parts.map(Mutex::new).collect();
        Installer {
            log,
            manifest: begun.manifest,
            generation: begun.generation,
            received_bytes: received_of(&parts).into(),
            parts,
            is_described: false,
            is_committed: false,
        }
    }

    pub fn manifest(&self) -> &LogManifest {
        &self.manifest
    }

    /// Goes on under another description of the same log, as another replica gives it later, with what has
    /// come of segments that both have. Compacted ones come anew: replicas compact each for itself.
    pub fn go_on(mut self, manifest: LogManifest) -> Result<Installer, StorageError> {
        manifest.check()?;
        self.log.check_usable(&self.log.lock())?;
        let old = std::mem::replace(&mut self.manifest, manifest);
        let parts = std::mem::take(&mut self.parts).into_iter();
        let mut came: HashMap<Offset, (ManifestSegment, Mutex<Part>)> = old
            .segments
            .into_iter()
            .zip(parts)
            .map(|(segment, part)| (segment.base_offset, (segment, part)))
            .collect();
        let parts = self.manifest.segments.iter().map(|wanted| {
            let Some((had, part)) = came.remove(&wanted.base_offset) else {
                return Mutex::default();
            };
            if had.is_start_of(wanted) {
                if had != *wanted {
                    lock(&part).checked = None;
                }
                return part;
            }
            self.remove(&had);
            Mutex::default()
        });
        self.parts = parts.collect();
        self.received_bytes = received_of(&self.parts).into();
        came.values().for_each(|(gone, _)| self.remove(gone));
        if self.is_described {
            self.describe()?;
        }
        Ok(self)
    }

    /// Says on the disk what this is, for a start that finds it unfinished.
    fn describe(&self) -> Result<(), StorageError> {
        let Installer { log, manifest, .. } = self;
        unfinished::describe(&log.core, log.group, self.generation, manifest)
    }

    /// Writes a piece of a segment's file. Pieces may come in any order and more than once, those of
    /// several segments at the same time.
    pub fn write(
        &self,
        segment: usize,
        file: SegmentFile,
        position: u64,
        bytes: &[u8],
    ) -> Result<(), StorageError> {
        let (described, part) = self.part(segment)?;
        let end = position.checked_add(bytes.len() as u64);
        let Some(end) = end.filter(|end| *end <= described.file_bytes(file)) else {
            return Err(invalid("a piece lies beyond the end of its file"));
        };
        self.log.core.poison.check()?;
        self.log.core.space.check(bytes.len())?;
        let mut part = lock(part);
        self.log.check_usable(&self.log.lock())?;
        part.checked = None;
        let (group, id) = (self.log.group, described.id(self.generation));
        let core = &self.log.core;
        core.write_file(group, id, file.kind(), position, bytes)?;
        let received = part.received.of_mut(file);
        if position <= *received {
            let more = end.saturating_sub(*received);
            *received += more;
            self.received_bytes.fetch_add(more, Ordering::Relaxed);
        }
        part.unsynced_bytes += bytes.len();
        if part.unsynced_bytes < SYNC_BYTES {
            return Ok(());
        }
        part.unsynced_bytes = 0;
        drop(part);
        self.sync(id, file.kind())
    }

    /// Bytes of all files that have come, of `total_bytes` of the manifest. Waits for nothing.
    pub fn received_bytes(&self) -> u64 {
        self.received_bytes.load(Ordering::Relaxed)
    }

    /// Bytes of a file that have come, counted from its start up to the first gap.
    pub fn received(&self, segment: usize, file: SegmentFile) -> u64 {
        let part = self.parts.get(segment);
        part.map_or(0, |part| lock(part).received.of(file))
    }

    /// Reads a segment back, checks every byte of it, makes its indexes, and fsyncs. If it is found
    /// to be damaged, it must be received once more. Waits for the disk.
    pub fn check_segment(&self, segment: usize) -> Result<(), StorageError> {
        let (described, part) = self.part(segment)?;
        self.log.core.poison.check()?;
        let mut part = lock(part);
        if part.checked.is_some() {
            return Ok(());
        }
        if part.received != Received::all_of(described) {
            return Err(invalid("a segment is not complete"));
        }
        match self.check(described) {
            Ok(segment) => {
                part.checked = Some(segment);
                Ok(())
            }
            Err(error) => {
                // A deleted log has no files to check.
                self.log.check_usable(&self.log.lock())?;
                if matches!(error, StorageError::Corrupt { .. }) {
                    let less = std::mem::take(&mut part.received).bytes();
                    self.received_bytes.fetch_sub(less, Ordering::Relaxed);
                }
                Err(error)
            }
        }
    }

    /// Makes what was received the log's content, with the replica's state as of the last entry.
    /// Durable when it returns. Waits for the disk.
    pub fn commit(mut self, replica_state: Bytes) -> Result<(), StorageError> {
        if replica_state.len() > STATE_MAX_BYTES {
            return Err(StorageError::TooLarge {
                what: "replica state",
                size_bytes: replica_state.len(),
                max_bytes: STATE_MAX_BYTES,
            });
        }
        let segments = self.finish()?;
        let content = self.content(segments, replica_state);
        self.commit_by(|log| {
            let request = InstallRequest {
                log: log.clone(),
                content,
            };
            log.core.signals.install(request)
        })
    }

    /// Checks what was not checked yet, and makes the names durable too. Gives the segments.
    pub(super) fn finish(&mut self) -> Result<Vec<Segment>, StorageError> {
        (0..self.parts.len()).try_for_each(|segment| self.check_segment(segment))?;
        let files = &self.log.core.files;
        let dir = dir_of(files.partitions(), self.log.group);
        for dir in [&dir, files.partitions()] {
            let synced = files.disk().sync_dir(dir);
            synced.map_err(|e| {
                self.distrust();
                self.log.core.sync_failed(dir, e)
            })?;
        }
        let checked = self.parts.iter().filter_map(|part| lock(part).checked);
        Ok(checked.collect())
    }

    /// Has a record written that names the files.
    pub(super) fn commit_by(
        mut self,
        write: impl FnOnce(&Arc<Log>) -> Result<(), StorageError>,
    ) -> Result<(), StorageError> {
        // What the record says is true from now on, whether its answer comes or not: a start will
        // find out, and must not miss the files.
        self.is_committed = true;
        let written = write(&self.log);
        match &written {
            Ok(()) => self.remove_description(),
            Err(error) => self.is_committed = !error.is_refused_change(),
        }
        written
    }

    fn content(&self, segments: Vec<Segment>, replica_state: Bytes) -> GroupCheckpoint {
        // One without records says nothing that is not said elsewhere, and has no files.
        let has_records = |segment: &Segment| segment.base_offset < segment.next_offset;
        let segments: Vec<Segment> = segments.into_iter().filter(has_records).collect();
        let manifest = &self.manifest;
        let next_index = manifest.last_index + 1;
        GroupCheckpoint {
            group: self.log.group,
            first_index: segments.first().map_or(next_index, |s| s.first_index),
            flushed_next: next_index,
            flushed_offset: manifest.next_offset,
            purged: Some(Purged {
                index: manifest.last_index,
                term: manifest.last_term,
                next_offset: manifest.next_offset,
            }),
            log_start: manifest.log_start_offset,
            cleaned_offset: manifest.cleaned_offset,
            generation: self.generation,
            committed_next: next_index,
            replay_from_record: 0,
            segments,
            term_starts: manifest.term_starts.clone(),
            vote: None,
            replica_state: Some(ReplicaState {
                index: manifest.last_index,
                state: replica_state,
            }),
        }
    }

    fn part(&self, segment: usize) -> Result<(&ManifestSegment, &Mutex<Part>), StorageError> {
        let described = self.manifest.segments.get(segment);
        let found = described.zip(self.parts.get(segment));
        found.ok_or_else(|| invalid("the manifest has no such segment"))
    }

    /// Removes what has come of a segment.
    fn remove(&self, described: &ManifestSegment) {
        let id = described.id(self.generation);
        self.log.core.files.remove(self.log.group, id);
    }

    fn sync(&self, id: SegmentId, kind: FileKind) -> Result<(), StorageError> {
        let synced = self.log.core.sync_file(self.log.group, id, kind);
        synced.inspect_err(|_| self.distrust())
    }

    fn distrust(&self) {
        if self.is_described {
            unfinished::distrust(&self.log.core, self.log.group, self.generation);
        }
    }

    fn remove_description(&self) {
        if self.is_described {
            unfinished::remove_description(&self.log.core, self.log.group, self.generation);
        }
    }

    /// The next start is to find it.
    fn is_left(&self) -> bool {
        self.is_described && self.log.core.unfinished.is_ending()
    }

    fn check(&self, described: &ManifestSegment) -> Result<Segment, StorageError> {
        let files = &self.log.core.files;
        let mut segment = described.to_segment(self.generation);
        let view = SegmentView {
            files,
            group: self.log.group,
            segment,
        };
        let mut indexer = Indexer::default();
        let mut wrong_term = None;
        let mut visit = |slot: &Slot, header: &BatchHeader, position: u64, _: &Bytes| {
            indexer.add(&mut segment, header, position);
            let (manifest, epoch) = (&self.manifest, i64::from(slot.leader_epoch.0));
            if !manifest.is_in_term(slot.index, epoch) {
                wrong_term.get_or_insert(position);
            }
            Ok(())
        };
        // Clients are served by the same cores.
        let mut work = HalfOfTheTime::begin();
        let mut pace = |_| {
            work.rest();
            ControlFlow::Continue(())
        };
        let _ = view.verify(&mut visit, &mut pace)?;
        if let Some(position) = wrong_term {
            return Err(view.corrupt(FileKind::Log, position, "the batch is of another term"));
        }
        let indexes = [
            (FileKind::OffsetIndex, &indexer.offset_index),
            (FileKind::TimeIndex, &indexer.time_index),
        ];
        let (core, group, id) = (&self.log.core, self.log.group, segment.id());
        for (kind, bytes) in indexes {
            core.write_file(group, id, kind, 0, bytes)?;
        }
        let kinds = FileKind::ALL.into_iter();
        for kind in kinds.filter(|kind| segment.file_bytes(*kind) > 0) {
            self.sync(id, kind)?;
        }
        Ok(segment)
    }
}

impl Drop for Installer {
    fn drop(&mut self) {
        if self.is_committed || self.is_left() {
            return;
        }
        // Of a deleted log too: a later log of its group may have made the folder again, with other names.
        let segments = self.manifest.segments.iter();
        segments.for_each(|described| self.remove(described));
        self.remove_description();
    }
}

fn invalid(why: &'static str) -> StorageError {
    StorageError::InvalidManifest { why: why.into() }
}
