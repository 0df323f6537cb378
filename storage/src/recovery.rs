//! Puts the storage together again after a restart: checkpoint, segments, and the rest of the WAL.
//!
//! Invariant: segments are cut back to what the checkpoint names, because only that is known to be
//! fsynced; everything after it is still in the WAL. Of the files that nothing names, those of an
//! unfinished copy stay, one for each group.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::path::Path;
use std::sync::Arc;

use chronik_types::id::RaftGroupId;
use uuid::Uuid;

use crate::checkpoint::Checkpoint;
use crate::disk::Disk;
use crate::error::{OpenError, StorageError};
use crate::flusher::remove_files;
use crate::partition_log::replay::Replay;
use crate::partition_log::state::LogState;
use crate::segment::{FileKind, Segment, dir_of, file_name, parse_file_name};
use crate::transfer::{BegunCopy, find_left, is_description};
use crate::wal::recovery::{WalStart, recover as recover_wal};
use crate::wal::writer::WalPosition;
use crate::wal::{Action, Decoded, WalFiles};

/// All that was found.
pub struct Recovered {
    pub logs: HashMap<RaftGroupId, LogState>,
    /// Deleted groups, with the record that says so.
    pub deleted_at: HashMap<RaftGroupId, u64>,
    pub position: WalPosition,
    pub unfinished: HashMap<RaftGroupId, BegunCopy>,
}

impl Recovered {
    /// For logs that are made: above what unfinished copies have of groups without a log.
    pub fn first_generation(&self) -> u32 {
        let left = self.unfinished.iter();
        let without_log = left.filter(|(group, _)| !self.logs.contains_key(group));
        let after = without_log.map(|(_, left)| left.generation.saturating_add(1));
        after.max().unwrap_or(0)
    }
}

/// The checkpoint of the storage in `dir`, made if the folder is new.
pub fn open_checkpoint(
    disk: &dyn Disk,
    dir: &Path,
    wal_dir: &Path,
    partitions: &Path,
) -> Result<Checkpoint, OpenError> {
    if let Some(checkpoint) = Checkpoint::read(disk, dir)? {
        return Ok(checkpoint);
    }
    for used in [wal_dir, partitions] {
        let names = disk
            .list(used)
            .map_err(|e| io_error("cannot list", used, e))?;
        if !names.is_empty() {
            let file = dir.join("checkpoint");
            let why = "the checkpoint is missing, but there is data".to_owned();
            return Err(OpenError::Corrupt {
                file,
                position: 0,
                why,
            });
        }
    }
    let checkpoint = Checkpoint {
        storage_id: Uuid::new_v4(),
        wal: WalStart {
            sequence: 1,
            frame: 1,
            record: 1,
            confirmed_frame: 1,
        },
        clean_at_record: Some(1),
        groups: Vec::new(),
    };
    checkpoint.write(disk, dir)?;
    Ok(checkpoint)
}

/// Recovers all logs, and leaves the disk as they say.
pub fn recover(
    disk: &Arc<dyn Disk>,
    files: &WalFiles,
    partitions: &Path,
    checkpoint: Checkpoint,
    segment_bytes: u64,
) -> Result<Recovered, OpenError> {
    let mut replays: HashMap<RaftGroupId, Replay> = HashMap::new();
    for group in checkpoint.groups {
        let id = group.group;
        let state = group.into_state(segment_bytes);
        replays.insert(id, Replay::new(state));
    }
    let mut deleted_at = HashMap::new();
    let mut apply = |number: u64, file: u64, record: Decoded| {
        apply_record(
            &mut replays,
            &mut deleted_at,
            segment_bytes,
            number,
            file,
            record,
        );
        Ok(())
    };
    let position = recover_wal(
        disk,
        files,
        checkpoint.storage_id,
        checkpoint.wal,
        &mut apply,
    )?;

    let mut logs = HashMap::with_capacity(replays.len());
    let mut has_leftovers = false;
    for (group, replay) in replays {
        let (state, gone) = replay.finish().map_err(|why| OpenError::Corrupt {
            file: files.dir().to_owned(),
            position: 0,
            why: format!("group {group}: {why}"),
        })?;
        has_leftovers |= !gone.is_empty();
        logs.insert(group, state);
    }
    let mut unfinished = HashMap::new();
    if has_leftovers || checkpoint.clean_at_record != Some(position.next_record) {
        unfinished = clean_up(&**disk, partitions, &logs, &deleted_at)?;
    }
    for (group, left) in &unfinished {
        if let Some(state) = logs.get_mut(group) {
            let after = left.generation.saturating_add(1);
            state.next_generation = state.next_generation.max(after);
        }
    }
    find_missing(&**disk, partitions, &mut logs)?;
    Ok(Recovered {
        logs,
        deleted_at,
        position,
        unfinished,
    })
}

fn apply_record(
    replays: &mut HashMap<RaftGroupId, Replay>,
    deleted_at: &mut HashMap<RaftGroupId, u64>,
    segment_bytes: u64,
    number: u64,
    file: u64,
    record: Decoded,
) {
    let Decoded { group, action } = record;
    match (action, replays.entry(group)) {
        (Action::Mark, _) => {}
        (Action::Delete, Entry::Occupied(replay)) => {
            // Otherwise it is about a log of this group that was there before the checkpoint.
            if number >= replay.get().state.replay_from_record {
                replay.remove();
                deleted_at.insert(group, number);
            }
        }
        (Action::Delete, Entry::Vacant(_)) => {
            deleted_at.insert(group, number);
        }
        (action, Entry::Occupied(mut replay)) => replay.get_mut().apply(number, file, action),
        (action, Entry::Vacant(vacant)) => {
            let replay_from_record = deleted_at.get(&group).map_or(0, |record| record + 1);
            let state = LogState {
                replay_from_record,
                segment_bytes,
                ..LogState::default()
            };
            vacant
                .insert(Replay::new(state))
                .apply(number, file, action);
        }
    }
}

