//! A disk in memory that remembers what was fsynced, fails when told to, and can lose power.
//!
//! Invariant: after `crash`, a file has every byte that was fsynced; of every sector written later it
//! has the old or the new content, as chance decides; and names are those of a folder's last fsync,
//! plus some prefix of what was done to the folder since. This is what a journaling file system
//! promises, and no more.

mod calls;

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use crate::sync::lock;

/// What is written at once or not at all.
const SECTOR_SIZE: usize = 512;

/// Which calls a fault hits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Operation {
    Write,
    /// Of files and folders.
    Sync,
    Read,
    /// Opening, renaming, removing, listing and making folders, and changing sizes.
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
    /// `Other` is an error of the device (EIO).
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
    /// What all files together may hold.
    capacity: Option<u64>,
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
    /// Taken ahead, by size of the file.
    allocated: usize,
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

    /// How many bytes the disk holds from now on; `None`: any number.
    pub fn set_capacity(&self, bytes: Option<u64>) {
        lock(&self.inner).capacity = bytes;
    }

    /// Bytes of all files.
    pub fn used_bytes(&self) -> u64 {
        lock(&self.inner).used_bytes()
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
                allocated: inode.allocated,
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
                allocated: 0,
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
                    return Err(os_error(fault.error));
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

    fn used_bytes(&self) -> u64 {
        let sizes = self
            .names
            .values()
            .map(|inode| self.inodes[*inode].size_on_disk());
        sizes.map(|size| size as u64).sum()
    }

    /// How far a file may be written when it is to grow to `size`.
    fn room_for(&self, inode: usize, size: usize) -> usize {
        let Some(capacity) = self.capacity else {
            return size;
        };
        let own = self.inodes[inode].size_on_disk();
        let free = capacity.saturating_sub(self.used_bytes());
        size.min(own.saturating_add(usize::try_from(free).unwrap_or(usize::MAX)))
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

impl Inode {
    fn size_on_disk(&self) -> usize {
        self.data.len().max(self.allocated)
    }
}

/// As the operating system says it, so that callers can tell what it means.
fn os_error(kind: io::ErrorKind) -> io::Error {
    match kind {
        io::ErrorKind::StorageFull => io::Error::from_raw_os_error(libc::ENOSPC),
        io::ErrorKind::Other => io::Error::from_raw_os_error(libc::EIO),
        kind => kind.into(),
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
