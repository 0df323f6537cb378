//! Segment files are opened on demand; a bounded number stays open.
//!
//! Invariant: a handle that was given out stays valid when the cache drops its own.

use std::collections::{HashMap, VecDeque};
use std::io;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};

use chronik_types::id::RaftGroupId;

use super::{FileKind, SegmentId, dir_of, file_name};
use crate::disk::{Disk, DiskFile};
use crate::sync::lock;

type Key = (RaftGroupId, SegmentId, FileKind);

/// All open segment files of the storage.
pub struct OpenFiles {
    disk: Arc<dyn Disk>,
    partitions: PathBuf,
    files_max: usize,
    inner: Mutex<Inner>,
}

#[derive(Default)]
struct Inner {
    files: HashMap<Key, Cached>,
    /// Every key of `files` once, oldest first.
    order: VecDeque<Key>,
}

struct Cached {
    file: Arc<dyn DiskFile>,
    was_used: bool,
}

impl OpenFiles {
    pub fn new(disk: Arc<dyn Disk>, partitions: PathBuf, files_max: usize) -> Self {
        OpenFiles {
            disk,
            partitions,
            files_max: files_max.max(4),
            inner: Mutex::default(),
        }
    }

    pub fn disk(&self) -> &Arc<dyn Disk> {
        &self.disk
    }

    pub fn partitions(&self) -> &PathBuf {
        &self.partitions
    }

    pub fn path(&self, group: RaftGroupId, id: SegmentId, kind: FileKind) -> PathBuf {
        dir_of(&self.partitions, group).join(file_name(id, kind))
    }

    pub fn open(
        &self,
        group: RaftGroupId,
        id: SegmentId,
        kind: FileKind,
        create: bool,
    ) -> io::Result<Arc<dyn DiskFile>> {
        let key = (group, id, kind);
        if let Some(cached) = lock(&self.inner).files.get_mut(&key) {
            cached.was_used = true;
            return Ok(cached.file.clone());
        }
        let file = self.disk.open(&self.path(group, id, kind), create)?;
        let mut inner = lock(&self.inner);
        inner.make_room(self.files_max);
        let cached = Cached {
            file: file.clone(),
            was_used: false,
        };
        if inner.files.insert(key, cached).is_none() {
            inner.order.push_back(key);
        }
        Ok(file)
    }

    /// Forgets the files of a deleted log.
    pub fn forget(&self, group: RaftGroupId) {
        let mut inner = lock(&self.inner);
        inner.files.retain(|key, _| key.0 != group);
        inner.order.retain(|key| key.0 != group);
    }

    /// Removes the files of a segment that is in no log any more. What cannot be removed is left to
    /// the next start, since nothing refers to it.
    pub fn remove(&self, group: RaftGroupId, id: SegmentId) {
        {
            let mut inner = lock(&self.inner);
            let is_other = |key: &Key| (key.0, key.1) != (group, id);
            inner.files.retain(|key, _| is_other(key));
            inner.order.retain(is_other);
        }
        for kind in FileKind::ALL {
            let path = self.path(group, id, kind);
            match self.disk.remove_file(&path) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    tracing::warn!(file = %path.display(), %error, "cannot delete a segment's file");
                }
                _ => {}
            }
        }
    }
}

impl Inner {
    /// Drops the oldest file that was not used since it was last looked at.
    fn make_room(&mut self, files_max: usize) {
        while self.files.len() >= files_max {
            let Some(key) = self.order.pop_front() else {
                return;
            };
            match self.files.get_mut(&key) {
                Some(cached) if cached.was_used => {
                    cached.was_used = false;
                    self.order.push_back(key);
                }
                _ => {
                    self.files.remove(&key);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use chronik_types::offset::Offset;

    use super::*;
    use crate::disk::FaultyDisk;

    #[test]
    fn no_more_files_stay_open_than_the_limit_and_those_in_use_stay_longest() {
        const MAX: usize = 8;
        let disk = Arc::new(FaultyDisk::new());
        let files = OpenFiles::new(disk, PathBuf::from("/data"), MAX);
        let id = SegmentId {
            base_offset: Offset(0),
            generation: 0,
        };
        let open = |group| {
            let file = files.open(RaftGroupId(group), id, FileKind::Log, true);
            Arc::downgrade(&file.unwrap())
        };
        let in_use = open(0);
        let opened: Vec<_> = (1..=100)
            .map(|group| {
                open(0);
                open(group)
            })
            .collect();
        let still_open = opened.iter().filter(|file| file.strong_count() > 0);
        assert_eq!(still_open.count(), MAX - 1, "and the one in use");
        assert_eq!(in_use.strong_count(), 1);
        // One that was dropped is opened again, and one that is held is not closed under its user.
        let held = files
            .open(RaftGroupId(1), id, FileKind::Log, false)
            .unwrap();
        for group in 2..=100 {
            open(group);
        }
        assert_eq!(held.size().unwrap(), 0);
    }
}
