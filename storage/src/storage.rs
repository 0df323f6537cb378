//! The storage of one broker: opens, recovers, closes, and owns the two threads.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU32};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use chronik_types::id::RaftGroupId;
use uuid::Uuid;

use crate::core::{Core, Evictable, Logs};
use crate::counters::{Counters, StorageStats};
use crate::disk::{Disk, LockGuard};
use crate::driver::Driver;
use crate::error::{Damage, OpenError, StorageError};
use crate::flusher::{Flusher, Signals};
use crate::memory::{Memory, size_of};
use crate::partition_log::{DamageChanges, FLUSH_FROM_BYTES, Log, PartitionLog};
use crate::poison::{Failed, Poison};
use crate::recovery;
use crate::scrub::{Scrub, Stop};
use crate::segment::open_files::OpenFiles;
use crate::space::SpaceWatch;
use crate::sync::lock;
use crate::transfer::Unfinished;
use crate::wal::writer::WalWriter;
use crate::wal::{WalFiles, WalProgress, WalQueue};

/// Settings of the storage.
#[derive(Debug, Clone)]
pub struct StorageConfig {
    /// Folder that belongs to this storage alone.
    pub dir: PathBuf,
    /// Size of one WAL file.
    pub wal_file_size_bytes: u64,
    /// How many WAL files may be in use before the older half is emptied.
    pub wal_files_max: usize,
    /// Budget for entries in memory, over all partitions. Data that waits for its commit is refused
    /// beyond it.
    pub memory_max_bytes: usize,
    /// A segment is sealed when it has grown to this size. At most 2 GiB.
    pub segment_bytes: u64,
    /// How many segment files may be open at a time.
    pub open_files_max: usize,
    /// Records are refused when the disk has less room than this. `None`: a twentieth of the disk,
    /// between 1 and 4 GiB, but at most a tenth of it.
    pub reserve_bytes: Option<u64>,
    /// How fast sealed segments are looked through for bit rot; 0: not at all.
    pub scrub_bytes_per_second: u64,
    /// How often all of them are, if that is fast enough.
    pub scrub_interval: Duration,
}

impl Default for StorageConfig {
    fn default() -> Self {
        StorageConfig {
            dir: PathBuf::from("data"),
            wal_file_size_bytes: 64 << 20,
            wal_files_max: 4,
            memory_max_bytes: 256 << 20,
            segment_bytes: 1 << 30,
            open_files_max: 1024,
            reserve_bytes: None,
            scrub_bytes_per_second: 1 << 20,
            scrub_interval: Duration::from_secs(24 * 60 * 60),
        }
    }
}

impl StorageConfig {
    fn validate(&self) -> Result<(), OpenError> {
        let check = |name, value: u64, is_valid: bool, why| {
            if is_valid {
                Ok(())
            } else {
                Err(OpenError::InvalidConfig { name, value, why })
            }
        };
        let files = self.wal_files_max as u64;
        check("wal-files-max", files, files >= 1, "at least 1 is needed")?;
        let size = self.wal_file_size_bytes;
        check(
            "wal-file-size-bytes",
            size,
            size >= 4096,
            "at least 4096 are needed",
        )?;
        check(
            "segment-bytes",
            self.segment_bytes,
            self.segment_bytes > 0,
            "0 makes no sense",
        )
    }
}

/// All logs of one broker. Cheap to clone. When the last clone is dropped without `close`, the
/// threads end and nothing more is flushed: as after a crash, all that is durable is found again.
#[derive(Clone)]
pub struct Storage {
    owner: Arc<Owner>,
}

struct Owner {
    core: Arc<Core>,
    logs: Arc<Logs>,
    wal_files: Arc<WalFiles>,
    storage_id: Uuid,
    stop_scrub: Arc<Stop>,
    /// The scrub if there is one, the WAL thread, then the flusher.
    threads: Mutex<Vec<JoinHandle<()>>>,
    /// Released when all threads have ended.
    lock: Mutex<Option<LockGuard>>,
}

impl Storage {
    /// Opens or creates the storage in `config.dir`, and recovers all logs.
    pub fn open(config: StorageConfig, disk: Arc<dyn Disk>) -> Result<Storage, OpenError> {
        let (bytes_per_second, interval) = (config.scrub_bytes_per_second, config.scrub_interval);
        let (owner, writer, flusher) = Owner::open(config, disk, false)?;
        if bytes_per_second > 0 {
            let scrub = Scrub {
                core: owner.core.clone(),
                logs: owner.logs.clone(),
                stop: owner.stop_scrub.clone(),
                bytes_per_second,
                interval,
            };
            owner.start("scrub", move || scrub.run())?;
        }
        owner.start("wal", move || writer.run())?;
        owner.start("flusher", move || flusher.run())?;
        Ok(Storage {
            owner: Arc::new(owner),
        })
    }

