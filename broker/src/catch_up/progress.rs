//! How much has come of the copies that this broker takes, for who tells the controllers.
//!
//! Invariant: a copy is listed from its first byte until it is complete or given up, and nobody but its
//! own task holds it afterwards.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use chronik_proto::v1;
use chronik_storage::Installer;
use chronik_types::id::RaftGroupId;
use tokio::sync::watch;

/// The copies under way. Clones are the same list.
#[derive(Clone)]
pub struct Copies {
    listed: Arc<Mutex<BTreeMap<RaftGroupId, Weak<Installer>>>>,
    count: watch::Sender<usize>,
}

/// Keeps a copy listed.
pub(super) struct Listed {
    copies: Copies,
    group: RaftGroupId,
}

impl Default for Copies {
    fn default() -> Self {
        Copies {
            listed: Arc::default(),
            count: watch::Sender::new(0),
        }
    }
}

impl Copies {
    pub(super) fn list(&self, group: RaftGroupId, copy: &Arc<Installer>) -> Listed {
        self.change(|listed| listed.insert(group, Arc::downgrade(copy)));
        Listed {
            copies: self.clone(),
            group,
        }
    }

    /// How many there are.
    pub fn count(&self) -> watch::Receiver<usize> {
        self.count.subscribe()
    }

    pub fn progress(&self) -> Vec<v1::CopyProgress> {
        // The lock is held while they are looked at: who takes one off the list has it for itself.
        let listed = self.lock();
        let progress = |(group, copy): (&RaftGroupId, &Weak<Installer>)| {
            let copy = copy.upgrade()?;
            Some(v1::CopyProgress {
                raft_group_id: group.0,
                copied_bytes: copy.received_bytes(),
                total_bytes: copy.manifest().total_bytes(),
            })
        };
        listed.iter().filter_map(progress).collect()
    }

    fn change<T>(&self, change: impl FnOnce(&mut BTreeMap<RaftGroupId, Weak<Installer>>) -> T) {
        let mut listed = self.lock();
        change(&mut listed);
        self.count.send_replace(listed.len());
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<RaftGroupId, Weak<Installer>>> {
        self.listed.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Listed {
    fn drop(&mut self) {
        self.copies.change(|listed| listed.remove(&self.group));
    }
}
