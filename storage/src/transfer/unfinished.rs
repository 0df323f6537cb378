//! Copies of whole logs that are under way, as the next start finds them: beside the files of each
//! lies a description of what they are to become.
//!
//! ```text
//! partitions/<group>/<generation>.copy      magic, version, CRC32C, generation, manifest
//! ```
//!
//! Invariant: nothing of what a start finds is trusted. A description is not fsynced: a torn or
//! missing one lets the copy begin anew. How much has come is what the files' sizes say, which may be
//! more than was written; every byte is checked before it counts.

use std::collections::{HashMap, HashSet};
use std::io::{self, IoSlice};
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use chronik_types::id::RaftGroupId;
use chronik_types::record_batch::crc32c;

use super::manifest::{LogManifest, ManifestSegment, SegmentFile};
use crate::codec::Reader;
use crate::core::Core;
use crate::disk::{Disk, read_all};
use crate::error::StorageError;
use crate::segment::{dir_of, file_name};
use crate::storage::Storage;
use crate::sync::lock;

const MAGIC: &[u8; 7] = b"CHRCOPY";
const VERSION: u8 = 1;
/// Magic, version and checksum.
const PREFIX_SIZE: usize = 12;
const CRC_AT: usize = 8;
const EXTENSION: &str = ".copy";
/// Follows the name of one that is being written.
const NEW_SUFFIX: &str = "-new";

/// Bytes of a segment's files that have come.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct Received {
    log_bytes: u64,
    sidecar_bytes: u64,
}

impl Received {
    pub fn all_of(described: &ManifestSegment) -> Self {
        Received {
            log_bytes: described.log_bytes,
            sidecar_bytes: described.sidecar_bytes,
        }
    }

    pub fn bytes(&self) -> u64 {
        self.log_bytes.saturating_add(self.sidecar_bytes)
    }

    pub fn of(&self, file: SegmentFile) -> u64 {
        match file {
            SegmentFile::Log => self.log_bytes,
            SegmentFile::Sidecar => self.sidecar_bytes,
        }
    }

    pub fn of_mut(&mut self, file: SegmentFile) -> &mut u64 {
        match file {
            SegmentFile::Log => &mut self.log_bytes,
            SegmentFile::Sidecar => &mut self.sidecar_bytes,
        }
    }
}

/// A copy and what has come of it.
#[derive(Debug)]
pub struct BegunCopy {
    pub generation: u32,
    pub manifest: LogManifest,
    /// Of each segment.
    pub received: Vec<Received>,
}

impl BegunCopy {
    pub fn total_bytes(&self) -> u64 {
        let bytes = |received: &Received| received.log_bytes + received.sidecar_bytes;
        self.received.iter().map(bytes).sum()
    }
}

/// All copies that a start would find now.
pub struct Unfinished {
    /// What the process before has left and nobody has gone on with.
    left: Mutex<HashMap<RaftGroupId, BegunCopy>>,
    /// Those that are left, and those under way.
    count: AtomicUsize,
    is_ending: AtomicBool,
}

impl Unfinished {
    pub fn new(left: HashMap<RaftGroupId, BegunCopy>) -> Self {
        Unfinished {
            count: AtomicUsize::new(left.len()),
            left: Mutex::new(left),
            is_ending: AtomicBool::new(false),
        }
    }

    /// There are files that the next start has to look for.
    pub fn has_any(&self) -> bool {
        self.count.load(Ordering::SeqCst) > 0
    }

    /// What is dropped stays for the next start.
    pub fn is_ending(&self) -> bool {
        self.is_ending.load(Ordering::SeqCst)
    }

    /// To go on with.
    pub fn take(&self, group: RaftGroupId) -> Option<BegunCopy> {
        lock(&self.left).remove(&group)
    }
}

impl Storage {
    /// Groups of which the process before has left an unfinished copy: `install` goes on with it, or
    /// `forget_unfinished_copy` removes it.
    pub fn unfinished_copies(&self) -> Vec<RaftGroupId> {
        let left = lock(&self.core().unfinished.left);
        left.keys().copied().collect()
    }

    /// Removes what the process before has left of a copy, unless somebody goes on with it. Waits
    /// for the disk.
    pub fn forget_unfinished_copy(&self, group: RaftGroupId) {
        forget_left(self.core(), group);
    }

