//! What is known to be damaged of a log on disk, and how others learn of it.
//!
//! Invariant: a damaged segment stays on record for as long as it is part of the log; the error that
//! told of it is never hidden.

use std::future::poll_fn;
use std::sync::{Arc, Mutex};
use std::task::{Poll, Waker};

use chronik_types::id::RaftGroupId;

use super::state::LogState;
use crate::error::{Damage, StorageError};
use crate::segment::{Segment, SegmentId};
use crate::sync::lock;
use crate::wakers::Wakers;

/// A segment of which something cannot be read as it was written.
#[derive(Debug, Clone)]
pub struct DamagedSegment {
    pub id: SegmentId,
    pub damage: Damage,
}

impl LogState {
    /// Remembers the first damage of each segment, and tells people. False: nothing new.
    pub fn note_damage(&mut self, group: RaftGroupId, id: SegmentId, error: &StorageError) -> bool {
        let StorageError::Corrupt {
            file,
            position,
            why,
        } = error
        else {
            return false;
        };
        if self.damaged.iter().any(|segment| segment.id == id) {
            return false;
        }
        let path = file.display();
        tracing::error!(raft_group_id = %group, file = %path, position, %why, "a log is damaged");
        let damage = Damage {
            group,
            file: file.clone(),
            position: *position,
            why: why.clone(),
        };
        self.damaged.push(DamagedSegment { id, damage });
        true
    }

    /// The first that was found.
    pub fn damage(&self) -> Option<&Damage> {
        self.damaged.first().map(|segment| &segment.damage)
    }

    pub fn is_damaged(&self, segment: &Segment) -> bool {
        self.damaged.iter().any(|found| found.id == segment.id())
    }

    /// To be called after segments have left the log. Gives whether any damage went with them.
    pub fn forget_damage(&mut self) -> bool {
        let count = self.damaged.len();
        let segments = &self.segments;
        self.damaged
            .retain(|found| segments.iter().any(|segment| segment.id() == found.id));
        self.damaged.len() != count
    }
}

/// Tells that damage was found, or is gone.
#[derive(Default)]
pub struct DamageSignal {
    inner: Mutex<Inner>,
}

#[derive(Default)]
struct Inner {
    changes: u64,
    wakers: Wakers,
}

impl DamageSignal {
    pub fn tell(&self) {
        let mut inner = lock(&self.inner);
        inner.changes += 1;
        let wakers = inner.wakers.take();
        drop(inner);
        wakers.into_iter().for_each(Waker::wake);
    }
}

/// Waits for changes of what is damaged; what was found before counts as one. Does not keep the
/// storage open.
pub struct DamageChanges {
    signal: Arc<DamageSignal>,
    seen: u64,
}

impl DamageChanges {
    pub(crate) fn new(signal: Arc<DamageSignal>) -> Self {
        DamageChanges { signal, seen: 0 }
    }

    /// Resolves when anything has changed since it last did; never if nothing does.
    pub async fn changed(&mut self) {
        let (signal, seen) = (&self.signal, &mut self.seen);
        poll_fn(|context| {
            let mut inner = lock(&signal.inner);
            if inner.changes != *seen {
                *seen = inner.changes;
                return Poll::Ready(());
            }
            inner.wakers.add(context.waker());
            Poll::Pending
        })
        .await;
    }
}
