//! What is known to be damaged of a log on disk.
//!
//! Invariant: the first damage stays on record until the log's content is replaced; the error that
//! told of it is never hidden.

use chronik_types::id::RaftGroupId;

use super::state::LogState;
use crate::error::{Damage, StorageError};

impl LogState {
    /// Remembers the first damage, and tells people.
    pub fn note_damage(&mut self, group: RaftGroupId, error: &StorageError) {
        if let StorageError::Corrupt {
            file,
            position,
            why,
        } = error
        {
            let path = file.display();
            tracing::error!(raft_group_id = %group, file = %path, position, %why, "a log is damaged");
            self.damage.get_or_insert_with(|| Damage {
                group,
                file: file.clone(),
                position: *position,
                why: why.clone(),
            });
        }
    }
}
