//! The file-system seam: everything the storage asks of a disk, so that tests can tear writes, lose
//! what was not fsynced, and fail any call.
//!
//! Invariant: no other module touches `std::fs`.

pub mod faulty;
mod real;

use std::io::{self, IoSlice};
use std::path::Path;
use std::sync::Arc;

pub use faulty::FaultyDisk;
pub use real::RealDisk;

/// Held while a folder is in use; released on drop.
pub type LockGuard = Box<dyn Send + Sync>;

/// Room on a disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DiskSpace {
    /// For this process.
    pub available_bytes: u64,
    pub total_bytes: u64,
}

/// The operations on names. A new name survives a crash only after `sync_dir` of its folder.
pub trait Disk: Send + Sync {
    /// Opens for reading and writing; with `create` an absent file is made, empty.
    fn open(&self, path: &Path, create: bool) -> io::Result<Arc<dyn DiskFile>>;
    /// Replaces `to` at once, so that after a crash it is the old or the new file.
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()>;
    fn remove_file(&self, path: &Path) -> io::Result<()>;
    /// Removes an empty folder.
    fn remove_dir(&self, path: &Path) -> io::Result<()>;
    /// Makes the folder and those above it.
    fn create_dir_all(&self, path: &Path) -> io::Result<()>;
    /// Names in a folder, in no order; none if the folder does not exist.
    fn list(&self, dir: &Path) -> io::Result<Vec<String>>;
    fn sync_dir(&self, dir: &Path) -> io::Result<()>;
    /// The size of a file without opening it; `None` if there is none.
    fn file_size(&self, path: &Path) -> io::Result<Option<u64>> {
        match self.open(path, false) {
            Ok(file) => file.size().map(Some),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }
    /// Room on the disk that `dir` is on.
    fn space(&self, _dir: &Path) -> io::Result<DiskSpace> {
        Ok(DiskSpace {
            available_bytes: u64::MAX,
            total_bytes: u64::MAX,
        })
    }
    /// `None` if another process holds the lock.
    fn lock(&self, path: &Path) -> io::Result<Option<LockGuard>>;
}

/// The operations on one open file. Written bytes survive a crash only after `sync_data`.
pub trait DiskFile: Send + Sync {
    /// May read less than asked for, nothing only at the end of the file.
    fn read_at(&self, buffer: &mut [u8], position: u64) -> io::Result<usize>;
    /// Writes all parts, one behind the other.
    fn write_at(&self, parts: &[IoSlice<'_>], position: u64) -> io::Result<()>;
    fn sync_data(&self) -> io::Result<()>;
    fn size(&self) -> io::Result<u64>;
    fn set_size(&self, size: u64) -> io::Result<()>;
    /// Makes sure that writes up to `size` find room, without changing the file's size. A file system
    /// that cannot do this says nothing.
    fn allocate(&self, _size: u64) -> io::Result<()> {
        Ok(())
    }
}

/// Fills the buffer as far as the file goes, and says how far that was.
pub fn read_full_at(file: &dyn DiskFile, buffer: &mut [u8], position: u64) -> io::Result<usize> {
    let mut done = 0;
    while done < buffer.len() {
        match file.read_at(&mut buffer[done..], position.saturating_add(done as u64)) {
            Ok(0) => break,
            Ok(count) => done += count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(done)
}

/// All of a file.
pub fn read_all(disk: &dyn Disk, path: &Path) -> io::Result<Vec<u8>> {
    let file = disk.open(path, false)?;
    let size = usize::try_from(file.size()?).map_err(io::Error::other)?;
    let mut bytes = vec![0; size];
    let count = read_full_at(&*file, &mut bytes, 0)?;
    bytes.truncate(count);
    Ok(bytes)
}

/// Fills the whole buffer, or fails with `UnexpectedEof`.
pub fn read_exact_at(file: &dyn DiskFile, buffer: &mut [u8], position: u64) -> io::Result<()> {
    if read_full_at(file, buffer, position)? < buffer.len() {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    Ok(())
}
