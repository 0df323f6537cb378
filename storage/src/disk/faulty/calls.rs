//! The calls of the faulty disk, each as a real file system would answer it.
//!
//! Invariant: a call that fails because the power fails may or may not have taken effect.

use std::io::{self, IoSlice};
use std::path::Path;
use std::sync::Arc;

use super::{
    FaultyDisk, FaultyFile, Inode, NameChange, Operation, SECTOR_SIZE, os_error, power, put,
};
use crate::disk::{Disk, DiskFile, DiskSpace, LockGuard};
use crate::sync::lock;

impl Disk for FaultyDisk {
    fn open(&self, path: &Path, create: bool) -> io::Result<Arc<dyn DiskFile>> {
        let mut inner = lock(&self.inner);
        let inode = match inner.names.get(path) {
            Some(inode) => {
                let inode = *inode;
                inner.enter(Operation::Other, path, false)?;
                inode
            }
            None if create => {
                inner.inodes.push(Inode::default());
                let inode = inner.inodes.len() - 1;
                inner.change_name(path, NameChange::Create(path.to_owned(), inode))?;
                inode
            }
            None => {
                inner.enter(Operation::Other, path, false)?;
                return Err(io::ErrorKind::NotFound.into());
            }
        };
        Ok(Arc::new(FaultyFile {
            disk: self.clone(),
            path: path.to_owned(),
            inode,
        }))
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        let mut inner = lock(&self.inner);
        if !inner.names.contains_key(from) {
            return Err(io::ErrorKind::NotFound.into());
        }
        inner.change_name(from, NameChange::Rename(from.to_owned(), to.to_owned()))
    }

    fn remove_file(&self, path: &Path) -> io::Result<()> {
        let mut inner = lock(&self.inner);
        if !inner.names.contains_key(path) {
            return Err(io::ErrorKind::NotFound.into());
        }
        inner.change_name(path, NameChange::Remove(path.to_owned()))
    }

    fn remove_dir(&self, path: &Path) -> io::Result<()> {
        let mut inner = lock(&self.inner);
        inner.enter(Operation::Other, path, false)?;
        match inner.names.keys().any(|name| name.starts_with(path)) {
            true => Err(io::ErrorKind::DirectoryNotEmpty.into()),
            false => Ok(()),
        }
    }

    fn create_dir_all(&self, path: &Path) -> io::Result<()> {
        lock(&self.inner)
            .enter(Operation::Other, path, false)
            .map(drop)
    }

    fn list(&self, dir: &Path) -> io::Result<Vec<String>> {
        let mut inner = lock(&self.inner);
        inner.enter(Operation::Other, dir, false)?;
        // Folders exist by what is in them.
        let below = inner
            .names
            .keys()
            .filter_map(|path| path.strip_prefix(dir).ok());
        let mut names: Vec<String> = below
            .filter_map(|path| path.components().next())
            .map(|name| name.as_os_str().to_string_lossy().into_owned())
            .collect();
        names.dedup();
        Ok(names)
    }

    fn space(&self, dir: &Path) -> io::Result<DiskSpace> {
        let mut inner = lock(&self.inner);
        inner.enter(Operation::Other, dir, false)?;
        let total_bytes = inner.capacity.unwrap_or(u64::MAX);
        Ok(DiskSpace {
            available_bytes: total_bytes.saturating_sub(inner.used_bytes()),
            total_bytes,
        })
    }

    fn sync_dir(&self, dir: &Path) -> io::Result<()> {
        let mut inner = lock(&self.inner);
        let fails = inner.enter(Operation::Sync, dir, true)?;
        power(fails)?;
        inner.syncs += 1;
        // A journal is written in order: with the folder's changes go all that came before.
        let last = inner
            .name_changes
            .iter()
            .rposition(|change| change.is_in(dir));
        let count = last.map_or(0, |last| last + 1);
        let changes: Vec<NameChange> = inner.name_changes.drain(..count).collect();
        for change in changes {
            change.apply(&mut inner.synced_names);
        }
        Ok(())
    }

    fn lock(&self, path: &Path) -> io::Result<Option<LockGuard>> {
        struct Unlock(FaultyDisk);
        impl Drop for Unlock {
            fn drop(&mut self) {
                lock(&self.0.inner).is_locked = false;
            }
        }
        let mut inner = lock(&self.inner);
        inner.enter(Operation::Other, path, false)?;
        if std::mem::replace(&mut inner.is_locked, true) {
            return Ok(None);
        }
        Ok(Some(Box::new(Unlock(self.clone()))))
    }
}

