//! From a consumer group to its coordinator: the leader of the group's partition of
//! `__consumer_offsets`.
//!
//! Invariant: a group is on the partition where Apache Kafka would put it, so that the topic
//! means the same to both.

use std::sync::Arc;
use std::time::Duration;

use chronik_proto::v1::GroupError;
use chronik_proto::v1::groups_client::GroupsClient;
use chronik_types::cluster_image::Partition;
use tokio::time::timeout;
use tonic::{Response, Status};

use crate::controller_client::call_error;
use crate::error::{ErrorCode, group_call_error, group_error};
use crate::metadata_cache::Snapshot;
use crate::rpc_channel::TracedChannel;
use crate::services::{OFFSETS_TOPIC, Services};

/// For calls that a coordinator answers without waiting for other members.
pub const CALL_TIMEOUT: Duration = Duration::from_secs(10);

/// The partition of `__consumer_offsets` that a group lives on.
pub fn partition_of(snapshot: &Snapshot, group: &str) -> Result<Partition, ErrorCode> {
    let topic = snapshot.image.topic_by_name(OFFSETS_TOPIC);
    let topic = topic.ok_or(ErrorCode::CoordinatorNotAvailable)?;
    let count = i32::try_from(topic.partitions.len())
        .unwrap_or(i32::MAX)
        .max(1);
    let index = (java_hash(group) & i32::MAX) % count;
    topic
        .partition(index.into())
        .cloned()
        .ok_or(ErrorCode::CoordinatorNotAvailable)
}

/// Asks the coordinator of a group. A broker that says it is not the coordinator has done nothing,
/// so the other replicas are asked as well: the image may be behind, or no controller may be up.
pub async fn ask<A, F>(
    services: &Arc<Services>,
    group: &str,
    wait: Duration,
    call: impl Fn(GroupsClient<TracedChannel>, u64) -> F,
    error_of: impl Fn(&A) -> GroupError,
) -> Result<A, ErrorCode>
where
    F: Future<Output = Result<Response<A>, Status>>,
{
    if group.is_empty() {
        return Err(ErrorCode::InvalidGroupId);
    }
    let snapshot = services.cache.load();
    let partition = partition_of(&snapshot, group)?;
    let mut refused = ErrorCode::CoordinatorNotAvailable;
    for link in services.router.candidates(&partition) {
        if !link.is_usable() {
            continue;
        }
        let called = timeout(wait, call(link.groups(), partition.raft_group_id.0)).await;
        let answer = match called {
            Ok(Ok(answer)) => answer.into_inner(),
            Ok(Err(status)) => return Err(group_call_error(&call_error(&status))),
            Err(_) => return Err(ErrorCode::CoordinatorNotAvailable),
        };
        if error_of(&answer) != GroupError::NotCoordinator {
            return Ok(answer);
        }
        refused = group_error(GroupError::NotCoordinator);
    }
    Err(refused)
}

/// Java's `String.hashCode`, which Kafka uses to place groups.
fn java_hash(text: &str) -> i32 {
    text.encode_utf16().fold(0i32, |hash, unit| {
        hash.wrapping_mul(31).wrapping_add(i32::from(unit))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hashes_are_javas() {
        assert_eq!(java_hash(""), 0);
        assert_eq!(java_hash("hello"), 99_162_322);
        assert_eq!(java_hash("polygenelubricants"), i32::MIN);
    }
}
