//! The checkpoint: for every log what the WAL need not say any more.
//!
//! Invariant: checkpoint, segments up to the sizes it names, and the WAL from the place it names are
//! together the whole state. It is replaced at once by a rename, so a crash leaves the old or the new.

mod group;

pub use group::{GroupCheckpoint, SEGMENT_SIZE_MIN, decode_segment, encode_segment};

use std::io::{self, IoSlice};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use chronik_types::record_batch::crc32c;
use uuid::Uuid;

use self::group::{GROUP_SIZE_MIN, bounded};
use crate::codec::Reader;
use crate::disk::{Disk, DiskFile, read_all};
use crate::error::{CANNOT_SYNC, OpenError, StorageError};
use crate::wal::recovery::WalStart;

const MAGIC: &[u8; 7] = b"CHRCHKP";
/// Written now. Version 1 had no log start, no purge and plain segments only; it is still read.
pub const VERSION: u8 = 2;
/// Magic, version and checksum.
const PREFIX_SIZE: usize = 12;
const CRC_AT: usize = 8;

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Checkpoint {
    pub storage_id: Uuid,
    pub wal: WalStart,
    /// Nothing was written after this checkpoint if the WAL ends before this record.
    pub clean_at_record: Option<u64>,
    pub groups: Vec<GroupCheckpoint>,
}

impl Checkpoint {
    pub fn encode(&self) -> Vec<u8> {
        let mut out = vec![0; PREFIX_SIZE];
        out[..MAGIC.len()].copy_from_slice(MAGIC);
        out[MAGIC.len()] = VERSION;
        out.extend_from_slice(self.storage_id.as_bytes());
        let wal = self.wal;
        for number in [wal.sequence, wal.frame, wal.record, wal.confirmed_frame] {
            out.extend_from_slice(&number.to_le_bytes());
        }
        out.push(u8::from(self.clean_at_record.is_some()));
        out.extend_from_slice(&self.clean_at_record.unwrap_or(0).to_le_bytes());
        out.extend_from_slice(&(self.groups.len() as u32).to_le_bytes());
        for group in &self.groups {
            group.encode(&mut out);
        }
        let crc = crc32c(&out[PREFIX_SIZE..]);
        out[CRC_AT..PREFIX_SIZE].copy_from_slice(&crc.to_le_bytes());
        out
    }

    pub fn decode(bytes: &[u8]) -> Result<Self, &'static str> {
        let mut reader = Reader::new(bytes);
        if reader.take(MAGIC.len()) != Some(MAGIC) {
            return Err("the file is no checkpoint");
        }
        let version = reader.u8().ok_or("the file is cut short")?;
        if !(1..=VERSION).contains(&version) {
            return Err("the checkpoint was written by another version");
        }
        let crc = reader.u32().ok_or("the file is cut short")?;
        if crc32c(&bytes[PREFIX_SIZE..]) != crc {
            return Err("the checkpoint's checksum is wrong");
        }
        Self::decode_fields(&mut reader, version, bytes.len())
            .ok_or("the checkpoint makes no sense")
    }

    fn decode_fields(reader: &mut Reader<'_>, version: u8, left: usize) -> Option<Self> {
        let storage_id = Uuid::from_slice(reader.take(16)?).ok()?;
        let wal = WalStart {
            sequence: reader.u64()?,
            frame: reader.u64()?,
            record: reader.u64()?,
            confirmed_frame: reader.u64()?,
        };
        let is_clean = reader.u8()? != 0;
        let clean_at_record = Some(reader.u64()?).filter(|_| is_clean);
        let count = bounded(reader.u32()?, left, GROUP_SIZE_MIN)?;
        let groups = (0..count)
            .map(|_| GroupCheckpoint::decode(reader, version, left))
            .collect::<Option<_>>()?;
        let checkpoint = Checkpoint {
            storage_id,
            wal,
            clean_at_record,
            groups,
        };
        reader.is_at_end().then_some(checkpoint)
    }

    /// Replaces the checkpoint of the storage in `dir`; durable when this returns.
    pub fn write(&self, disk: &dyn Disk, dir: &Path) -> Result<(), StorageError> {
        let temporary = dir.join("checkpoint.new");
        let write = || -> io::Result<Arc<dyn DiskFile>> {
            let bytes = self.encode();
            let file = disk.open(&temporary, true)?;
            file.set_size(0)?;
            file.write_at(&[IoSlice::new(&bytes)], 0)?;
            Ok(file)
        };
        // Until the rename the old checkpoint is the one that counts.
        let file = write().map_err(|e| StorageError::io("cannot write", &temporary, e))?;
        let replace = || -> io::Result<()> {
            file.sync_data()?;
            disk.rename(&temporary, &path_of(dir))?;
            disk.sync_dir(dir)
        };
        replace().map_err(|e| StorageError::io(CANNOT_SYNC, &path_of(dir), e))
    }

    /// The checkpoint of the storage in `dir`; `None` if none was ever written.
    pub fn read(disk: &dyn Disk, dir: &Path) -> Result<Option<Self>, OpenError> {
        let path = path_of(dir);
        let bytes = match read_all(disk, &path) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(source) => {
                return Err(OpenError::Io {
                    operation: "cannot read",
                    file: path,
                    source,
                });
            }
        };
        Checkpoint::decode(&bytes)
            .map(Some)
            .map_err(|why| OpenError::Corrupt {
                file: path,
                position: 0,
                why: why.to_owned(),
            })
    }
}

fn path_of(dir: &Path) -> PathBuf {
    dir.join("checkpoint")
}

#[cfg(test)]
#[path = "checkpoint_test.rs"]
mod tests;
