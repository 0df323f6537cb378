//! Reads the WAL back after a restart.
//!
//! Invariant: every frame that was ever confirmed is handed on, in order, or the storage does not
//! open. Only the one frame that was not yet confirmed may be cut off.
//!
//! The first invalid frame ends the log if nothing valid follows it. Otherwise confirmed data was
//! damaged: a later frame was only written after the earlier one was fsynced.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::Bytes;
use uuid::Uuid;

use super::files::{WalFile, WalFiles, path_of, sequence_of};
use super::frame::{FrameHeader, HEADER_SIZE, MAGIC, checksum};
use super::record::{self, Decoded};
use super::writer::WalPosition;
use crate::disk::{Disk, DiskFile, read_full_at};
use crate::error::OpenError;

/// Where the checkpoint says the log starts.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct WalStart {
    pub sequence: u64,
    pub frame: u64,
    pub record: u64,
    /// Frames below this number were confirmed when the checkpoint was written.
    pub confirmed_frame: u64,
}

/// Takes one record: its number, the file it lies in, and what it says. A refusal says why the
/// record cannot be true.
pub type Apply<'a> = dyn FnMut(u64, u64, Decoded) -> Result<(), String> + 'a;

struct Scan<'a> {
    disk: &'a dyn Disk,
    dir: &'a Path,
    storage_id: Uuid,
    next_frame: u64,
    next_record: u64,
    /// The last valid frame: its file's sequence, position and bytes.
    last: Option<(u64, u64, Vec<u8>)>,
}

/// Why no valid frame starts at a position.
struct EndOfFrames {
    position: u64,
    why: &'static str,
}

/// Reads all files from `start` on, and says where the log goes on.
pub fn recover(
    disk: &Arc<dyn Disk>,
    files: &WalFiles,
    storage_id: Uuid,
    start: WalStart,
    apply: &mut Apply<'_>,
) -> Result<WalPosition, OpenError> {
    let dir = files.dir();
    let names = disk
        .list(dir)
        .map_err(|e| io_error("cannot list", dir, e))?;
    let mut sequences: Vec<u64> = names.iter().filter_map(|name| sequence_of(name)).collect();
    sequences.sort_unstable();
    let live: Vec<u64> = sequences
        .iter()
        .copied()
        .filter(|s| *s >= start.sequence)
        .collect();
    check_names(dir, start, &live)?;

    let mut scan = Scan {
        disk: &**disk,
        dir,
        storage_id,
        next_frame: start.frame,
        next_record: start.record,
        last: None,
    };
    let mut found = Vec::new();
    let mut ends: Vec<(u64, EndOfFrames)> = Vec::new();
    for sequence in &live {
        let first_frame = scan.next_frame;
        let first_record = scan.next_record;
        let end = scan.file(*sequence, apply)?;
        if scan.next_frame > first_frame {
            ends.clear();
        }
        ends.push((*sequence, end));
        found.push(WalFile {
            sequence: *sequence,
            first_frame,
            first_record,
        });
    }
    for (sequence, end) in &ends {
        scan.refuse_later_frames(*sequence, end, &ends[0])?;
    }
    if scan.next_frame < start.confirmed_frame {
        let (sequence, position, why) = ends
            .first()
            .map_or((start.sequence, 0, "the file is missing"), |(s, e)| {
                (*s, e.position, e.why)
            });
        return Err(corrupt(
            &path_of(dir, sequence),
            position,
            format!(
                "{why}, and frames {} to {} were confirmed but are not there",
                scan.next_frame,
                start.confirmed_frame - 1
            ),
        ));
    }
    scan.write_last_again()?;

    // A file without frames is used again; it was made just before the crash.
    let next_sequence = match found.last() {
        None => start.sequence,
        Some(last) if last.first_frame == scan.next_frame => last.sequence,
        Some(last) => last.sequence + 1,
    };
    found.retain(|file| file.sequence < next_sequence);
    files.set_live(found);
    recycle_leftovers(files, &names, start.sequence)?;
    Ok(WalPosition {
        next_sequence,
        next_frame: scan.next_frame,
        next_record: scan.next_record,
    })
}

