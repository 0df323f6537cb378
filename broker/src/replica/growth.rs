//! Tells one who waits for it that the log has grown: so a log that does not grow need not be looked at.
//!
//! Invariant: the first append after each `watch` is told; every other one costs a look at a flag.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};

use chronik_types::id::RaftGroupId;
use tokio::sync::mpsc;

/// Who is told; at most one for the life of the replica.
#[derive(Debug, Default)]
pub struct Growth {
    is_watched: AtomicBool,
    watcher: OnceLock<mpsc::UnboundedSender<RaftGroupId>>,
}

impl Growth {
    /// The next append is told. To be called before the log end is read that the watcher goes by.
    pub fn watch(&self, watcher: &mpsc::UnboundedSender<RaftGroupId>) {
        self.watcher.get_or_init(|| watcher.clone());
        self.is_watched.store(true, Ordering::SeqCst);
    }

    /// The group's log has got entries.
    pub fn grew(&self, group: RaftGroupId) {
        if self.is_watched.load(Ordering::SeqCst)
            && self.is_watched.swap(false, Ordering::SeqCst)
            && let Some(watcher) = self.watcher.get()
        {
            // The watcher ends before the replicas do. What waits for it is bounded by their number.
            let _ = watcher.send(group);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn growth_is_told_once_per_watch() {
        let (sender, mut receiver) = mpsc::unbounded_channel();
        let growth = Growth::default();
        let group = RaftGroupId(7);
        growth.grew(group);
        growth.watch(&sender);
        assert!(receiver.try_recv().is_err());
        growth.grew(group);
        growth.grew(group);
        assert_eq!(receiver.try_recv().ok(), Some(group));
        assert!(receiver.try_recv().is_err());
        growth.watch(&sender);
        growth.grew(group);
        assert_eq!(receiver.try_recv().ok(), Some(group));
    }
}
