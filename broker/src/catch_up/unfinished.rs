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

/// A leader asks again within a second, and is heard after the longest pause.
const KEPT_FOR: Duration = RETRY_DELAY_MAX.saturating_mul(4);

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

    /// What the last attempt has left, unless a write of it is still under way.
    pub fn take(&self, group: RaftGroupId) -> Option<Installer> {
        let kept = self.lock().remove(&group)?;
        Arc::into_inner(kept.installer)
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