fn check_names(dir: &Path, start: WalStart, live: &[u64]) -> Result<(), OpenError> {
    for (expected, sequence) in (start.sequence..).zip(live) {
        if expected != *sequence {
            return Err(corrupt(
                &path_of(dir, expected),
                0,
                "the file is missing".to_owned(),
            ));
        }
    }
    Ok(())
}

/// Files that the checkpoint made superfluous, and spares of the last run.
fn recycle_leftovers(files: &WalFiles, names: &[String], start: u64) -> Result<(), OpenError> {
    let is_leftover = |name: &String| {
        name.starts_with("spare-") || sequence_of(name).is_some_and(|sequence| sequence < start)
    };
    let paths: Vec<PathBuf> = names
        .iter()
        .filter(|name| is_leftover(name))
        .map(|name| files.dir().join(name))
        .collect();
    Ok(files.adopt(paths)?)
}

impl Scan<'_> {
    fn file(&mut self, sequence: u64, apply: &mut Apply<'_>) -> Result<EndOfFrames, OpenError> {
        let path = path_of(self.dir, sequence);
        let file = self
            .disk
            .open(&path, false)
            .map_err(|e| io_error("cannot open", &path, e))?;
        let size = file.size().map_err(|e| io_error("cannot read", &path, e))?;
        let mut position = 0;
        loop {
            let read = self.frame(&*file, sequence, position, size);
            let (header, bytes) = match read.map_err(|e| io_error("cannot read", &path, e))? {
                Ok(frame) => frame,
                Err(why) => return Ok(EndOfFrames { position, why }),
            };
            if (header.frame_number, header.first_record) != (self.next_frame, self.next_record) {
                let why = format!(
                    "frame {} follows where {} is due: confirmed frames are missing",
                    header.frame_number, self.next_frame
                );
                return Err(corrupt(&path, position, why));
            }
            let frame_size = bytes.len() as u64;
            let frame = Bytes::from(bytes);
            let records = record::decode(&frame.slice(HEADER_SIZE..))
                .map_err(|why| corrupt(&path, position, why.to_owned()))?;
            if records.len() != header.record_count as usize {
                let why = "the frame's record count is wrong".to_owned();
                return Err(corrupt(&path, position, why));
            }
            for (number, record) in (header.first_record..).zip(records) {
                apply(number, sequence, record).map_err(|why| corrupt(&path, position, why))?;
            }
            self.next_frame += 1;
            self.next_record += u64::from(header.record_count);
            self.last = Some((sequence, position, frame.into()));
            position += frame_size;
        }
    }

    /// Reads the frame at `position`, header included.
    fn frame(
        &self,
        file: &dyn DiskFile,
        sequence: u64,
        position: u64,
        size: u64,
    ) -> std::io::Result<Result<(FrameHeader, Vec<u8>), &'static str>> {
        let mut header_bytes = [0; HEADER_SIZE];
        let count = read_full_at(file, &mut header_bytes, position)?;
        let (header, crc) = match FrameHeader::parse(&header_bytes[..count], sequence) {
            Ok(parsed) => parsed,
            Err(why) => return Ok(Err(why)),
        };
        let left = size.saturating_sub(position + HEADER_SIZE as u64);
        if u64::from(header.body_size) > left {
            return Ok(Err("the frame is longer than the file"));
        }
        let mut bytes = vec![0; HEADER_SIZE + header.body_size as usize];
        if read_full_at(file, &mut bytes, position)? < bytes.len() {
            return Ok(Err("the file ends within a frame"));
        }
        let body = std::iter::once(&bytes[HEADER_SIZE..]);
        if checksum(self.storage_id, &header_bytes, body) != crc {
            return Ok(Err("the frame's checksum is wrong"));
        }
        Ok(Ok((header, bytes)))
    }

    /// Looks behind the end of the log for a frame that was written later.
    fn refuse_later_frames(
        &self,
        sequence: u64,
        end: &EndOfFrames,
        first_end: &(u64, EndOfFrames),
    ) -> Result<(), OpenError> {
        const CHUNK: usize = 1 << 20;
        let path = path_of(self.dir, sequence);
        let failed = |e| io_error("cannot read", &path, e);
        let file = self.disk.open(&path, false).map_err(failed)?;
        let size = file.size().map_err(failed)?;
        let mut buffer = vec![0; CHUNK.min(size as usize) + MAGIC.len() - 1];
        // The frame at the end's own position is known to be invalid.
        let mut from = end.position + 1;
        while from < size {
            let count = read_full_at(&*file, &mut buffer, from).map_err(failed)?;
            let bytes = &buffer[..count];
            for at in positions_of_magic(bytes).filter(|at| may_be_of(bytes, *at, sequence)) {
                let at = from + at as u64;
                let frame = self.frame(&*file, sequence, at, size).map_err(failed)?;
                if let Ok((header, _)) = frame
                    && header.frame_number >= self.next_frame
                {
                    let (damaged, EndOfFrames { position, why }) = first_end;
                    let why = format!(
                        "{why}, but frame {} was written after it, at byte {at} of {}",
                        header.frame_number,
                        path.display()
                    );
                    return Err(corrupt(&path_of(self.dir, *damaged), *position, why));
                }
            }
            from += (buffer.len() - (MAGIC.len() - 1)) as u64;
        }
        Ok(())
    }

    /// The last frame may be in the page cache only: after a failed fsync the kernel takes its
    /// pages for clean, and a process killed between write and fsync never asked. Written again
    /// and synced, it is as durable as it is about to be reported.
    fn write_last_again(&self) -> Result<(), OpenError> {
        let Some((sequence, position, bytes)) = &self.last else {
            return Ok(());
        };
        let path = path_of(self.dir, *sequence);
        let file = self
            .disk
            .open(&path, false)
            .map_err(|e| io_error("cannot open", &path, e))?;
        file.write_at(&[std::io::IoSlice::new(bytes)], *position)
            .and_then(|()| file.sync_data())
            .map_err(|e| io_error("cannot write", &path, e))
    }
}

