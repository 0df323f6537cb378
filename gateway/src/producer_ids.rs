//! Producer ids for idempotent producers, taken from the controllers in blocks.
//!
//! Invariant: an id is given out once; ids of a block that a stopped gateway had left are lost,
//! never given out again.

use std::ops::Range;

use tokio::sync::Mutex;

use crate::controller_client::ControllerClient;
use crate::error::CallError;

/// As many as a Kafka broker takes at once.
const BLOCK: u32 = 1000;

#[derive(Debug)]
pub struct ProducerIds {
    left: Mutex<Range<i64>>,
}

impl ProducerIds {
    pub fn new() -> Self {
        Self {
            left: Mutex::new(0..0),
        }
    }

    pub async fn next(&self, controllers: &ControllerClient) -> Result<i64, CallError> {
        // Held while a block is fetched, so that producers who start together take one block.
        let mut left = self.left.lock().await;
        if let Some(id) = left.next() {
            return Ok(id);
        }
        let block = controllers.allocate_producer_ids(BLOCK).await?;
        let end = block.first.checked_add(i64::from(block.count));
        *left = block.first..end.unwrap_or(block.first);
        left.next()
            .ok_or_else(|| CallError::Refused("an empty block of producer ids".to_owned()))
    }
}
