//! What replicas do for each other when one of them has damaged files.
//!
//! Invariant: only committed entries are given. A replica that rebuilds is asked to lead after all others,
//! as far as that is known here; it costs nothing but time if it is.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use chronik_storage::Export;
use chronik_types::id::BrokerId;
use tokio::time::Instant;

use super::Replica;
use super::copy::CopyError;

/// A replica that has not asked for anything for so long is rebuilt, or gone. Longer than the pauses
/// after which a rebuild is tried again.
const REBUILD_TTL: Duration = Duration::from_secs(75);
/// More brokers than a partition has replicas.
const REBUILDING_MAX: usize = 64;

/// Brokers whose replicas are being rebuilt, with the time when each last asked.
#[derive(Debug, Default)]
pub struct Rebuilding {
    asked: Mutex<HashMap<BrokerId, Instant>>,
}

impl Rebuilding {
    fn note(&self, broker: BrokerId) {
        let mut asked = self.asked.lock().unwrap_or_else(PoisonError::into_inner);
        asked.retain(|_, at| at.elapsed() < REBUILD_TTL);
        if asked.len() < REBUILDING_MAX {
            asked.insert(broker, Instant::now());
        }
    }

    fn has(&self, broker: BrokerId) -> bool {
        let asked = self.asked.lock().unwrap_or_else(PoisonError::into_inner);
        asked
            .get(&broker)
            .is_some_and(|at| at.elapsed() < REBUILD_TTL)
    }
}

impl Replica {
    /// The log's files up to an entry, for the replica of another broker that rebuilds its own.
    pub async fn files_for(&self, broker: BrokerId, upto_index: u64) -> Result<Export, CopyError> {
        self.note_rebuilding(broker);
        let log = self.log().clone();
        let export = tokio::task::spawn_blocking(move || log.export_files(upto_index)).await;
        Ok(export.map_err(|_| CopyError::Cancelled)??)
    }

    /// The broker's replica has asked for files, or is reading them.
    pub fn note_rebuilding(&self, broker: BrokerId) {
        self.state.rebuilding.note(broker);
    }

    /// The broker's replica was found to be damaged lately, so another one should lead.
    pub fn is_rebuilding(&self, broker: BrokerId) -> bool {
        self.state.rebuilding.has(broker)
    }
}