impl DiskFile for FaultyFile {
    fn read_at(&self, buffer: &mut [u8], position: u64) -> io::Result<usize> {
        let mut inner = lock(&self.disk.inner);
        inner.enter(Operation::Read, &self.path, false)?;
        let data = &inner.inodes[self.inode].data;
        let from = usize::try_from(position)
            .unwrap_or(usize::MAX)
            .min(data.len());
        let count = buffer.len().min(data.len() - from);
        buffer[..count].copy_from_slice(&data[from..from + count]);
        Ok(count)
    }

    fn write_at(&self, parts: &[IoSlice<'_>], position: u64) -> io::Result<()> {
        let mut bytes: Vec<u8> = parts.iter().flat_map(|part| part.iter().copied()).collect();
        let position = usize::try_from(position).map_err(io::Error::other)?;
        let mut inner = lock(&self.disk.inner);
        let fails = inner.enter(Operation::Write, &self.path, true)?;
        // What finds room is written before the call fails.
        let room = inner.room_for(self.inode, position + bytes.len());
        let is_full = room < position + bytes.len();
        bytes.truncate(room.saturating_sub(position));
        if bytes.is_empty() && is_full {
            return Err(os_error(io::ErrorKind::StorageFull));
        }
        let inode = &mut inner.inodes[self.inode];
        put(&mut inode.data, position, &bytes);
        if !bytes.is_empty() {
            for sector in position / SECTOR_SIZE..=(position + bytes.len() - 1) / SECTOR_SIZE {
                let from = sector * SECTOR_SIZE;
                let end = (from + SECTOR_SIZE).min(inode.data.len());
                inode
                    .unsynced
                    .push((sector, inode.data[from..end].to_vec()));
            }
        }
        if is_full {
            return Err(os_error(io::ErrorKind::StorageFull));
        }
        power(fails)
    }

    fn sync_data(&self) -> io::Result<()> {
        let mut inner = lock(&self.disk.inner);
        match inner.enter(Operation::Sync, &self.path, true) {
            Ok(fails) => power(fails)?,
            Err(error) => {
                // As Linux does: the pages are taken for clean, though they never reached the disk.
                inner.inodes[self.inode].unsynced.clear();
                return Err(error);
            }
        }
        inner.syncs += 1;
        let inode = &mut inner.inodes[self.inode];
        for (sector, bytes) in std::mem::take(&mut inode.unsynced) {
            put(&mut inode.synced, sector * SECTOR_SIZE, &bytes);
        }
        let size = inode.data.len();
        inode.synced.resize(size, 0);
        Ok(())
    }

    fn size(&self) -> io::Result<u64> {
        let mut inner = lock(&self.disk.inner);
        inner.enter(Operation::Other, &self.path, false)?;
        Ok(inner.inodes[self.inode].data.len() as u64)
    }

    fn allocate(&self, size: u64) -> io::Result<()> {
        let mut inner = lock(&self.disk.inner);
        inner.enter(Operation::Other, &self.path, false)?;
        let size = usize::try_from(size).map_err(io::Error::other)?;
        if inner.room_for(self.inode, size) < size {
            return Err(os_error(io::ErrorKind::StorageFull));
        }
        let inode = &mut inner.inodes[self.inode];
        inode.allocated = inode.allocated.max(size);
        Ok(())
    }

    fn set_size(&self, size: u64) -> io::Result<()> {
        let mut inner = lock(&self.disk.inner);
        let fails = inner.enter(Operation::Other, &self.path, true)?;
        let size = usize::try_from(size).map_err(io::Error::other)?;
        let inode = &mut inner.inodes[self.inode];
        inode.data.resize(size, 0);
        inode.allocated = inode.allocated.min(size);
        // Cutting reaches the disk at once or later; here at once, so that stale sectors cannot
        // grow the file again. What was cut off and fsynced before is gone either way.
        inode.unsynced.retain_mut(|(sector, bytes)| {
            let from = *sector * SECTOR_SIZE;
            bytes.truncate(size.saturating_sub(from));
            !bytes.is_empty()
        });
        inode.synced.truncate(size);
        power(fails)
    }
}
