//! The high watermark of a running replica never falls, and nothing at or above it is served.

use std::collections::BTreeMap;

use chronik_types::id::{BrokerId, RaftGroupId};
use chronik_types::offset::Offset;

use super::Stored;

#[derive(Default)]
pub struct WatermarkNeverFalls {
    /// By group, broker and its process.
    highest: BTreeMap<(RaftGroupId, BrokerId, u64), Offset>,
}

impl WatermarkNeverFalls {
    pub fn observe(
        &mut self,
        group: RaftGroupId,
        broker: BrokerId,
        process: u64,
        high_watermark: Offset,
    ) -> Result<(), String> {
        let highest = self
            .highest
            .entry((group, broker, process))
            .or_insert(high_watermark);
        if high_watermark < *highest {
            return Err(format!(
                "the high watermark fell: group {group} on broker {broker}: from {highest} to \
                 {high_watermark}"
            ));
        }
        *highest = high_watermark;
        Ok(())
    }

    pub fn served(
        &self,
        group: RaftGroupId,
        batches: &[Stored],
        high_watermark: Offset,
    ) -> Result<(), String> {
        match batches.iter().find(|b| b.next_offset > high_watermark) {
            Some(batch) => Err(format!(
                "served above the high watermark {high_watermark}: group {group}: {batch:?}"
            )),
            None => Ok(()),
        }
    }
}
