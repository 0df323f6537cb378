//! Copies that were broken off, for the next attempt to go on with: another replica may lead by then,
//! or this broker has been started anew.
//!
//! Invariant: each is kept for a bounded time, and its files go with it.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use chronik_storage::{Installer, Storage};
use chronik_types::id::RaftGroupId;
use tokio::time::Instant;

use super::RETRY_DELAY_MAX;

/// After the last word of a leader, which asks again every second. It takes a while until there is one.
const KEPT_FOR: Duration = RETRY_DELAY_MAX.saturating_mul(4);

/// A write of the last attempt is still under way.
#[derive(Debug, thiserror::Error)]
#[error("the attempt before is still writing")]
pub struct StillBusy;

struct Kept {
    until: Instant,
    copy: BrokenOff,
}

enum BrokenOff {
    /// In this process.
    Here(Arc<Installer>),
    /// In the one before: the storage has it, and an install goes on with it by itself.
    Before,
}

/// By group.
pub struct Unfinished(Mutex<HashMap<RaftGroupId, Kept>>);

impl Unfinished {
    /// With what the process before has left.
    pub fn new(storage: &Storage, now: Instant) -> Self {
        let until = now + KEPT_FOR;
        let kept = |group| {
            let copy = BrokenOff::Before;
            (group, Kept { until, copy })
        };
        let groups = storage.unfinished_copies().into_iter();
        Unfinished(Mutex::new(groups.map(kept).collect()))
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<RaftGroupId, Kept>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn put(&self, group: RaftGroupId, installer: Arc<Installer>, now: Instant) {
        let until = now + KEPT_FOR;
        let copy = BrokenOff::Here(installer);
        self.lock().insert(group, Kept { until, copy });
    }

    /// What the last attempt of this process has left, if anything.
    pub fn take(&self, group: RaftGroupId) -> Result<Option<Installer>, StillBusy> {
        let mut all = self.lock();
        let Some(Kept { until, copy }) = all.remove(&group) else {
            return Ok(None);
        };
        let BrokenOff::Here(installer) = copy else {
            return Ok(None);
        };
        match Arc::try_unwrap(installer) {
            Ok(installer) => Ok(Some(installer)),
            Err(installer) => {
                let copy = BrokenOff::Here(installer);
                all.insert(group, Kept { until, copy });
                Err(StillBusy)
            }
        }
    }

    /// Somebody is still there to go on with it, though not now.
    pub fn renew(&self, group: RaftGroupId, now: Instant) {
        if let Some(kept) = self.lock().get_mut(&group) {
            kept.until = now + KEPT_FOR;
        }
    }

    /// When the next one is to be let go.
    pub fn expires_at(&self) -> Option<Instant> {
        self.lock().values().map(|kept| kept.until).min()
    }

    /// Those that nobody has come back for.
    pub fn take_expired(&self, now: Instant) -> Vec<Expired> {
        self.lock()
            .extract_if(|_, kept| kept.until <= now)
            .map(|(group, kept)| Expired(group, kept.copy))
            .collect()
    }
}

/// A copy that nobody has come back for.
pub struct Expired(RaftGroupId, BrokenOff);

impl Expired {
    /// Removes its files. Waits for the disk.
    pub fn remove(self, storage: &Storage) {
        match self.1 {
            BrokenOff::Here(installer) => drop(installer),
            BrokenOff::Before => storage.forget_unfinished_copy(self.0),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use chronik_storage::disk::FaultyDisk;
    use chronik_storage::{LogManifest, ManifestSegment, SegmentFile, StorageConfig, TermStart};
    use chronik_types::offset::Offset;

    use super::*;

    const GROUP: RaftGroupId = RaftGroupId(1);

    fn open(disk: FaultyDisk) -> Storage {
        let config = StorageConfig {
            dir: PathBuf::from("/data"),
            ..StorageConfig::default()
        };
        Storage::open(config, Arc::new(disk)).unwrap()
    }

    /// A copy of a log with one entry, of which one byte has come.
    fn installer(storage: &Storage) -> Installer {
        let segment = ManifestSegment {
            base_offset: Offset::ZERO,
            next_offset: Offset(1),
            first_index: 0,
            next_index: 1,
            log_bytes: 100,
            sidecar_bytes: 0,
            is_compacted: false,
            created_ms: 0,
            appended_ms: 0,
        };
        let term_start = TermStart {
            term: 1,
            first_index: 0,
            first_offset: Offset::ZERO,
        };
        let manifest = LogManifest {
            log_start_offset: Offset::ZERO,
            next_offset: Offset(1),
            last_index: 0,
            last_term: 1,
            term_starts: vec![term_start],
            cleaned_offset: Offset::ZERO,
            segments: vec![segment],
        };
        let installer = storage.install(GROUP, manifest).unwrap();
        installer.write(0, SegmentFile::Log, 0, b"x").unwrap();
        installer
    }

    #[test]
    fn a_copy_of_the_process_before_is_kept_while_somebody_asks_and_let_go_later() {
        let disk = FaultyDisk::new();
        let installer = installer(&open(disk.clone()));
        let storage = open(disk.copy());
        drop(installer);
        let mut now = Instant::now();
        let unfinished = Unfinished::new(&storage, now);
        now += KEPT_FOR / 2;
        unfinished.renew(GROUP, now);
        now += KEPT_FOR / 2;
        assert!(unfinished.take_expired(now).is_empty());
        // The storage gives it to who installs.
        assert!(unfinished.take(GROUP).unwrap().is_none());
        assert_eq!(unfinished.expires_at(), None);
        assert_eq!(storage.unfinished_copies(), [GROUP]);
        let unfinished = Unfinished::new(&storage, now);
        now += KEPT_FOR;
        let expired = unfinished.take_expired(now);
        assert_eq!(expired.len(), 1);
        expired.into_iter().for_each(|copy| copy.remove(&storage));
        assert!(storage.unfinished_copies().is_empty());
    }

    #[test]
    fn a_copy_is_kept_while_somebody_asks_and_let_go_later() {
        let storage = open(FaultyDisk::new());
        let mut now = Instant::now();
        let unfinished = Unfinished::new(&storage, now);
        assert!(unfinished.take(GROUP).unwrap().is_none());
        let written = Arc::new(installer(&storage));
        unfinished.put(GROUP, written.clone(), now);
        // Two attempts never write at once.
        assert!(unfinished.take(GROUP).is_err());
        drop(written);
        now += KEPT_FOR / 2;
        unfinished.renew(GROUP, now);
        now += KEPT_FOR / 2;
        assert!(unfinished.take_expired(now).is_empty());
        assert_eq!(unfinished.expires_at(), Some(now + KEPT_FOR / 2));
        let taken = unfinished.take(GROUP).unwrap().unwrap();
        assert_eq!(unfinished.expires_at(), None);
        unfinished.put(GROUP, Arc::new(taken), now);
        now += KEPT_FOR;
        assert_eq!(unfinished.take_expired(now).len(), 1);
        assert!(unfinished.take(GROUP).unwrap().is_none());
    }
}
