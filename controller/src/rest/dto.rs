//! What the REST API takes and gives, as JSON. Field names are those of the glossary.

use std::collections::BTreeMap;

use chronik_types::cluster_image as image;

pub use super::placement_dto::*;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

#[derive(Debug, Serialize, Deserialize, ToSchema)]
pub struct Cluster {
    pub cluster_id: String,
    /// Rises with every change of the metadata.
    pub revision: u64,
    /// The leading controller, as this controller knows it.
    pub controller_leader: Option<u64>,
    pub controller_count: usize,
    pub broker_count: usize,
    pub fenced_broker_count: usize,
    pub gateway_count: usize,
    pub topic_count: usize,
    pub partition_count: usize,
    pub leaderless_partition_count: usize,
    pub under_replicated_partition_count: usize,
    /// Partitions whose replicas are being moved, or wait for that.
    pub reassigning_partition_count: usize,
}

#[derive(Debug, Serialize, Deserialize, ToSchema)]
pub struct Controllers {
    pub controllers: Vec<Controller>,
}

#[derive(Debug, Serialize, Deserialize, ToSchema)]
pub struct Controller {
    pub controller_id: u64,
    pub rpc_address: String,
    pub rest_address: String,
    pub is_leader: bool,
}

#[derive(Debug, Serialize, Deserialize, ToSchema)]
pub struct Brokers {
    pub brokers: Vec<Broker>,
}

#[derive(Debug, Serialize, Deserialize, ToSchema)]
pub struct Broker {
    pub broker_id: i32,
    pub rpc_address: String,
    pub rack: Option<String>,
    /// Registered, but not trusted to lead or serve.
    pub fenced: bool,
    /// What an operator wants it to be free of.
    pub drain: DrainKind,
    pub broker_epoch: u64,
    pub incarnation_id: String,
    pub leader_count: usize,
    pub replica_count: usize,
}

#[derive(Debug, Serialize, Deserialize, ToSchema)]
pub struct Gateways {
    pub gateways: Vec<Gateway>,
}

#[derive(Debug, Serialize, Deserialize, ToSchema)]
pub struct Gateway {
    pub gateway_id: String,
    pub incarnation_id: String,
    pub rack: Option<String>,
    pub endpoints: Vec<Endpoint>,
}

#[derive(Debug, Serialize, Deserialize, ToSchema)]
pub struct Endpoint {
    pub host: String,
    pub port: u16,
}

#[derive(Debug, Serialize, Deserialize, ToSchema)]
pub struct Topics {
    pub topics: Vec<TopicSummary>,
}

#[derive(Debug, Serialize, Deserialize, ToSchema)]
pub struct TopicSummary {
    pub name: String,
    pub topic_id: String,
    pub partition_count: usize,
    pub replication_factor: usize,
    /// Kept by Chronik itself, such as `__consumer_offsets`.
    pub internal: bool,
}

#[derive(Debug, Serialize, Deserialize, ToSchema)]
pub struct Topic {
    pub name: String,
    pub topic_id: String,
    pub partition_count: usize,
    pub replication_factor: usize,
    pub internal: bool,
    /// Only what differs from the defaults.
    pub configs: BTreeMap<String, String>,
    pub partitions: Vec<Partition>,
}

#[derive(Debug, Serialize, Deserialize, ToSchema)]
pub struct Partition {
    pub partition: i32,
    pub leader: Option<i32>,
    pub leader_epoch: i32,
    pub partition_epoch: i32,
    /// Brokers of the assignment, preferred leader first.
    pub replicas: Vec<i32>,
    pub isr: Vec<i32>,
    /// Brokers on their way in; a part of `replicas` once the move is under way.
    pub adding: Vec<i32>,
    /// Brokers on their way out; a part of `replicas`.
    pub removing: Vec<i32>,
}

/// A topic to create. Without `partition_count` or `replication_factor` the cluster's defaults.
#[derive(Debug, Clone, Default, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct NewTopic {
    pub name: String,
    pub partition_count: Option<i32>,
    pub replication_factor: Option<i32>,
    #[serde(default)]
    pub configs: BTreeMap<String, String>,
    /// Brokers of each partition, preferred leader first; in place of the two numbers.
    #[serde(default)]
    pub assignments: Vec<Vec<i32>>,
    /// Only check.
    #[serde(default)]
    pub validate_only: bool,
    /// How long to wait until every partition has a leader. Default 10,000.
    pub timeout_ms: Option<u32>,
}

/// Changes of configs: a value sets, null goes back to the default.
#[derive(Debug, Clone, Default, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ConfigChanges {
    #[serde(default)]
    pub configs: BTreeMap<String, Option<String>>,
    /// Words to add to configs that are lists.
    #[serde(default)]
    pub append: BTreeMap<String, String>,
    /// Words to take from configs that are lists.
    #[serde(default)]
    pub subtract: BTreeMap<String, String>,
    /// Only check.
    #[serde(default)]
    pub validate_only: bool,
}

#[derive(Debug, Clone, Default, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct NewPartitions {
    /// The topic's new number of partitions.
    pub total_count: i32,
    /// Brokers of each new partition, preferred leader first; else the controller chooses.
    #[serde(default)]
    pub assignments: Vec<Vec<i32>>,
    /// Only check.
    #[serde(default)]
    pub validate_only: bool,
    /// How long to wait until every partition has a leader. Default 10,000.
    pub timeout_ms: Option<u32>,
}

impl From<&image::Topic> for TopicSummary {
    fn from(topic: &image::Topic) -> Self {
        Self {
            name: topic.name.to_string(),
            topic_id: topic.topic_id.to_string(),
            partition_count: topic.partitions.len(),
            replication_factor: replication_factor(topic),
            internal: topic.is_internal(),
        }
    }
}

impl From<&image::Topic> for Topic {
    fn from(topic: &image::Topic) -> Self {
        Self {
            name: topic.name.to_string(),
            topic_id: topic.topic_id.to_string(),
            partition_count: topic.partitions.len(),
            replication_factor: replication_factor(topic),
            internal: topic.is_internal(),
            configs: topic.configs.clone(),
            partitions: topic.partitions.iter().map(Into::into).collect(),
        }
    }
}

impl From<&image::Partition> for Partition {
    fn from(partition: &image::Partition) -> Self {
        Self {
            partition: partition.partition.0,
            leader: partition.leader.map(|id| id.0),
            leader_epoch: partition.leader_epoch.0,
            partition_epoch: partition.partition_epoch.0,
            replicas: partition
                .replicas
                .iter()
                .map(|replica| replica.broker_id.0)
                .collect(),
            isr: partition.isr.iter().map(|id| id.0).collect(),
            adding: partition.adding().iter().map(|id| id.0).collect(),
            removing: partition.removing().iter().map(|id| id.0).collect(),
        }
    }
}

impl From<&image::Gateway> for Gateway {
    fn from(gateway: &image::Gateway) -> Self {
        let endpoint = |e: &image::Endpoint| Endpoint {
            host: e.host.clone(),
            port: e.port,
        };
        Self {
            gateway_id: gateway.gateway_id.clone(),
            incarnation_id: gateway.incarnation_id.to_string(),
            rack: gateway.rack.clone(),
            endpoints: gateway.endpoints.iter().map(endpoint).collect(),
        }
    }
}

fn replication_factor(topic: &image::Topic) -> usize {
    topic
        .partitions
        .first()
        .map_or(0, |partition| partition.target_replicas().len())
}
