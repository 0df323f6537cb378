//! Topics, partitions and brokers as requests name them, looked up in the image.

use std::sync::Arc;

use chronik_types::cluster_image::{Partition, Topic};
use chronik_types::id::{BrokerId, TopicId};

use crate::error::ErrorCode;
use crate::metadata_cache::Snapshot;
use crate::protocol::fetch::NodeEndpoint;
use crate::protocol::produce::TopicKey;

/// The topic of that name or id.
pub fn topic<'a>(snapshot: &'a Snapshot, key: &TopicKey) -> Result<&'a Arc<Topic>, ErrorCode> {
    match key {
        TopicKey::Name(name) => snapshot
            .image
            .topic_by_name(name)
            .ok_or(ErrorCode::UnknownTopicOrPartition),
        TopicKey::Id(id) => snapshot
            .image
            .topic(TopicId(*id))
            .ok_or(ErrorCode::UnknownTopicId),
    }
}

/// The partition of that index.
pub fn partition(topic: &Topic, index: i32) -> Result<&Partition, ErrorCode> {
    topic
        .partition(index.into())
        .ok_or(ErrorCode::UnknownTopicOrPartition)
}

/// Where clients reach a broker.
pub fn node(snapshot: &Snapshot, broker_id: BrokerId) -> Option<NodeEndpoint> {
    let endpoint = snapshot.endpoints.of(broker_id)?;
    let broker = snapshot.image.brokers.get(&broker_id)?;
    Some(NodeEndpoint {
        broker_id: broker_id.0,
        host: endpoint.host.clone(),
        port: endpoint.port,
        rack: broker.rack.clone(),
    })
}

/// The broker that admin clients are told to send cluster-wide changes to. Any will do.
pub fn controller_id(snapshot: &Snapshot) -> i32 {
    snapshot
        .image
        .brokers
        .values()
        .find(|broker| !broker.fenced)
        .map_or(-1, |b| b.broker_id.0)
}

/// Where nodes may be reached, for the answers that name new leaders.
pub fn nodes(snapshot: &Snapshot, broker_ids: impl Iterator<Item = i32>) -> Vec<NodeEndpoint> {
    let mut ids: Vec<i32> = broker_ids.collect();
    ids.sort_unstable();
    ids.dedup();
    ids.into_iter()
        .filter_map(|id| node(snapshot, BrokerId(id)))
        .collect()
}
