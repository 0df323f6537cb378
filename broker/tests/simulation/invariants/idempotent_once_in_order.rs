//! The batches of an idempotent producer are in the log once, in the order of their sequence
//! numbers, without gaps.

use std::collections::BTreeMap;

use chronik_types::id::{ProducerId, RaftGroupId};

use super::Stored;

#[derive(Default)]
pub struct IdempotentOnceInOrder {
    next: BTreeMap<(RaftGroupId, ProducerId), i32>,
}

impl IdempotentOnceInOrder {
    pub fn committed(&mut self, group: RaftGroupId, batch: &Stored) -> Result<(), String> {
        let header = &batch.header;
        if !header.is_idempotent() {
            return Ok(());
        }
        let next = self.next.entry((group, header.producer_id)).or_insert(0);
        if header.base_sequence != *next {
            return Err(format!(
                "a producer's order is broken: group {group}: sequence {next} is due, found {batch:?}"
            ));
        }
        *next = header.last_sequence() + 1;
        Ok(())
    }
}
