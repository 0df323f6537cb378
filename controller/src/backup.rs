//! Backups of the controllers' state, and a controller's data folder made from one.
//!
//! Invariant: a restore makes a whole data folder or none. It makes the same state on every controller,
//! with a name that they compare before they found a group with it.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context, anyhow, bail};
use uuid::Uuid;

use crate::config::Config;
use crate::db::backup::{self, BackupLabel};
use crate::db::{DbError, FILE_NAME};
use crate::founding::NodeId;
use crate::raft;
use crate::state::{PendingRestore, StateDump};

/// The backup's copy, and the new database, while a restore is under way.
const COPY_NAME: &str = "restore-backup.tmp";
const RESTORED_NAME: &str = "restore-database.tmp";
/// Backups on their way out, in a controller's data folder.
const OUTGOING_PREFIX: &str = "backup-";
const OUTGOING_SUFFIX: &str = ".tmp";

/// A backup that can be read, of which nothing is left when it is closed.
#[derive(Debug)]
pub struct Outgoing {
    pub file: File,
    pub size_bytes: u64,
    pub backup_id: Uuid,
    pub revision: u64,
}

/// Why a backup could not be made.
#[derive(Debug, thiserror::Error)]
pub enum OutgoingError {
    #[error(transparent)]
    Db(#[from] DbError),
    #[error("{}: {source}", .path.display())]
    Io { path: PathBuf, source: io::Error },
}

/// Writes the state into a file of `folder` that only the returned handle knows.
pub async fn write(folder: &Path, dump: &StateDump) -> Result<Outgoing, OutgoingError> {
    let backup_id = Uuid::new_v4();
    let path = folder.join(format!("{OUTGOING_PREFIX}{backup_id}{OUTGOING_SUFFIX}"));
    let since_epoch = SystemTime::now().duration_since(UNIX_EPOCH);
    let millis = since_epoch.unwrap_or_default().as_millis();
    let label = BackupLabel {
        backup_id,
        created_at_ms: i64::try_from(millis).unwrap_or(i64::MAX),
    };
    let written = backup::write(&path, dump, &label).await;
    let opened = File::open(&path).and_then(|file| Ok((file.metadata()?.len(), file)));
    // What is open can be read after it is removed.
    let removed = fs::remove_file(&path);
    written?;
    let io = |source| OutgoingError::Io {
        path: path.clone(),
        source,
    };
    let (size_bytes, file) = opened.map_err(io)?;
    removed.map_err(io)?;
    Ok(Outgoing {
        file,
        size_bytes,
        backup_id,
        revision: dump.revision,
    })
}

/// Removes what a process that was killed has left of outgoing backups.
pub fn remove_leftovers(folder: &Path) {
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        let name = entry.file_name();
        let name = name.to_string_lossy();
        if name.starts_with(OUTGOING_PREFIX)
            && name.contains(OUTGOING_SUFFIX)
            && let Err(error) = fs::remove_file(entry.path())
        {
            tracing::warn!(%error, file = %entry.path().display(), "a leftover cannot be removed");
        }
    }
}

/// What was restored, for the person who asked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Restored {
    pub cluster_id: String,
    pub backup_id: Uuid,
    pub revision: u64,
    pub created_at_ms: i64,
    pub topic_count: usize,
}

/// Makes the data folder of a controller from a backup.
pub async fn restore(config: &Config, from: &Path) -> anyhow::Result<Restored> {
    let folder = &config.data_dir;
    fs::create_dir_all(folder).with_context(|| format!("cannot create {}", folder.display()))?;
    remove_unfinished(folder)?;
    if let Some(name) = any_entry(folder)? {
        bail!(
            "data folder {} is not empty, it holds {name}: a restore never overwrites; move the \
             folder away first",
            folder.display()
        );
    }
    let result = restore_into(config, from).await;
    result.map_err(|error| match remove_unfinished(folder) {
        Ok(()) => error,
        // The backup's copy, and what there is of a database.
        Err(left) => anyhow!("{error:#}; and files are left behind: {left:#}"),
    })
}

async fn restore_into(config: &Config, from: &Path) -> anyhow::Result<Restored> {
    let folder = &config.data_dir;
    let copy = folder.join(COPY_NAME);
    fs::copy(from, &copy).with_context(|| format!("cannot copy {}", from.display()))?;
    let (mut dump, label) = backup::read(&copy)
        .await
        .with_context(|| format!("{} cannot be restored", from.display()))?;
    if !config.cluster_id.is_empty() && config.cluster_id != dump.cluster_id {
        let (theirs, ours) = (&dump.cluster_id, &config.cluster_id);
        bail!("the backup is of cluster {theirs}, cluster-id is {ours}");
    }
    let restored = Restored {
        cluster_id: dump.cluster_id.clone(),
        backup_id: label.backup_id,
        revision: dump.revision,
        created_at_ms: label.created_at_ms,
        topic_count: dump.topics.len(),
    };
    dump.pending_restore = Some(PendingRestore {
        backup_id: label.backup_id,
        backup_revision: dump.revision,
    });
    // The group is the one of the configuration, not the one that the backup was taken from.
    dump.controller_leader = None;
    dump.controllers.clear();
    let group = config.group();
    let voters: BTreeSet<NodeId> = group.iter().map(|c| NodeId::founder(c.id)).collect();
    let database = folder.join(RESTORED_NAME);
    backup::write_restored(&database, &dump, &raft::restored_start(&voters)?).await?;
    let synced = File::open(&database).and_then(|file| file.sync_all());
    synced.with_context(|| format!("cannot sync {}", database.display()))?;
    // Before the database is in place: from there on a failure would not mean that nothing was done.
    fs::remove_file(&copy).with_context(|| format!("cannot remove {}", copy.display()))?;
    let to = folder.join(FILE_NAME);
    fs::rename(&database, &to).with_context(|| format!("cannot write {}", to.display()))?;
    let synced = File::open(folder).and_then(|folder| folder.sync_all());
    synced.context(
        "the database is in place but may not last: remove the folder's contents and restore again",
    )?;
    Ok(restored)
}

/// A file or folder in `folder`, if there is any. What file systems put there themselves is none.
fn any_entry(folder: &Path) -> anyhow::Result<Option<String>> {
    let entries =
        fs::read_dir(folder).with_context(|| format!("cannot read {}", folder.display()))?;
    for entry in entries {
        let name = entry?.file_name().to_string_lossy().into_owned();
        if name != "lost+found" {
            return Ok(Some(name));
        }
    }
    Ok(None)
}

fn remove_unfinished(folder: &Path) -> anyhow::Result<()> {
    for name in [COPY_NAME, RESTORED_NAME] {
        for suffix in ["", "-journal", "-wal", "-shm"] {
            let path = folder.join(format!("{name}{suffix}"));
            match fs::remove_file(&path) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    return Err(error).with_context(|| format!("cannot remove {}", path.display()));
                }
                _ => {}
            }
        }
    }
    Ok(())
}