    /// As `open`, but without threads: their work is done by the driver, step by step, as a
    /// simulation wants it. Nothing becomes durable otherwise. `close` and `delete_log` would wait
    /// for ever; the driver has its own.
    pub fn open_driven(
        config: StorageConfig,
        disk: Arc<dyn Disk>,
    ) -> Result<(Storage, Driver), OpenError> {
        let (owner, writer, flusher) = Owner::open(config, disk, true)?;
        let storage = Storage {
            owner: Arc::new(owner),
        };
        Ok((storage, Driver::new(writer, flusher)))
    }

    pub(crate) fn core(&self) -> &Core {
        &self.owner.core
    }

    /// Made when the folder was first used.
    pub fn storage_id(&self) -> Uuid {
        self.owner.storage_id
    }

    /// The logs that exist.
    pub fn group_ids(&self) -> Vec<RaftGroupId> {
        self.owner.logs.group_ids()
    }

    /// The group's log, made if new; the same one for every caller.
    pub fn open_log(&self, group: RaftGroupId) -> Result<PartitionLog, StorageError> {
        self.owner.core.poison.check()?;
        let log = self.owner.logs.get_or_make(group, &self.owner.core);
        if log.lock().is_deleted {
            return Err(StorageError::Deleted(group));
        }
        Ok(PartitionLog::new(log))
    }

    /// Deletes the log; it stays deleted after a restart. Blocks on the disk. A log that is opened
    /// for the same group later is a new one.
    pub fn delete_log(&self, group: RaftGroupId) -> Result<(), StorageError> {
        self.owner.core.poison.check()?;
        self.owner.core.signals.delete(group)
    }

    /// Resolves when a write or fsync has failed: the process must stop.
    pub fn failed(&self) -> Failed {
        Failed {
            poison: self.owner.core.poison.clone(),
        }
    }

    /// The disk has no room for new records. Passes by itself when there is room again.
    pub fn is_full(&self) -> bool {
        self.owner.core.space.found().is_full
    }

    /// Whether the WAL gets on, to be compared with what it was a while ago.
    pub fn wal_progress(&self) -> WalProgress {
        self.owner.core.wal.progress()
    }

    /// The first damage that was found of each log that has any; such a log is to be rebuilt from
    /// its peers.
    pub fn damaged(&self) -> Vec<Damage> {
        let logs = self.owner.logs.all().into_iter();
        logs.filter_map(|log| log.lock().damage().cloned())
            .collect()
    }

    /// Tells when damage is found, or is gone.
    pub fn damage_changes(&self) -> DamageChanges {
        DamageChanges::new(self.owner.core.damage.clone())
    }

    /// For metrics.
    pub fn stats(&self) -> StorageStats {
        let core = &self.owner.core;
        let space = core.space.found();
        StorageStats {
            available_bytes: space.available_bytes,
            total_bytes: space.total_bytes,
            reserve_bytes: space.reserve_bytes,
            is_full: space.is_full,
            wal_files: self.owner.wal_files.live_count() as u64,
            damaged_logs: self.damaged().len() as u64,
            ..StorageStats::of(&core.counters)
        }
    }

    /// Bytes of entries in memory, those that are in segments too included.
    pub fn memory_bytes(&self) -> usize {
        self.owner.core.memory.total()
    }

    /// Flushes everything and ends the threads; a restart then replays next to nothing. Blocks on
    /// the disk. Later calls fail with `Closed`.
    pub fn close(&self) -> Result<(), StorageError> {
        self.owner.core.wal.close();
        let result = self.owner.core.signals.close();
        self.owner.stop();
        result
    }
}

