//! The high watermark of a partition, and those who wait for it to move.
//!
//! Invariant: the value never falls. A waiter that registered before it read the value is woken by
//! every later advance, so no long poll needs to look twice by the clock.

use std::collections::HashMap;
use std::sync::atomic::{AtomicI64, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use chronik_types::offset::Offset;
use tokio::sync::Notify;

/// The high watermark of one partition.
#[derive(Debug, Default)]
pub struct Watermark {
    value: AtomicI64,
    waiter_count: AtomicUsize,
    next_waiter: AtomicU64,
    waiters: Mutex<HashMap<u64, Arc<Notify>>>,
}

impl Watermark {
    pub fn get(&self) -> Offset {
        Offset(self.value.load(Ordering::SeqCst))
    }

    /// Moves the watermark up and wakes the waiters; a lower value changes nothing.
    pub fn advance(&self, to: Offset) {
        if self.value.fetch_max(to.0, Ordering::SeqCst) < to.0 {
            self.wake_all();
        }
    }

    /// Wakes the waiters without a change of the value: leadership moved, they should look again.
    pub fn wake_all(&self) {
        // Registering raises the count before the waiter reads the value, and the value is stored
        // before the count is read here: one of the two sees the other.
        if self.waiter_count.load(Ordering::SeqCst) > 0 {
            for waiter in self.waiters().values() {
                waiter.notify_one();
            }
        }
    }

    /// `waiter` is notified at every advance until the registration is dropped. One waiter may be
    /// registered with many partitions.
    pub fn register(self: &Arc<Self>, waiter: Arc<Notify>) -> Registration {
        let id = self.next_waiter.fetch_add(1, Ordering::Relaxed);
        let mut waiters = self.waiters();
        waiters.insert(id, waiter);
        self.waiter_count.store(waiters.len(), Ordering::SeqCst);
        drop(waiters);
        Registration {
            watermark: self.clone(),
            id,
        }
    }

    fn waiters(&self) -> MutexGuard<'_, HashMap<u64, Arc<Notify>>> {
        self.waiters.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Keeps a waiter registered; owned by the long poll.
#[derive(Debug)]
pub struct Registration {
    watermark: Arc<Watermark>,
    id: u64,
}

impl Drop for Registration {
    fn drop(&mut self) {
        let mut waiters = self.watermark.waiters();
        waiters.remove(&self.id);
        self.watermark
            .waiter_count
            .store(waiters.len(), Ordering::SeqCst);
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn the_watermark_never_falls() {
        let watermark = Watermark::default();
        watermark.advance(Offset(5));
        watermark.advance(Offset(3));
        assert_eq!(watermark.get(), Offset(5));
    }

    #[tokio::test]
    async fn one_waiter_hears_of_any_of_its_partitions_and_leaves_nothing_behind() {
        let (a, b) = (
            Arc::new(Watermark::default()),
            Arc::new(Watermark::default()),
        );
        let notify = Arc::new(Notify::new());
        let registrations = [a.register(notify.clone()), b.register(notify.clone())];
        b.advance(Offset(1));
        let woken = tokio::time::timeout(Duration::from_secs(5), notify.notified()).await;
        assert!(woken.is_ok());
        drop(registrations);
        assert_eq!((a.waiters().len(), b.waiters().len()), (0, 0));
    }
}
