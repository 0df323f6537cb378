//! The files of the WAL: which are in use, and the spares that wait to be used again.
//!
//! Invariant: a spare's blocks were all written before, so that an fdatasync of it never has to
//! touch the file system's journal.

use std::collections::VecDeque;
use std::io::{self, IoSlice};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use crate::disk::{Disk, DiskFile};
use crate::error::{CANNOT_SYNC, StorageError};
use crate::sync::lock;

/// The first file is small and not prepared, so that a new broker starts at once.
const UNPREPARED_FILE_MAX_BYTES: u64 = 4 << 20;
const SPARES_MAX: usize = 4;
static ZEROES: [u8; 1 << 16] = [0; 1 << 16];

/// A file that holds live frames, or is about to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct WalFile {
    pub sequence: u64,
    pub first_frame: u64,
    pub first_record: u64,
}

pub struct WalFiles {
    disk: Arc<dyn Disk>,
    dir: PathBuf,
    file_size_bytes: u64,
    inner: Mutex<Inner>,
    /// Frames and records that are confirmed, counted over the WAL's life.
    confirmed_frames: AtomicU64,
    confirmed_records: AtomicU64,
}

#[derive(Default)]
struct Inner {
    live: VecDeque<WalFile>,
    spares: Vec<PathBuf>,
    spares_made: u64,
}

impl WalFiles {
    pub fn new(disk: Arc<dyn Disk>, dir: PathBuf, file_size_bytes: u64) -> Self {
        WalFiles {
            disk,
            dir,
            file_size_bytes,
            inner: Mutex::default(),
            confirmed_frames: AtomicU64::new(0),
            confirmed_records: AtomicU64::new(0),
        }
    }

    pub fn set_confirmed(&self, frames: u64, records: u64) {
        self.confirmed_records.store(records, Ordering::Release);
        self.confirmed_frames.store(frames, Ordering::Release);
    }

    /// Numbers of the next frame and the next record.
    pub fn confirmed(&self) -> (u64, u64) {
        let frames = self.confirmed_frames.load(Ordering::Acquire);
        (frames, self.confirmed_records.load(Ordering::Acquire))
    }

    pub fn file_size_bytes(&self) -> u64 {
        self.file_size_bytes
    }

    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Takes over what recovery found.
    pub fn set_live(&self, live: Vec<WalFile>) {
        lock(&self.inner).live = live.into();
    }

    /// The files in use, oldest first.
    pub fn live(&self) -> Vec<WalFile> {
        lock(&self.inner).live.iter().copied().collect()
    }

    pub fn live_count(&self) -> usize {
        lock(&self.inner).live.len()
    }

    pub fn wants_spare(&self) -> bool {
        lock(&self.inner).spares.is_empty()
    }

    /// Makes the file that comes next in the log, large enough for a frame of `frame_size`, and
    /// gives its capacity. Its name is durable when this returns.
    pub fn open_next(
        &self,
        file: WalFile,
        frame_size: u64,
    ) -> Result<(Arc<dyn DiskFile>, u64), StorageError> {
        let path = path_of(&self.dir, file.sequence);
        let opened = self.open_file(&path, frame_size);
        let opened = opened.map_err(|e| StorageError::io("cannot make", &path, e))?;
        self.disk
            .sync_dir(&self.dir)
            .map_err(|e| StorageError::io(CANNOT_SYNC, &self.dir, e))?;
        lock(&self.inner).live.push_back(file);
        Ok(opened)
    }

    fn open_file(&self, path: &Path, frame_size: u64) -> io::Result<(Arc<dyn DiskFile>, u64)> {
        let spare = if frame_size <= self.file_size_bytes {
            lock(&self.inner).spares.pop()
        } else {
            None
        };
        let file = match spare {
            Some(spare) => {
                self.disk.rename(&spare, path)?;
                self.disk.open(path, false)?
            }
            None => self.disk.open(path, true)?,
        };
        let size = file.size()?;
        let capacity = if size >= self.file_size_bytes {
            size
        } else {
            self.file_size_bytes.min(UNPREPARED_FILE_MAX_BYTES)
        };
        let capacity = capacity.max(frame_size);
        if size < capacity {
            // A frame must never find the disk full halfway.
            file.allocate(capacity)?;
        }
        Ok((file, capacity))
    }

