//! Segment files are opened on demand; a bounded number stays open.
//!
//! Invariant: a handle that was given out stays valid when the cache drops its own.

use std::collections::{HashMap, VecDeque};
use std::io;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};

use chronik_types::id::RaftGroupId;
use chronik_types::offset::Offset;

use super::{FileKind, dir_of, file_name};
use crate::disk::{Disk, DiskFile};
use crate::sync::lock;

type Key = (RaftGroupId, Offset, FileKind);

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

    pub fn path(&self, group: RaftGroupId, base_offset: Offset, kind: FileKind) -> PathBuf {
        dir_of(&self.partitions, group).join(file_name(base_offset, kind))
    }

    pub fn open(
        &self,
        group: RaftGroupId,
        base_offset: Offset,
        kind: FileKind,
        create: bool,
    ) -> io::Result<Arc<dyn DiskFile>> {
        let key = (group, base_offset, kind);
        if let Some(cached) = lock(&self.inner).files.get_mut(&key) {
            cached.was_used = true;
            return Ok(cached.file.clone());
        }
        let file = self
            .disk
            .open(&self.path(group, base_offset, kind), create)?;
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