    /// To be called before the process ends: from now on an installer that is dropped leaves what it
    /// has received for the next start.
    pub fn leave_unfinished_copies(&self) {
        self.core()
            .unfinished
            .is_ending
            .store(true, Ordering::SeqCst);
    }
}

/// To be called once for a copy that is to have a description; `remove_description` ends it.
pub fn begin(core: &Core) -> Result<(), StorageError> {
    let count = &core.unfinished.count;
    count.fetch_add(1, Ordering::SeqCst);
    // The checkpoint of a close that comes later counts it. After one that came before, nobody would
    // look for its files.
    core.wal.check_open().inspect_err(|_| {
        count.fetch_sub(1, Ordering::SeqCst);
    })
}

/// Says on the disk what a copy consists of, or consists of now.
pub fn describe(
    core: &Core,
    group: RaftGroupId,
    generation: u32,
    manifest: &LogManifest,
) -> Result<(), StorageError> {
    core.poison.check()?;
    let path = path_of(core, group, generation);
    let temporary = path.with_file_name(name_of(generation) + NEW_SUFFIX);
    let disk = core.files.disk();
    let write = || -> io::Result<()> {
        let file = disk.open(&temporary, true)?;
        file.set_size(0)?;
        file.write_at(&[IoSlice::new(&encode(generation, manifest))], 0)?;
        // One from before stays until this one is there.
        disk.rename(&temporary, &path)
    };
    write().map_err(|error| {
        let _ = disk.remove_file(&temporary);
        core.write_failed(&path, error)
    })
}

/// An fsync of the copy has failed: what the next start would read may not be on the disk, and a further
/// fsync would not tell.
pub fn distrust(core: &Core, group: RaftGroupId, generation: u32) {
    let path = path_of(core, group, generation);
    match core.files.disk().remove_file(&path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            tracing::warn!(file = %path.display(), %error, "cannot delete a copy's description");
        }
        _ => {}
    }
}

/// The copy is in force, or its files are gone.
pub fn remove_description(core: &Core, group: RaftGroupId, generation: u32) {
    let path = path_of(core, group, generation);
    match core.files.disk().remove_file(&path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            // It still counts, so that the next start looks for it.
            tracing::warn!(file = %path.display(), %error, "cannot delete a copy's description");
        }
        _ => {
            core.unfinished.count.fetch_sub(1, Ordering::SeqCst);
        }
    }
}

/// Removes what the process before has left of the group's copy, if nobody goes on with it.
pub fn forget_left(core: &Core, group: RaftGroupId) {
    let Some(left) = core.unfinished.take(group) else {
        return;
    };
    for segment in &left.manifest.segments {
        core.files.remove(group, segment.id(left.generation));
    }
    remove_description(core, group, left.generation);
}

/// Finds the copy of a whole log that was under way in this folder, and takes its files out of
/// `names`. Those below `first_generation` are in force, or were overtaken; of several the last one
/// counts. One of which nothing has come is none.
pub fn find_left(
    disk: &dyn Disk,
    dir: &Path,
    names: &mut Vec<String>,
    first_generation: u32,
) -> io::Result<Option<BegunCopy>> {
    let generations = names.iter().filter_map(|name| generation_of(name));
    let mut generations: Vec<u32> = generations.filter(|g| *g >= first_generation).collect();
    generations.sort_unstable();
    let whole = generations.into_iter().rev().find_map(|generation| {
        // One that cannot be read is as good as none.
        let bytes = read_all(disk, &dir.join(name_of(generation))).ok()?;
        Some((generation, decode(&bytes, generation)?))
    });
    let Some((generation, manifest)) = whole else {
        return Ok(None);
    };
    let mut left = BegunCopy {
        generation,
        manifest,
        received: Vec::new(),
    };
    let mut kept = HashSet::from([name_of(generation)]);
    for segment in &left.manifest.segments {
        let mut received = Received::default();
        for file in [SegmentFile::Log, SegmentFile::Sidecar] {
            let name = file_name(segment.id(generation), file.kind());
            let size = disk.file_size(&dir.join(&name))?.unwrap_or(0);
            // A longer one is of a description that is lost.
            if size > 0 && size <= segment.file_bytes(file) {
                *received.of_mut(file) = size;
                kept.insert(name);
            }
        }
        left.received.push(received);
    }
    if left.total_bytes() == 0 {
        return Ok(None);
    }
    names.retain(|name| !kept.contains(name));
    Ok(Some(left))
}

