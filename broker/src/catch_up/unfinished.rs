//! Copies that were broken off, for the next attempt to go on with: another replica may lead by then.
//!
//! Invariant: each is kept for a bounded time, and its files go with it.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use chronik_storage::Installer;
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
    installer: Arc<Installer>,
}

/// By group.
#[derive(Default)]
pub struct Unfinished(Mutex<HashMap<RaftGroupId, Kept>>);

impl Unfinished {
    fn lock(&self) -> MutexGuard<'_, HashMap<RaftGroupId, Kept>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn put(&self, group: RaftGroupId, installer: Arc<Installer>, now: Instant) {
        let until = now + KEPT_FOR;
        self.lock().insert(group, Kept { until, installer });
    }

    /// What the last attempt has left, if anything.
    pub fn take(&self, group: RaftGroupId) -> Result<Option<Installer>, StillBusy> {
        let mut all = self.lock();
        let Some(kept) = all.remove(&group) else {
            return Ok(None);
        };
        match Arc::try_unwrap(kept.installer) {
            Ok(installer) => Ok(Some(installer)),
            Err(installer) => {
                all.insert(group, Kept { installer, ..kept });
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

    /// Those that nobody has come back for. Dropping them removes files.
    pub fn take_expired(&self, now: Instant) -> Vec<Arc<Installer>> {
        self.lock()
            .extract_if(|_, kept| kept.until <= now)
            .map(|(_, kept)| kept.installer)
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use chronik_storage::disk::FaultyDisk;
    use chronik_storage::{LogManifest, Storage, StorageConfig, TermStart};
    use chronik_types::offset::Offset;

    use super::*;

    const GROUP: RaftGroupId = RaftGroupId(1);

    /// A copy of a log with one entry and no records.
    fn installer() -> Installer {
        let config = StorageConfig {
            dir: PathBuf::from("/data"),
            ..StorageConfig::default()
        };
        let storage = Storage::open(config, Arc::new(FaultyDisk::new())).unwrap();
        let term_start = TermStart {
            term: 1,
            first_index: 0,
            first_offset: Offset::ZERO,
        };
        let manifest = LogManifest {
            log_start_offset: Offset::ZERO,
            next_offset: Offset::ZERO,
            last_index: 0,
            last_term: 1,
            term_starts: vec![term_start],
            cleaned_offset: Offset::ZERO,
            segments: Vec::new(),
        };
        storage.install(GROUP, manifest).unwrap()
    }

    #[test]
    fn a_copy_is_kept_while_somebody_asks_and_let_go_later() {
        let unfinished = Unfinished::default();
        let mut now = Instant::now();
        assert!(unfinished.take(GROUP).unwrap().is_none());
        let written = Arc::new(installer());
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
