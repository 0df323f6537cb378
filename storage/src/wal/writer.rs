//! The WAL thread: takes what has queued up, writes it as one frame, syncs once, tells everybody.
//!
//! Invariant: callbacks run in the order of the records, and only after the fdatasync that covers
//! them. After a failed write or sync nothing is ever written again.

use std::io::IoSlice;
use std::sync::Arc;
use std::time::Duration;

use uuid::Uuid;

use super::files::{WalFile, WalFiles, path_of};
use super::frame::{FrameHeader, HEADER_SIZE};
use super::queue::{Item, WalQueue, Written};
use crate::disk::DiskFile;
use crate::error::StorageError;
use crate::pace::{Priority, set_priority};
use crate::poison::Poison;

/// Most bytes of one group commit, unless a single record is larger.
const GROUP_BYTES_MAX: usize = 4 << 20;

const ROOM_RETRY_INTERVAL: Duration = Duration::from_millis(100);

/// Where the log goes on after recovery.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct WalPosition {
    pub next_sequence: u64,
    pub next_frame: u64,
    pub next_record: u64,
}

pub struct WalWriter {
    files: Arc<WalFiles>,
    queue: Arc<WalQueue>,
    poison: Arc<Poison>,
    storage_id: Uuid,
    next: WalPosition,
    open: Option<OpenFile>,
    on_new_file: Box<dyn Fn() + Send>,
    /// It has a thread of its own, which may wait.
    waits_for_room: bool,
}

/// Tells everybody, when it is dropped, that nothing will be written any more.
pub struct Abandon(pub Arc<WalQueue>);

impl Drop for Abandon {
    fn drop(&mut self) {
        self.0.abandon();
    }
}

struct OpenFile {
    file: Arc<dyn DiskFile>,
    sequence: u64,
    position: u64,
    capacity: u64,
}

impl WalWriter {
    /// `on_new_file` is called each time the log goes on in another file.
    pub fn new(
        files: Arc<WalFiles>,
        queue: Arc<WalQueue>,
        poison: Arc<Poison>,
        storage_id: Uuid,
        next: WalPosition,
        on_new_file: Box<dyn Fn() + Send>,
    ) -> Self {
        files.set_confirmed(next.next_frame, next.next_record);
        WalWriter {
            files,
            queue,
            poison,
            storage_id,
            next,
            open: None,
            on_new_file,
            waits_for_room: false,
        }
    }

    /// Makes the first file, so that a full or read-only disk is found at start.
    pub fn open_first(&mut self) -> Result<(), StorageError> {
        self.open_next(0)
    }

    /// Runs until the queue is finished.
    pub fn run(mut self) {
        // Also after a panic, so that nobody waits for a thread that is gone.
        let _abandon = Abandon(self.queue.clone());
        // Everybody waits for this thread, which does little but wait for the disk itself: with all cores
        // busy its turn must come at once. Without the permission it stays as it is.
        if !set_priority(Priority::First) {
            tracing::debug!("the WAL thread runs at normal priority");
        }
        self.waits_for_room = true;
        loop {
            let group = self.queue.take_group(GROUP_BYTES_MAX);
            if group.is_empty() {
                return;
            }
            self.commit(group);
        }
    }

    /// One round of `run` without waiting. False: there was nothing to write.
    pub fn step(&mut self) -> bool {
        let group = self.queue.try_take_group(GROUP_BYTES_MAX);
        let has_work = !group.is_empty();
        if has_work {
            self.commit(group);
        }
        has_work
    }

    /// Writes and syncs a group, and tells everybody what became of it.
    fn commit(&mut self, group: Vec<Item>) {
        let written = self.poison.check().and_then(|()| self.write(&group));
        self.queue.group_ended();
        match written {
            Ok(mut written) => {
                for item in group {
                    (item.done)(Ok(written));
                    written.record_number += 1;
                }
            }
            Err(error) => {
                let error = match error {
                    StorageError::Poisoned { .. } => error,
                    other => self.poison.set(&other.to_string()),
                };
                for item in group {
                    (item.done)(Err(error.clone()));
                }
            }
        }
    }

    fn write(&mut self, group: &[Item]) -> Result<Written, StorageError> {
        let body_size: usize = group.iter().map(|item| item.record.size_bytes()).sum();
        let frame_size = (HEADER_SIZE + body_size) as u64;
        let wants_new_file = group.first().is_some_and(|item| item.in_new_file);
        match &self.open {
            Some(open) if !wants_new_file && open.position + frame_size <= open.capacity => {}
            Some(open) if wants_new_file && open.position == 0 => {}
            _ => self.open_next_when_there_is_room(frame_size)?,
        }
        let open = self.open.as_mut().expect("a file was opened above");
        let header = FrameHeader {
            file_sequence: open.sequence,
            frame_number: self.next.next_frame,
            first_record: self.next.next_record,
            body_size: u32::try_from(body_size).expect("appends above 1 GiB are refused"),
            record_count: group.len() as u32,
        };
        let parts = || group.iter().flat_map(|item| item.record.parts());
        let header = header.encode(self.storage_id, parts());
        let mut slices = Vec::with_capacity(group.len() * 2 + 1);
        slices.push(IoSlice::new(&header));
        slices.extend(parts().map(IoSlice::new));
        open.file
            .write_at(&slices, open.position)
            .and_then(|()| open.file.sync_data())
            .map_err(|e| {
                StorageError::io("cannot write", &path_of(self.files.dir(), open.sequence), e)
            })?;
        let written = Written {
            file_sequence: open.sequence,
            record_number: self.next.next_record,
        };
        open.position += frame_size;
        self.next.next_frame += 1;
        self.next.next_record += group.len() as u64;
        self.files
            .set_confirmed(self.next.next_frame, self.next.next_record);
        Ok(written)
    }

    /// A full disk is waited for, since nothing of the frame is written yet: records are refused
    /// meanwhile, and what is queued is little.
    fn open_next_when_there_is_room(&mut self, frame_size: u64) -> Result<(), StorageError> {
        let mut has_waited = false;
        let opened = loop {
            match self.open_next(frame_size) {
                Err(error) if error.is_out_of_room() && self.waits_for_room => {
                    if !std::mem::replace(&mut has_waited, true) {
                        tracing::error!(%error, "the WAL waits for room on the disk");
                        self.queue.set_waits_for_room(true);
                    }
                    if !self.queue.wait_while_open(ROOM_RETRY_INTERVAL) {
                        break Err(error);
                    }
                }
                other => break other,
            }
        };
        if has_waited {
            self.queue.set_waits_for_room(false);
        }
        opened
    }

    fn open_next(&mut self, frame_size: u64) -> Result<(), StorageError> {
        let next = WalFile {
            sequence: self.next.next_sequence,
            first_frame: self.next.next_frame,
            first_record: self.next.next_record,
        };
        let (file, capacity) = self.files.open_next(next, frame_size)?;
        self.next.next_sequence += 1;
        self.open = Some(OpenFile {
            file,
            sequence: next.sequence,
            position: 0,
            capacity,
        });
        (self.on_new_file)();
        Ok(())
    }
}
