//! The operating system's file system.

use std::ffi::CString;
use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{self, IoSlice};
use std::mem::MaybeUninit;
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;

use super::{Disk, DiskFile, DiskSpace, LockGuard};

/// Most parts that one `pwritev` takes on Linux.
const PARTS_MAX: usize = 1024;

/// The operating system's file system.
#[derive(Debug, Default, Clone, Copy)]
pub struct RealDisk;

struct RealFile(File);

impl Disk for RealDisk {
    fn open(&self, path: &Path, create: bool) -> io::Result<Arc<dyn DiskFile>> {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(create)
            .truncate(false)
            .open(path)?;
        Ok(Arc::new(RealFile(file)))
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        fs::rename(from, to)
    }

    fn remove_file(&self, path: &Path) -> io::Result<()> {
        fs::remove_file(path)
    }

    fn remove_dir(&self, path: &Path) -> io::Result<()> {
        fs::remove_dir(path)
    }

    fn create_dir_all(&self, path: &Path) -> io::Result<()> {
        fs::create_dir_all(path)
    }

    fn list(&self, dir: &Path) -> io::Result<Vec<String>> {
        let entries = match fs::read_dir(dir) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => return Err(error),
        };
        entries
            .map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()))
            .collect()
    }

    fn sync_dir(&self, dir: &Path) -> io::Result<()> {
        File::open(dir)?.sync_all()
    }

    fn file_size(&self, path: &Path) -> io::Result<Option<u64>> {
        match fs::metadata(path) {
            Ok(metadata) => Ok(Some(metadata.len())),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    fn space(&self, dir: &Path) -> io::Result<DiskSpace> {
        let path = CString::new(dir.as_os_str().as_bytes()).map_err(io::Error::other)?;
        let mut found = MaybeUninit::<libc::statvfs>::uninit();
        // SAFETY: the path ends with a zero byte, and the call writes the whole structure if it
        // succeeds, which is the only case in which it is read.
        let found = unsafe {
            if libc::statvfs(path.as_ptr(), found.as_mut_ptr()) != 0 {
                return Err(io::Error::last_os_error());
            }
            found.assume_init()
        };
        let block = found.f_frsize;
        Ok(DiskSpace {
            available_bytes: found.f_bavail.saturating_mul(block),
            total_bytes: found.f_blocks.saturating_mul(block),
        })
    }

    fn lock(&self, path: &Path) -> io::Result<Option<LockGuard>> {
        let file = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(false)
            .open(path)?;
        match file.try_lock() {
            Ok(()) => Ok(Some(Box::new(file))),
            Err(TryLockError::WouldBlock) => Ok(None),
            Err(TryLockError::Error(error)) => Err(error),
        }
    }
}

impl DiskFile for RealFile {
    fn read_at(&self, buffer: &mut [u8], position: u64) -> io::Result<usize> {
        self.0.read_at(buffer, position)
    }

    fn write_at(&self, parts: &[IoSlice<'_>], mut position: u64) -> io::Result<()> {
        for chunk in parts.chunks(PARTS_MAX) {
            let size: usize = chunk.iter().map(|part| part.len()).sum();
            let mut written = pwritev(&self.0, chunk, position)?;
            // A short write is rare (a signal, a nearly full disk): the rest goes part by part.
            let mut skip = written;
            for part in chunk {
                if written == size {
                    break;
                }
                let done = skip.min(part.len());
                skip -= done;
                if done < part.len() {
                    self.0
                        .write_all_at(&part[done..], position + written as u64)?;
                    written += part.len() - done;
                }
            }
            position += size as u64;
        }
        Ok(())
    }

    fn sync_data(&self) -> io::Result<()> {
        self.0.sync_data()
    }

    fn size(&self) -> io::Result<u64> {
        Ok(self.0.metadata()?.len())
    }

    fn set_size(&self, size: u64) -> io::Result<()> {
        self.0.set_len(size)
    }

    fn allocate(&self, size: u64) -> io::Result<()> {
        let size = libc::off_t::try_from(size).map_err(io::Error::other)?;
        let fd = self.0.as_raw_fd();
        // SAFETY: the file is open, and the call touches no memory of ours.
        if unsafe { libc::fallocate(fd, libc::FALLOC_FL_KEEP_SIZE, 0, size) } == 0 {
            return Ok(());
        }
        let error = io::Error::last_os_error();
        match error.raw_os_error() {
            Some(libc::EOPNOTSUPP | libc::ENOSYS | libc::EINTR) => Ok(()),
            _ => Err(error),
        }
    }
}

fn pwritev(file: &File, parts: &[IoSlice<'_>], position: u64) -> io::Result<usize> {
    let position = libc::off_t::try_from(position).map_err(io::Error::other)?;
    loop {
        // SAFETY: `IoSlice` has the layout of `iovec`; the slices outlive the call, and there are
        // at most `PARTS_MAX` of them.
        let written = unsafe {
            libc::pwritev(
                file.as_raw_fd(),
                parts.as_ptr().cast::<libc::iovec>(),
                parts.len() as libc::c_int,
                position,
            )
        };
        if let Ok(written) = usize::try_from(written) {
            return Ok(written);
        }
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn writes_of_many_parts_land_back_to_back() {
        let dir = tempfile::tempdir().unwrap();
        let file = RealDisk.open(&dir.path().join("f"), true).unwrap();
        let bytes: Vec<u8> = (0..5000u32).map(|i| i as u8).collect();
        let parts: Vec<IoSlice<'_>> = bytes.chunks(3).map(IoSlice::new).collect();
        assert!(parts.len() > PARTS_MAX);
        file.write_at(&parts, 7).unwrap();
        let mut back = vec![0; bytes.len()];
        super::super::read_exact_at(&*file, &mut back, 7).unwrap();
        assert_eq!(back, bytes);
        assert_eq!(file.size().unwrap(), 5007);
    }

    #[test]
    fn a_disk_says_how_full_it_is_and_room_can_be_taken_ahead() {
        let dir = tempfile::tempdir().unwrap();
        let space = RealDisk.space(dir.path()).unwrap();
        assert!(0 < space.available_bytes && space.available_bytes <= space.total_bytes);
        let path = dir.path().join("f");
        assert_eq!(RealDisk.file_size(&path).unwrap(), None);
        let file = RealDisk.open(&path, true).unwrap();
        file.allocate(1 << 20).unwrap();
        assert_eq!(RealDisk.file_size(&path).unwrap(), Some(0));
    }

    #[test]
    fn a_locked_folder_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("lock");
        let guard = RealDisk.lock(&path).unwrap();
        assert!(guard.is_some());
        assert!(RealDisk.lock(&path).unwrap().is_none());
        drop(guard);
        assert!(RealDisk.lock(&path).unwrap().is_some());
    }
}