impl Owner {
    /// Opens the storage; nothing runs yet.
    fn open(
        config: StorageConfig,
        disk: Arc<dyn Disk>,
        is_driven: bool,
    ) -> Result<(Owner, WalWriter, Flusher), OpenError> {
        config.validate()?;
        let dir = config.dir.clone();
        let (wal_dir, partitions) = (dir.join("wal"), dir.join("partitions"));
        let guard = take_folder(&*disk, &dir, &[&wal_dir, &partitions])?;
        let checkpoint = recovery::open_checkpoint(&*disk, &dir, &wal_dir, &partitions)?;
        let storage_id = checkpoint.storage_id;
        let wal_files = Arc::new(WalFiles::new(
            disk.clone(),
            wal_dir,
            config.wal_file_size_bytes,
        ));
        let recovered = recovery::recover(
            &disk,
            &wal_files,
            &partitions,
            checkpoint,
            config.segment_bytes,
        )?;

        let first_generation = recovered.first_generation();
        let poison = Arc::new(Poison::default());
        let core = Arc::new(Core {
            files: OpenFiles::new(disk.clone(), partitions, config.open_files_max),
            wal: Arc::new(WalQueue::new(poison.clone())),
            memory: Memory::new(config.memory_max_bytes),
            signals: Signals::default(),
            evictable: Evictable::default(),
            poison: poison.clone(),
            space: SpaceWatch::new(disk.clone(), dir, config.reserve_bytes),
            counters: Counters::default(),
            damage: Arc::default(),
            has_announced_files: AtomicBool::new(false),
            first_generation: AtomicU32::new(first_generation),
            unfinished: Unfinished::new(recovered.unfinished),
            segment_bytes: config.segment_bytes,
            is_driven,
        });
        let logs: HashMap<_, _> = recovered
            .logs
            .into_iter()
            .map(|(group, state)| (group, Arc::new(Log::recovered(core.clone(), group, state))))
            .collect();
        logs.values().for_each(|log| account(&core, log));
        if logs.values().any(|log| log.lock().damage().is_some()) {
            core.damage.tell();
        }

        let mut writer = WalWriter::new(
            wal_files.clone(),
            core.wal.clone(),
            poison,
            storage_id,
            recovered.position,
            when_new_file(&core, &wal_files, config.wal_files_max),
        );
        writer.open_first()?;
        let logs = Arc::new(Logs::new(logs, recovered.deleted_at));
        let flusher = Flusher {
            core: core.clone(),
            logs: logs.clone(),
            wal_files,
            disk,
            dir: config.dir.clone(),
            storage_id,
            wal_files_max: config.wal_files_max,
            driven_wal: None,
            relocated_bytes: 0,
        };
        let owner = Owner {
            core,
            logs,
            wal_files: flusher.wal_files.clone(),
            stop_scrub: Arc::default(),
            storage_id,
            threads: Mutex::default(),
            lock: Mutex::new(Some(guard)),
        };
        Ok((owner, writer, flusher))
    }

    fn start(
        &self,
        name: &'static str,
        run: impl FnOnce() + Send + 'static,
    ) -> Result<(), OpenError> {
        let thread = thread::Builder::new().name(name.to_owned()).spawn(run);
        let thread = thread.map_err(|source| OpenError::Io {
            operation: "cannot start the thread",
            file: name.into(),
            source,
        })?;
        lock(&self.threads).push(thread);
        Ok(())
    }

    fn stop(&self) {
        self.stop_scrub.set();
        self.core.wal.close();
        self.core.signals.stop();
        let threads = std::mem::take(&mut *lock(&self.threads));
        // The last handle may be dropped by a callback, and so on the WAL thread itself, which the
        // flusher may be waiting for.
        let is_own = threads
            .iter()
            .any(|thread| thread.thread().id() == thread::current().id());
        if is_own {
            self.core.wal.finish();
            return;
        }
        // The flusher first: what it is doing may need the WAL.
        for thread in threads.into_iter().rev() {
            if thread.join().is_err() {
                tracing::error!("a storage thread panicked");
            }
            self.core.wal.finish();
        }
        lock(&self.lock).take();
    }
}

impl Drop for Owner {
    fn drop(&mut self) {
        self.stop();
    }
}

/// Makes the folder and those in it, and locks it.
fn take_folder(disk: &dyn Disk, dir: &Path, subs: &[&Path]) -> Result<LockGuard, OpenError> {
    let failed = |source| OpenError::Io {
        operation: "cannot use",
        file: dir.to_owned(),
        source,
    };
    disk.create_dir_all(dir).map_err(failed)?;
    let guard = disk.lock(&dir.join("lock")).map_err(failed)?;
    let guard = guard.ok_or_else(|| OpenError::Locked {
        dir: dir.to_owned(),
    })?;
    subs.iter()
        .try_for_each(|sub| disk.create_dir_all(sub))
        .map_err(failed)?;
    disk.sync_dir(dir).map_err(failed)?;
    Ok(guard)
}

/// What the WAL thread does when the log goes on in another file.
fn when_new_file(core: &Arc<Core>, files: &Arc<WalFiles>, max: usize) -> Box<dyn Fn() + Send> {
    let (core, files) = (core.clone(), files.clone());
    Box::new(move || {
        if files.live_count() > max {
            core.signals.recycle_wal();
        } else if files.wants_spare() {
            core.signals.prepare_spare();
        }
    })
}

/// Counts a recovered log's memory, and has it flushed if there is enough.
fn account(core: &Arc<Core>, log: &Arc<Log>) {
    let mut state = log.lock();
    core.memory
        .add(state.tail.iter().map(|entry| size_of(&entry.entry)).sum());
    core.memory.make_ready(state.ready_bytes);
    if state.ready_bytes >= FLUSH_FROM_BYTES {
        state.is_flush_queued = true;
        core.signals.flush(log.clone());
    }
}
