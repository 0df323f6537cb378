//! A disk in memory that remembers what was fsynced, fails when told to, and can lose power.
//!
//! Invariant: after `crash`, a file has every byte that was fsynced; of every sector written later it
//! has the old or the new content, as chance decides; and names are those of a folder's last fsync,
//! plus some prefix of what was done to the folder since. This is what a journaling file system
//! promises, and no more.

use std::collections::BTreeMap;
use std::io::{self, IoSlice};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use super::{Disk, DiskFile, LockGuard};
use crate::sync::lock;

/// What is written at once or not at all.
const SECTOR_SIZE: usize = 512;

/// Which calls a fault hits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Operation {
    Write,
    Sync,
    Read,
    /// Opening, renaming, removing, listing, making and syncing folders, and changing sizes.
    Other,
}

/// Makes calls fail.
#[derive(Debug, Clone)]
pub struct Fault {
    pub operation: Operation,
    /// Only calls on paths that contain this.
    pub path_contains: &'static str,
    /// How many matching calls go well before one fails; all after it fail too.
    pub after: usize,
    pub error: io::ErrorKind,
}

/// A disk in memory. Clones are the same disk.
#[derive(Clone, Default)]
pub struct FaultyDisk {
    inner: Arc<Mutex<Inner>>,
}

#[derive(Default)]
struct Inner {
    inodes: Vec<Inode>,
    names: BTreeMap<PathBuf, usize>,
    synced_names: BTreeMap<PathBuf, usize>,
    /// What was done to names since their folders were fsynced, in order.
    name_changes: Vec<NameChange>,
    faults: Vec<Fault>,
    /// Changing calls left before the power fails.
    fuse: Option<usize>,
    has_power_failed: bool,
    is_locked: bool,
    changing_calls: usize,
    syncs: usize,
}

#[derive(Clone, Default)]
struct Inode {
    data: Vec<u8>,
    synced: Vec<u8>,
    /// Sectors that were written since the last fsync, with their content, in order.
    unsynced: Vec<(usize, Vec<u8>)>,
}

#[derive(Clone)]
enum NameChange {
    Create(PathBuf, usize),
    Rename(PathBuf, PathBuf),
    Remove(PathBuf),
}

struct FaultyFile {
    disk: FaultyDisk,
    path: PathBuf,
    inode: usize,
}

impl FaultyDisk {
    pub fn new() -> Self {
        Self::default()
    }

    /// From now on the matching calls fail as `fault` says.
    pub fn inject(&self, fault: Fault) {
        lock(&self.inner).faults.push(fault);
    }

    pub fn clear_faults(&self) {
        lock(&self.inner).faults.clear();
    }

    /// The power fails during the changing call after `calls` more; every later call fails.
    pub fn fail_power_after(&self, calls: usize) {
        lock(&self.inner).fuse = Some(calls);
    }

    /// Changing calls so far, to know how many points there are at which the power can fail.
    pub fn changing_calls(&self) -> usize {
        lock(&self.inner).changing_calls
    }

    pub fn syncs(&self) -> usize {
        lock(&self.inner).syncs
    }

    /// The disk after a power failure: a new disk, while all handles on this one fail from now on.
    /// `keep` is asked for each thing that was not fsynced whether it reached the disk.
    pub fn crash(&self, keep: &mut dyn FnMut() -> bool) -> FaultyDisk {
        let mut inner = lock(&self.inner);
        inner.has_power_failed = true;
        let mut inodes = Vec::new();
        for inode in &inner.inodes {
            let mut data = inode.synced.clone();
            for (sector, bytes) in &inode.unsynced {
                if keep() {
                    put(&mut data, sector * SECTOR_SIZE, bytes);
                }
            }
            inodes.push(Inode {
                synced: data.clone(),
                data,
                unsynced: Vec::new(),
            });
        }
        let mut names = inner.synced_names.clone();
        for change in &inner.name_changes {
            if !keep() {
                break;
            }
            change.apply(&mut names);
        }
        let crashed = Inner {
            inodes,
            synced_names: names.clone(),
            names,
            ..Inner::default()
        };
        FaultyDisk {
            inner: Arc::new(Mutex::new(crashed)),
        }
    }

