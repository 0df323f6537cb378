//! Segments whose files somebody reads for longer than one call.
//!
//! Invariant: a pinned segment may leave the log, but its files stay until the last pin is gone.

use std::collections::BTreeMap;

use super::state::LogState;
use crate::segment::SegmentId;

/// Who holds what, of one log.
#[derive(Debug, Default)]
pub struct Pins {
    counts: BTreeMap<SegmentId, Pin>,
}

#[derive(Debug, Default)]
struct Pin {
    count: usize,
    /// The segment is in the log no more.
    is_doomed: bool,
}

impl LogState {
    pub fn pin(&mut self, id: SegmentId) {
        self.pins.counts.entry(id).or_default().count += 1;
    }

    /// Gives whether the segment's files are to be removed now.
    pub fn unpin(&mut self, id: SegmentId) -> bool {
        let Some(pin) = self.pins.counts.get_mut(&id) else {
            return false;
        };
        pin.count = pin.count.saturating_sub(1);
        if pin.count > 0 {
            return false;
        }
        self.pins
            .counts
            .remove(&id)
            .is_some_and(|pin| pin.is_doomed)
    }

    /// To be called for a segment that has left the log. Gives whether its files may go at once.
    pub fn doom(&mut self, id: SegmentId) -> bool {
        match self.pins.counts.get_mut(&id) {
            Some(pin) => {
                pin.is_doomed = true;
                false
            }
            None => true,
        }
    }

    /// What would be left behind if the storage were closed now.
    pub fn take_doomed(&mut self) -> Vec<SegmentId> {
        let doomed = self.pins.counts.iter().filter(|(_, pin)| pin.is_doomed);
        let doomed: Vec<_> = doomed.map(|(id, _)| *id).collect();
        self.pins.counts.retain(|_, pin| !pin.is_doomed);
        doomed
    }
}