/// Where the magic bytes are. Most blocks have none, and a block is looked through without a branch
/// per byte.
fn positions_of_magic(bytes: &[u8]) -> impl Iterator<Item = usize> {
    const BLOCK: usize = 4096;
    let is_magic = |window: &[u8]| window == MAGIC;
    (0..bytes.len()).step_by(BLOCK).flat_map(move |from| {
        let end = (from + BLOCK + MAGIC.len() - 1).min(bytes.len());
        let block = &bytes[from..end];
        let windows = if has_magic(block) {
            block.windows(MAGIC.len())
        } else {
            [].windows(1)
        };
        windows
            .enumerate()
            .filter(move |(_, w)| is_magic(w))
            .map(move |(at, _)| from + at)
    })
}

fn has_magic(block: &[u8]) -> bool {
    let [a, b, c, d] = MAGIC;
    let count = block.len().saturating_sub(MAGIC.len() - 1);
    let shifted = block[..count].iter().zip(block.iter().skip(1));
    let shifted = shifted.zip(block.iter().skip(2).zip(block.iter().skip(3)));
    shifted.fold(false, |found, ((w, x), (y, z))| {
        found | ((*w == a) & (*x == b) & (*y == c) & (*z == d))
    })
}

/// Whether the frame at `at` names this file, as far as its header is in `bytes`.
fn may_be_of(bytes: &[u8], at: usize, sequence: u64) -> bool {
    bytes
        .get(at + 8..at + 16)
        .is_none_or(|field| field == sequence.to_le_bytes())
}

fn corrupt(file: &Path, position: u64, why: String) -> OpenError {
    OpenError::Corrupt {
        file: file.to_owned(),
        position,
        why,
    }
}

fn io_error(operation: &'static str, file: &Path, source: std::io::Error) -> OpenError {
    OpenError::Io {
        operation,
        file: file.to_owned(),
        source,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_magic_is_found_at_every_position_and_across_blocks() {
        for at in [0, 1, 4090, 4093, 4094, 4095, 4096, 4097, 8188, 8189, 9996] {
            let mut bytes = vec![MAGIC[0]; 10_000];
            bytes[at..at + MAGIC.len()].copy_from_slice(&MAGIC);
            assert_eq!(positions_of_magic(&bytes).collect::<Vec<_>>(), vec![at]);
        }
        assert_eq!(positions_of_magic(&[]).count(), 0);
        assert_eq!(positions_of_magic(&MAGIC[..3]).count(), 0);
        assert!(may_be_of(&[0; 10], 0, 7));
        assert!(!may_be_of(&[0; 16], 0, 7));
    }
}
