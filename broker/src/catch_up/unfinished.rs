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

    pub fn put(&self, group: RaftGroupId, installer: Arc<Installer>) {
        let until = Instant::now() + KEPT_FOR;
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
    pub fn renew(&self, group: RaftGroupId) {
        if let Some(kept) = self.lock().get_mut(&group) {
            kept.until = Instant::now() + KEPT_FOR;
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
