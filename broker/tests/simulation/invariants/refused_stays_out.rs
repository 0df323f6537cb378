//! What a producer was told is not appended is in no log, and nothing is there twice that was sent
//! once.

use std::collections::{BTreeMap, BTreeSet};

use chronik_types::id::RaftGroupId;

use super::{BatchKey, Stored};

#[derive(Default)]
pub struct RefusedStaysOut {
    refused: BTreeMap<BatchKey, String>,
    committed: BTreeSet<(RaftGroupId, BatchKey)>,
}

impl RefusedStaysOut {
    /// A batch that is never sent again was refused with `why`.
    pub fn refused(
        &mut self,
        group: RaftGroupId,
        key: BatchKey,
        why: String,
    ) -> Result<(), String> {
        if self.committed.contains(&(group, key)) {
            return Err(format!("refused ({why}), but committed: group {group}"));
        }
        self.refused.insert(key, why);
        Ok(())
    }

    pub fn committed(&mut self, group: RaftGroupId, batch: &Stored) -> Result<(), String> {
        if let Some(why) = self.refused.get(&batch.key) {
            return Err(format!(
                "refused ({why}), but committed: group {group}: {batch:?}"
            ));
        }
        if !self.committed.insert((group, batch.key)) {
            return Err(format!(
                "one batch was committed twice: group {group}: {batch:?}"
            ));
        }
        Ok(())
    }
}
