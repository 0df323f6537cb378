//! Whether there is room on the disk for new records.
//!
//! Invariant: records are refused while there is still room for all that must be written whether there
//! is room or not: entries in memory on their way to segments, checkpoints, and the WAL's next files.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use crate::disk::Disk;
use crate::error::StorageError;

/// How often the disk is asked, at most.
const LOOK_INTERVAL: Duration = Duration::from_millis(100);
/// How long a disk counts as full after a write has failed for lack of room.
const AFTER_FAILURE: Duration = Duration::from_secs(1);
const RESERVE_MIN_BYTES: u64 = 1 << 30;
const RESERVE_MAX_BYTES: u64 = 4 << 30;
/// A full disk takes records again when this much more than the reserve is free, or a sixteenth of the
/// reserve if that is less.
const RECOVERY_MAX_BYTES: u64 = 256 << 20;

/// Knows how full the disk is; asks it only when somebody wants to know.
pub struct SpaceWatch {
    disk: Arc<dyn Disk>,
    dir: PathBuf,
    reserve_setting: Option<u64>,
    started: Instant,
    /// When to ask the disk next, in milliseconds since `started`.
    next_look_ms: AtomicU64,
    is_full: AtomicBool,
    /// A write failed for lack of room, and the disk was not asked since.
    has_no_room: AtomicBool,
    available_bytes: AtomicU64,
    total_bytes: AtomicU64,
    reserve_bytes: AtomicU64,
    /// Bytes of records that came since the disk was asked.
    unseen_bytes: AtomicU64,
    /// Of them, what was let into the reserve.
    followed_bytes: AtomicU64,
}

/// What was found when the disk was last asked.
#[derive(Debug, Clone, Copy)]
pub struct Found {
    pub is_full: bool,
    pub available_bytes: u64,
    pub total_bytes: u64,
    pub reserve_bytes: u64,
}

impl SpaceWatch {
    pub fn new(disk: Arc<dyn Disk>, dir: PathBuf, reserve_setting: Option<u64>) -> Self {
        SpaceWatch {
            disk,
            dir,
            reserve_setting,
            started: Instant::now(),
            next_look_ms: AtomicU64::new(0),
            is_full: AtomicBool::new(false),
            has_no_room: AtomicBool::new(false),
            available_bytes: AtomicU64::new(u64::MAX),
            total_bytes: AtomicU64::new(u64::MAX),
            reserve_bytes: AtomicU64::new(0),
            unseen_bytes: AtomicU64::new(0),
            followed_bytes: AtomicU64::new(0),
        }
    }

    /// Refuses so many bytes of new records while the disk is full.
    pub fn check(&self, new_bytes: usize) -> Result<(), StorageError> {
        // However fast they come, little of the reserve is used before the disk is asked again.
        let before = self
            .unseen_bytes
            .fetch_add(new_bytes as u64, Ordering::AcqRel);
        let share = self.reserve_bytes.load(Ordering::Relaxed) / 16;
        if before.saturating_add(new_bytes as u64) > share && !self.is_full.load(Ordering::Acquire)
        {
            self.next_look_ms.store(0, Ordering::Release);
        }
        let found = self.found();
        match found.is_full {
            false => Ok(()),
            true => Err(StorageError::Full {
                available_bytes: found.available_bytes,
                reserve_bytes: found.reserve_bytes,
            }),
        }
    }

    /// The same once half of the reserve is gone: what others have taken already is not to wait before that.
    pub fn check_reserve(&self, new_bytes: usize) -> Result<(), StorageError> {
        if self.check(new_bytes).is_ok() {
            return Ok(());
        }
        let found = self.found();
        let reserve_bytes = found.reserve_bytes / 2;
        let new_bytes = new_bytes as u64;
        let taken = self.followed_bytes.load(Ordering::Acquire);
        let left = found
            .available_bytes
            .saturating_sub(taken.saturating_add(new_bytes));
        if self.has_no_room.load(Ordering::Acquire) || left < reserve_bytes {
            return Err(StorageError::Full {
                available_bytes: found.available_bytes,
                reserve_bytes,
            });
        }
        self.followed_bytes.fetch_add(new_bytes, Ordering::AcqRel);
        Ok(())
    }

