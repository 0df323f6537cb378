//! Who may use the machine: tests run side by side, but one that measures runs alone.

use std::sync::{PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

static MACHINE: RwLock<()> = RwLock::new(());

/// Held by a test as long as it runs a cluster.
#[must_use]
pub enum Turn {
    Shared(RwLockReadGuard<'static, ()>),
    Alone(RwLockWriteGuard<'static, ()>),
}

impl Turn {
    pub fn shared() -> Self {
        // A test that failed poisons the lock; that says nothing about the machine.
        Self::Shared(MACHINE.read().unwrap_or_else(PoisonError::into_inner))
    }

    pub fn alone() -> Self {
        Self::Alone(MACHINE.write().unwrap_or_else(PoisonError::into_inner))
    }
}