/// Removes what nothing refers to, but for unfinished copies, which it gives.
fn clean_up(
    disk: &dyn Disk,
    partitions: &Path,
    logs: &HashMap<RaftGroupId, LogState>,
    deleted_at: &HashMap<RaftGroupId, u64>,
) -> Result<HashMap<RaftGroupId, BegunCopy>, OpenError> {
    for group in deleted_at.keys().filter(|group| !logs.contains_key(group)) {
        remove_files(disk, partitions, *group)
            .map_err(|e| io_error("cannot delete", &dir_of(partitions, *group), e))?;
    }
    let names = disk
        .list(partitions)
        .map_err(|e| io_error("cannot list", partitions, e))?;
    let mut unfinished = HashMap::new();
    for group in names
        .iter()
        .filter_map(|name| name.parse().ok().map(RaftGroupId))
    {
        let dir = dir_of(partitions, group);
        let mut names = disk
            .list(&dir)
            .map_err(|e| io_error("cannot list", &dir, e))?;
        let state = logs.get(&group);
        let first_generation = state.map_or(0, |state| state.next_generation);
        let left = find_left(disk, &dir, &mut names, first_generation)
            .map_err(|e| io_error("cannot look for a copy in", &dir, e))?;
        match state {
            Some(state) => cut_back(disk, &dir, names, &state.segments)?,
            None => remove_received(disk, &dir, names, left.is_none())
                .map_err(|e| io_error("cannot clean up", &dir, e))?,
        }
        if let Some(left) = left {
            tracing::info!(
                raft_group_id = %group,
                bytes = left.total_bytes(),
                "a copy of a log was not finished: what has come of it is kept"
            );
            unfinished.insert(group, left);
        }
    }
    Ok(unfinished)
}

/// Looks whether all segments' files are there and long enough. A log of which something is missing
/// is opened as a damaged one; the others do not suffer.
fn find_missing(
    disk: &dyn Disk,
    partitions: &Path,
    logs: &mut HashMap<RaftGroupId, LogState>,
) -> Result<(), OpenError> {
    for (group, state) in logs {
        for at in 0..state.segments.len() {
            let segment = state.segments[at];
            for kind in [FileKind::Log, FileKind::Sidecar] {
                let expected = segment.file_bytes(kind);
                if expected == 0 {
                    continue;
                }
                let path = dir_of(partitions, *group).join(file_name(segment.id(), kind));
                let size = disk
                    .file_size(&path)
                    .map_err(|e| io_error("cannot look at", &path, e))?;
                let why = match size {
                    None => "the file is missing",
                    Some(size) if size < expected => "the file is shorter than it was",
                    Some(_) => continue,
                };
                let position = size.unwrap_or(0);
                let error = StorageError::corrupt(&path, position, why);
                state.note_damage(*group, segment.id(), &error);
                // Nothing may be written behind a hole.
                if let Some(last) = state.segments.last_mut().filter(|last| last.log_bytes > 0) {
                    last.is_sealed = true;
                }
            }
        }
    }
    Ok(())
}

/// Removes what was received for a log that never came to be; a log that has segments is known from the
/// checkpoint or the WAL. Files of no generation are no one's either, but how they came here is not known.
fn remove_received(
    disk: &dyn Disk,
    dir: &Path,
    names: Vec<String>,
    mut is_empty: bool,
) -> std::io::Result<()> {
    for name in names {
        let is_of_copy = match parse_file_name(&name) {
            Some((id, _)) => id.generation > 0,
            None => is_description(&name),
        };
        match is_of_copy {
            true => {
                let file = dir.join(name);
                tracing::info!(file = %file.display(), "removes a file of a log that never came to be");
                disk.remove_file(&file)?;
            }
            false => {
                is_empty = false;
                let file = dir.join(name);
                tracing::warn!(file = %file.display(), "a file belongs to no log that is known");
            }
        }
    }
    if is_empty {
        disk.remove_dir(dir)?;
    }
    Ok(())
}

/// Cuts the files of a log back to the sizes that its segments have, and removes all others.
fn cut_back(
    disk: &dyn Disk,
    dir: &Path,
    names: Vec<String>,
    segments: &[Segment],
) -> Result<(), OpenError> {
    for name in names {
        let path = dir.join(&name);
        let expected = match parse_file_name(&name) {
            Some((id, kind)) => {
                let at = segments.binary_search_by_key(&id, Segment::id).ok();
                let segment = at.and_then(|at| segments.get(at));
                segment.map_or(0, |segment| segment.file_bytes(kind))
            }
            None if is_description(&name) => 0,
            None => continue,
        };
        if expected == 0 {
            disk.remove_file(&path)
                .map_err(|e| io_error("cannot remove", &path, e))?;
            continue;
        }
        let failed = |e| io_error("cannot cut back", &path, e);
        let file = disk.open(&path, false).map_err(failed)?;
        if file.size().map_err(failed)? > expected {
            file.set_size(expected).map_err(failed)?;
        }
    }
    Ok(())
}

fn io_error(operation: &'static str, file: &Path, source: std::io::Error) -> OpenError {
    OpenError::Io {
        operation,
        file: file.to_owned(),
        source,
    }
}