/// Whether a file of this name is the description of a copy, or one that was not finished.
pub fn is_description(name: &str) -> bool {
    let name = name.strip_suffix(NEW_SUFFIX).unwrap_or(name);
    generation_of(name).is_some()
}

fn generation_of(name: &str) -> Option<u32> {
    let generation = name.strip_suffix(EXTENSION)?.parse().ok()?;
    // Only the one way to write a name is a name.
    (name_of(generation) == name).then_some(generation)
}

fn name_of(generation: u32) -> String {
    format!("{generation}{EXTENSION}")
}

fn path_of(core: &Core, group: RaftGroupId, generation: u32) -> PathBuf {
    dir_of(core.files.partitions(), group).join(name_of(generation))
}

fn encode(generation: u32, manifest: &LogManifest) -> Vec<u8> {
    let mut out = vec![0; PREFIX_SIZE];
    out[..MAGIC.len()].copy_from_slice(MAGIC);
    out[MAGIC.len()] = VERSION;
    out.extend_from_slice(&generation.to_le_bytes());
    out.extend_from_slice(&manifest.encode());
    let crc = crc32c(&out[PREFIX_SIZE..]);
    out[CRC_AT..PREFIX_SIZE].copy_from_slice(&crc.to_le_bytes());
    out
}

/// The manifest in the description of the copy with this generation; `None`: it is not whole.
fn decode(bytes: &[u8], generation: u32) -> Option<LogManifest> {
    let mut reader = Reader::new(bytes);
    let is_known = reader.take(MAGIC.len())? == MAGIC && reader.u8()? == VERSION;
    let is_whole = reader.u32()? == crc32c(bytes.get(PREFIX_SIZE..)?);
    let is_its_own = reader.u32()? == generation;
    let manifest = bytes.get(PREFIX_SIZE + size_of::<u32>()..)?;
    let is_valid = is_known && is_whole && is_its_own;
    is_valid.then(|| LogManifest::decode(manifest).ok())?
}

#[cfg(test)]
mod tests {
    use chronik_types::offset::Offset;

    use super::*;
    use crate::entry::TermStart;

    fn manifest() -> LogManifest {
        let segment = ManifestSegment {
            base_offset: Offset::ZERO,
            next_offset: Offset(10),
            first_index: 0,
            next_index: 5,
            log_bytes: 1000,
            sidecar_bytes: 0,
            is_compacted: false,
            created_ms: 7,
            appended_ms: 8,
        };
        let start = TermStart {
            term: 2,
            first_index: 0,
            first_offset: Offset::ZERO,
        };
        LogManifest {
            log_start_offset: Offset::ZERO,
            next_offset: Offset(10),
            last_index: 4,
            last_term: 2,
            term_starts: vec![start],
            cleaned_offset: Offset::ZERO,
            segments: vec![segment],
        }
    }

    #[test]
    fn a_description_round_trips_and_damage_to_it_is_found() {
        let bytes = encode(3, &manifest());
        assert_eq!(decode(&bytes, 3), Some(manifest()));
        assert_eq!(decode(&bytes, 4), None);
        for bit in 0..bytes.len() * 8 {
            let mut damaged = bytes.clone();
            damaged[bit / 8] ^= 1 << (bit % 8);
            assert_eq!(decode(&damaged, 3), None, "bit {bit}");
        }
        for size in 0..bytes.len() {
            assert_eq!(decode(&bytes[..size], 3), None, "size {size}");
        }
    }

    #[test]
    fn names_round_trip_and_other_names_are_none() {
        for generation in [0, 1, 77, u32::MAX] {
            assert_eq!(generation_of(&name_of(generation)), Some(generation));
            assert!(is_description(&(name_of(generation) + NEW_SUFFIX)));
        }
        for other in [
            "copy",
            ".copy",
            "01.copy",
            "+1.copy",
            "4294967296.copy",
            "1.log",
        ] {
            assert_eq!(generation_of(other), None, "{other}");
        }
    }
}