    /// What would be left if the power failed now and nothing unsynced reached the disk; this disk
    /// goes on.
    pub fn crash_copy(&self) -> FaultyDisk {
        self.copy().crash(&mut || false)
    }

    /// All files there are.
    pub fn paths(&self) -> Vec<PathBuf> {
        lock(&self.inner).names.keys().cloned().collect()
    }

    /// A file's bytes as readers see them.
    pub fn content(&self, path: &Path) -> Option<Vec<u8>> {
        let inner = lock(&self.inner);
        inner
            .names
            .get(path)
            .map(|inode| inner.inodes[*inode].data.clone())
    }

    /// Replaces a file's bytes, fsynced, as bit rot would.
    pub fn set_content(&self, path: &Path, bytes: Vec<u8>) {
        let mut inner = lock(&self.inner);
        if let Some(inode) = inner.names.get(path).copied() {
            inner.inodes[inode] = Inode {
                data: bytes.clone(),
                synced: bytes,
                unsynced: Vec::new(),
            };
        }
    }

    /// A second disk with the same content.
    pub fn copy(&self) -> FaultyDisk {
        let inner = lock(&self.inner);
        let copy = Inner {
            inodes: inner.inodes.clone(),
            names: inner.names.clone(),
            synced_names: inner.synced_names.clone(),
            name_changes: inner.name_changes.clone(),
            ..Inner::default()
        };
        FaultyDisk {
            inner: Arc::new(Mutex::new(copy)),
        }
    }
}

impl Inner {
    /// Fails if the power is off or a fault matches. `Ok(true)`: the power fails during this call.
    fn enter(&mut self, operation: Operation, path: &Path, changes: bool) -> io::Result<bool> {
        if self.has_power_failed {
            return Err(io::Error::other("the power is off"));
        }
        for fault in &mut self.faults {
            let is_hit = fault.operation == operation
                && path.to_string_lossy().contains(fault.path_contains);
            if is_hit {
                if fault.after == 0 {
                    return Err(fault.error.into());
                }
                fault.after -= 1;
            }
        }
        if changes {
            self.changing_calls += 1;
            match &mut self.fuse {
                Some(0) => {
                    self.has_power_failed = true;
                    return Ok(true);
                }
                Some(left) => *left -= 1,
                None => {}
            }
        }
        Ok(false)
    }

    fn change_name(&mut self, operation: &Path, change: NameChange) -> io::Result<()> {
        let fails = self.enter(Operation::Other, operation, true)?;
        change.apply(&mut self.names);
        self.name_changes.push(change);
        power(fails)
    }
}

impl NameChange {
    fn apply(&self, names: &mut BTreeMap<PathBuf, usize>) {
        match self {
            NameChange::Create(path, inode) => {
                names.insert(path.clone(), *inode);
            }
            NameChange::Rename(from, to) => {
                if let Some(inode) = names.remove(from) {
                    names.insert(to.clone(), inode);
                }
            }
            NameChange::Remove(path) => {
                names.remove(path);
            }
        }
    }

    fn is_in(&self, dir: &Path) -> bool {
        match self {
            NameChange::Create(path, _) | NameChange::Remove(path) => path.parent() == Some(dir),
            NameChange::Rename(_, to) => to.parent() == Some(dir),
        }
    }
}

fn power(fails: bool) -> io::Result<()> {
    if fails {
        Err(io::Error::other("the power fails"))
    } else {
        Ok(())
    }
}

fn put(data: &mut Vec<u8>, position: usize, bytes: &[u8]) {
    let end = position + bytes.len();
    if data.len() < end {
        data.resize(end, 0);
    }
    data[position..end].copy_from_slice(bytes);
}

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
        let bytes: Vec<u8> = parts.iter().flat_map(|part| part.iter().copied()).collect();
        let position = usize::try_from(position).map_err(io::Error::other)?;
        let mut inner = lock(&self.disk.inner);
        let fails = inner.enter(Operation::Write, &self.path, true)?;
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

    fn set_size(&self, size: u64) -> io::Result<()> {
        let mut inner = lock(&self.disk.inner);
        let fails = inner.enter(Operation::Other, &self.path, true)?;
        let size = usize::try_from(size).map_err(io::Error::other)?;
        let inode = &mut inner.inodes[self.inode];
        inode.data.resize(size, 0);
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