    pub fn found(&self) -> Found {
        let now = self.now_ms();
        let due = self.next_look_ms.load(Ordering::Acquire);
        let next = now.saturating_add(LOOK_INTERVAL.as_millis() as u64);
        // One of those who ask at the same time looks, the others take what is known.
        let is_mine = now >= due
            && self
                .next_look_ms
                .compare_exchange(due, next, Ordering::AcqRel, Ordering::Acquire)
                .is_ok();
        if is_mine {
            self.look();
        }
        Found {
            is_full: self.is_full.load(Ordering::Acquire),
            available_bytes: self.available_bytes.load(Ordering::Relaxed),
            total_bytes: self.total_bytes.load(Ordering::Relaxed),
            reserve_bytes: self.reserve_bytes.load(Ordering::Relaxed),
        }
    }

    /// A write found no room, whatever the disk says of itself.
    pub fn found_no_room(&self) {
        self.look();
        let until = self
            .now_ms()
            .saturating_add(AFTER_FAILURE.as_millis() as u64);
        self.next_look_ms.store(until, Ordering::Release);
        self.has_no_room.store(true, Ordering::Release);
        self.set_full(true);
    }

    fn now_ms(&self) -> u64 {
        u64::try_from(self.started.elapsed().as_millis()).unwrap_or(u64::MAX)
    }

    fn look(&self) {
        self.unseen_bytes.store(0, Ordering::Release);
        self.followed_bytes.store(0, Ordering::Release);
        self.has_no_room.store(false, Ordering::Release);
        let space = match self.disk.space(&self.dir) {
            Ok(space) => space,
            Err(error) => {
                tracing::warn!(%error, "cannot find out how full the disk is");
                return;
            }
        };
        let reserve = reserve_of(space.total_bytes, self.reserve_setting);
        self.available_bytes
            .store(space.available_bytes, Ordering::Relaxed);
        self.total_bytes.store(space.total_bytes, Ordering::Relaxed);
        self.reserve_bytes.store(reserve, Ordering::Relaxed);
        // Once full it must get a little better than that, or it would change all the time.
        let needed = match self.is_full.load(Ordering::Acquire) {
            true => reserve.saturating_add(recovery_of(reserve)),
            false => reserve,
        };
        self.set_full(space.available_bytes < needed);
    }

    fn set_full(&self, is_full: bool) {
        if self.is_full.swap(is_full, Ordering::AcqRel) != is_full {
            let available_bytes = self.available_bytes.load(Ordering::Relaxed);
            let reserve_bytes = self.reserve_bytes.load(Ordering::Relaxed);
            match is_full {
                true => tracing::error!(
                    available_bytes,
                    reserve_bytes,
                    "the disk is full: records are refused until there is room"
                ),
                false => tracing::info!(available_bytes, "there is room on the disk again"),
            }
        }
    }
}

/// How much of a disk is kept free. By default a twentieth, between 1 and 4 GiB, but at most a tenth.
fn reserve_of(total_bytes: u64, setting: Option<u64>) -> u64 {
    setting.unwrap_or_else(|| {
        let share = (total_bytes / 20).clamp(RESERVE_MIN_BYTES, RESERVE_MAX_BYTES);
        share.min(total_bytes / 10)
    })
}

/// How much more than its reserve a disk has free before it takes records again.
fn recovery_of(reserve_bytes: u64) -> u64 {
    (reserve_bytes / 16).min(RECOVERY_MAX_BYTES)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_reserve_fits_the_disk() {
        let gib = 1u64 << 30;
        for (total, expected) in [
            (0, 0),
            (gib, gib / 10),
            (20 * gib, gib),
            (60 * gib, 3 * gib),
            (1000 * gib, 4 * gib),
            (u64::MAX, 4 * gib),
        ] {
            assert_eq!(reserve_of(total, None), expected, "{total}");
        }
        assert_eq!(reserve_of(gib, Some(7)), 7);
        // However large the reserve is said to be, a disk does not have to be emptied first.
        for (reserve, expected) in [(0, 0), (gib, gib / 16), (100 * gib, gib / 4)] {
            assert_eq!(recovery_of(reserve), expected, "{reserve}");
        }
    }
}
