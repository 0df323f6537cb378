//! Metadata, versions 0 to 13: brokers under their real ids at this cluster's endpoints, and
//! topics as the image has them.

use std::collections::BTreeSet;
use std::sync::Arc;

use chronik_types::cluster_image::{Partition, Topic};
use chronik_types::id::BrokerId;

use super::resolve;
use crate::error::ErrorCode;
use crate::metadata_cache::Snapshot;
use crate::protocol::messages::metadata_response::{
    MetadataResponseBroker, MetadataResponsePartition, MetadataResponseTopic,
};
use crate::protocol::messages::{self as m, StrBytes};
use crate::protocol::produce::TopicKey;
use crate::services::{Context, OFFSETS_TOPIC, Services};

/// READ, WRITE, CREATE, DELETE, ALTER, DESCRIBE, DESCRIBE_CONFIGS, ALTER_CONFIGS: without ACLs
/// everyone may do everything.
const TOPIC_OPERATIONS: i32 = 0x0df8;
/// CREATE, ALTER, DESCRIBE, CLUSTER_ACTION, DESCRIBE_CONFIGS, ALTER_CONFIGS, IDEMPOTENT_WRITE.
pub const CLUSTER_OPERATIONS: i32 = 0x1fa0;

pub async fn handle(context: Context, request: m::MetadataRequest) -> m::MetadataResponse {
    let services = &context.services;
    let version = context.version;
    let wanted = wanted_topics(&request, version);
    let may_create = request.allow_auto_topic_creation || version < 4;
    let mut failed = Vec::new();
    if may_create && let Some(keys) = &wanted {
        create_missing(services, keys, &mut failed).await;
    }
    let snapshot = services.cache.load();
    let brokers = snapshot.image.brokers.values();
    let alive: BTreeSet<BrokerId> = brokers.filter(|b| !b.fenced).map(|b| b.broker_id).collect();
    let answer = |topic: &Arc<Topic>| {
        let mut answer = describe(services, &alive, topic, version);
        if request.include_topic_authorized_operations {
            answer.topic_authorized_operations = TOPIC_OPERATIONS;
        }
        answer
    };
    let topics = match wanted {
        None => all_topics(&snapshot)
            .iter()
            .map(|topic| answer(topic))
            .collect(),
        Some(keys) => keys
            .iter()
            .map(|key| match resolve::topic(&snapshot, key) {
                Ok(topic) => answer(topic),
                Err(code) => {
                    let code = failed
                        .iter()
                        .find(|(k, _)| k == key)
                        .map_or(code, |(_, c)| *c);
                    unknown(key, code)
                }
            })
            .collect(),
    };
    let mut response = message!(m::MetadataResponse {
        brokers: broker_nodes(&snapshot),
        cluster_id: snapshot
            .is_known()
            .then(|| snapshot.image.cluster_id.as_str().into()),
        controller_id: resolve::controller_id(&snapshot),
        topics: topics,
    });
    if request.include_cluster_authorized_operations && (8..=10).contains(&version) {
        response.cluster_authorized_operations = CLUSTER_OPERATIONS;
    }
    response
}

/// None: all topics.
fn wanted_topics(request: &m::MetadataRequest, version: i16) -> Option<Vec<TopicKey>> {
    let topics = request.topics.as_ref()?;
    if version == 0 && topics.is_empty() {
        return None;
    }
    let key = |topic: &m::metadata_request::MetadataRequestTopic| match &topic.name {
        Some(name) => TopicKey::Name(name.clone()),
        None => TopicKey::Id(m::uuid(topic.topic_id)),
    };
    Some(topics.iter().map(key).collect())
}

async fn create_missing(
    services: &Services,
    keys: &[TopicKey],
    failed: &mut Vec<(TopicKey, ErrorCode)>,
) {
    for key in keys {
        let TopicKey::Name(name) = key else { continue };
        if services.cache.load().image.topic_by_name(name).is_some() {
            continue;
        }
        let created = if &**name == OFFSETS_TOPIC {
            services.ensure_offsets_topic().await
        } else if services.config.auto_create_topics_enable {
            services.auto_create(name).await
        } else {
            continue;
        };
        if let Err(code) = created {
            failed.push((key.clone(), code));
        }
    }
}

fn all_topics(snapshot: &Snapshot) -> Vec<&Arc<Topic>> {
    let mut topics: Vec<&Arc<Topic>> = snapshot.image.topics.values().collect();
    topics.sort_by(|a, b| a.name.cmp(&b.name));
    topics
}

fn broker_nodes(snapshot: &Snapshot) -> Vec<MetadataResponseBroker> {
    snapshot
        .image
        .brokers
        .values()
        .filter(|broker| !broker.fenced)
        .filter_map(|broker| resolve::node(snapshot, broker.broker_id))
        .map(|node| {
            message!(MetadataResponseBroker {
                node_id: node.broker_id,
                host: node.host.into(),
                port: i32::from(node.port),
                rack: node.rack.map(StrBytes::from),
            })
        })
        .collect()
}

fn unknown(key: &TopicKey, code: ErrorCode) -> MetadataResponseTopic {
    let mut topic = message!(MetadataResponseTopic {
        error_code: code.code()
    });
    match key {
        TopicKey::Name(name) => topic.name = Some(name.clone()),
        TopicKey::Id(id) => {
            // Version 12 and later: a topic asked for by an unknown id has no name.
            topic.name = None;
            topic.topic_id = m::wire_uuid(*id);
        }
    }
    topic
}

fn describe(
    services: &Services,
    alive: &BTreeSet<BrokerId>,
    topic: &Topic,
    version: i16,
) -> MetadataResponseTopic {
    let partitions = topic
        .partitions
        .iter()
        .map(|partition| describe_partition(services, alive, partition, version))
        .collect();
    message!(MetadataResponseTopic {
        name: Some((&*topic.name).into()),
        topic_id: m::wire_uuid(topic.topic_id.0),
        is_internal: topic.is_internal(),
        partitions: partitions,
    })
}

fn describe_partition(
    services: &Services,
    alive: &BTreeSet<BrokerId>,
    partition: &Partition,
    version: i16,
) -> MetadataResponsePartition {
    let leader = services
        .router
        .leader(partition)
        .filter(|l| alive.contains(&l.broker_id));
    let replicas = partition.replicas.iter().map(|replica| replica.broker_id);
    let mut answer = message!(MetadataResponsePartition {
        partition_index: partition.partition.0,
        leader_id: leader.map_or(-1, |leader| leader.broker_id.0),
        leader_epoch: leader.map_or(partition.leader_epoch.0, |leader| leader.leader_epoch),
        replica_nodes: replicas.clone().map(|id| id.0).collect(),
        isr_nodes: partition.isr.iter().map(|id| id.0).collect(),
        offline_replicas: replicas
            .filter(|id| !alive.contains(id))
            .map(|id| id.0)
            .collect(),
    });
    if leader.is_none() {
        answer.error_code = ErrorCode::LeaderNotAvailable.code();
    }
    if version < 5 {
        answer.offline_replicas.clear();
    }
    answer
}