    /// Takes the files before `sequence` out of use; the checkpoint no longer needs them.
    pub fn retire_before(&self, sequence: u64) -> Result<(), StorageError> {
        let mut retired = Vec::new();
        {
            let mut inner = lock(&self.inner);
            while inner
                .live
                .front()
                .is_some_and(|file| file.sequence < sequence)
            {
                retired.extend(inner.live.pop_front());
            }
        }
        for file in retired {
            self.recycle(&path_of(&self.dir, file.sequence))?;
        }
        self.disk
            .sync_dir(&self.dir)
            .map_err(|e| StorageError::io(CANNOT_SYNC, &self.dir, e))
    }

    /// Makes an unused file a spare, or removes it.
    pub fn recycle(&self, path: &Path) -> Result<(), StorageError> {
        let failed = |e| StorageError::io("cannot recycle", path, e);
        let size = self
            .disk
            .open(path, false)
            .and_then(|file| file.size())
            .map_err(failed)?;
        let target = {
            let mut inner = lock(&self.inner);
            if size == self.file_size_bytes && inner.spares.len() < SPARES_MAX {
                inner.spares_made += 1;
                Some(self.dir.join(format!("spare-{}", inner.spares_made)))
            } else {
                None
            }
        };
        let Some(target) = target else {
            return self.disk.remove_file(path).map_err(failed);
        };
        if path != target {
            self.disk.rename(path, &target).map_err(failed)?;
        }
        lock(&self.inner).spares.push(target);
        Ok(())
    }

    /// Makes spares of what the last run left behind.
    pub fn adopt(&self, paths: Vec<PathBuf>) -> Result<(), StorageError> {
        // New spares get numbers above all that are there, so that no rename replaces one.
        let highest = paths.iter().filter_map(|path| spare_number_of(path)).max();
        lock(&self.inner).spares_made = highest.unwrap_or(0);
        paths.iter().try_for_each(|path| self.recycle(path))
    }

    /// Writes a new spare. A failure only costs speed: the name is not used before all is done.
    pub fn prepare_spare(&self) -> io::Result<()> {
        let number = {
            let mut inner = lock(&self.inner);
            inner.spares_made += 1;
            inner.spares_made
        };
        let temporary = self.dir.join("preparing");
        let file = self.disk.open(&temporary, true)?;
        file.set_size(0)?;
        let mut position = 0;
        while position < self.file_size_bytes {
            let left = self.file_size_bytes - position;
            let parts: Vec<IoSlice<'_>> = (0..left.div_ceil(ZEROES.len() as u64).min(16))
                .map(|i| {
                    let left = left - i * ZEROES.len() as u64;
                    IoSlice::new(&ZEROES[..left.min(ZEROES.len() as u64) as usize])
                })
                .collect();
            file.write_at(&parts, position)?;
            position += parts.iter().map(|part| part.len() as u64).sum::<u64>();
        }
        file.sync_data()?;
        let spare = self.dir.join(format!("spare-{number}"));
        self.disk.rename(&temporary, &spare)?;
        lock(&self.inner).spares.push(spare);
        Ok(())
    }
}

pub fn path_of(dir: &Path, sequence: u64) -> PathBuf {
    dir.join(format!("{sequence:020}.wal"))
}

/// The sequence number in a WAL file's name.
pub fn sequence_of(name: &str) -> Option<u64> {
    let digits = name.strip_suffix(".wal")?;
    (digits.len() == 20).then(|| digits.parse().ok())?
}

fn spare_number_of(path: &Path) -> Option<u64> {
    path.file_name()?
        .to_str()?
        .strip_prefix("spare-")?
        .parse()
        .ok()
}
