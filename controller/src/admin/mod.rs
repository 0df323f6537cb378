//! What the leader decides about topics, partitions and brokers before it proposes: checks,
//! placement, ids, defaults.
//!
//! Invariant: every topic of a request gets its own result, and none is called done that is not.

mod brokers;
mod configs;
mod create;
mod leaders;
mod name;
mod reassignments;

use std::collections::HashSet;
use std::time::Duration;

use chronik_proto::{uuid, uuid_bytes, v1};
use chronik_types::cluster_image::{ClusterImage, Topic};
use chronik_types::id::TopicId;
use tonic::Status;

pub use brokers::{alter_cluster_settings, set_broker_drain, unregister_broker};
pub use configs::alter_topic_configs;
pub use create::{create_partitions, create_topics};
pub use leaders::elect_leaders;
pub use reassignments::{alter_reassignments, list_reassignments};

use crate::command::{Command, Outcome, TopicRefusal};
use crate::controller::Controller;
use crate::rpc::error;

/// Longest wait for leaders, whatever a request says.
const WAIT_MAX: Duration = Duration::from_secs(300);

/// Why one topic of a request was not changed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refused {
    pub error: v1::AdminError,
    pub message: String,
}

impl Refused {
    pub fn new(error: v1::AdminError, message: impl Into<String>) -> Self {
        Self {
            error,
            message: message.into(),
        }
    }
}

impl From<TopicRefusal> for Refused {
    fn from(refusal: TopicRefusal) -> Self {
        use v1::AdminError as E;
        match refusal {
            TopicRefusal::NameExists => Self::new(E::TopicAlreadyExists, "the topic exists"),
            TopicRefusal::NameCollides(other) => Self::new(
                E::InvalidTopicName,
                format!("the name collides with topic '{other}': '.' and '_' count as equal"),
            ),
            TopicRefusal::Unknown => Self::new(E::UnknownTopic, "there is no such topic"),
            TopicRefusal::UnknownBroker(broker_id) => Self::new(
                E::InvalidReplicaAssignment,
                format!("broker {broker_id} is not registered"),
            ),
            TopicRefusal::Changed => Self::new(
                E::InvalidPartitions,
                "somebody else changed the topic: look again",
            ),
        }
    }
}

pub async fn delete_topics(
    controller: &Controller,
    request: v1::DeleteTopicsRequest,
) -> Result<v1::TopicResults, Status> {
    let image = controller.image();
    let mut seen = HashSet::new();
    let mut found = Vec::new();
    let mut results = Vec::with_capacity(request.topics.len());
    for topic in request.topics {
        let present = find(&image, &topic);
        let result = match present {
            Err(refused) => Err(refused),
            Ok(present) if !seen.insert(present.topic_id) => Err(Refused::new(
                v1::AdminError::DuplicateInRequest,
                "the request names the topic twice",
            )),
            Ok(present) => {
                found.push(present.topic_id);
                Ok(present.topic_id)
            }
        };
        let name = present_name(&image, &topic);
        results.push((name, topic.topic_id, result));
    }
    if !found.is_empty() {
        let command = Command::DeleteTopics {
            topic_ids: found.clone(),
        };
        let outcomes = propose_topics(controller, command).await?;
        for (topic_id, outcome) in found.iter().zip(outcomes) {
            let Err(refusal) = outcome else { continue };
            let entry = results
                .iter_mut()
                .find(|(_, _, result)| result.as_ref() == Ok(topic_id));
            if let Some((_, _, result)) = entry {
                *result = Err(refusal.into());
            }
        }
    }
    let topics = results
        .into_iter()
        .map(|(name, asked_id, result)| {
            let mut wire = topic_result(name, result);
            if wire.topic_id.is_empty() {
                wire.topic_id = asked_id;
            }
            wire
        })
        .collect();
    Ok(v1::TopicResults { topics })
}

pub async fn allocate_producer_ids(
    controller: &Controller,
    request: v1::AllocateProducerIdsRequest,
) -> Result<v1::AllocateProducerIdsResponse, Status> {
    let count = request.count.clamp(1, 1_000_000);
    let command = Command::AllocateProducerIds { count };
    match controller.propose(command).await.map_err(error::proposal)? {
        Outcome::ProducerIds(first) => Ok(v1::AllocateProducerIdsResponse { first, count }),
        Outcome::ProducerIdsExhausted => {
            Err(Status::resource_exhausted("there are no more producer ids"))
        }
        _ => Err(error::unexpected("AllocateProducerIds")),
    }
}

/// The result of one topic on the wire.
fn topic_result(name: String, result: Result<TopicId, Refused>) -> v1::TopicResult {
    match result {
        Ok(topic_id) => v1::TopicResult {
            name,
            topic_id: uuid_bytes(topic_id.0),
            ..Default::default()
        },
        Err(refused) => v1::TopicResult {
            name,
            error: refused.error.into(),
            error_message: refused.message,
            ..Default::default()
        },
    }
}

fn find<'a>(image: &'a ClusterImage, wanted: &v1::TopicRef) -> Result<&'a Topic, Refused> {
    let unknown = || Refused::from(TopicRefusal::Unknown);
    let topic = if wanted.topic_id.is_empty() {
        image.topic_by_name(&wanted.name)
    } else {
        let topic_id = uuid("topic_id", &wanted.topic_id).map_err(|_| unknown())?;
        image.topic(TopicId(topic_id))
    };
    topic.map(|topic| &**topic).ok_or_else(unknown)
}

fn present_name(image: &ClusterImage, wanted: &v1::TopicRef) -> String {
    find(image, wanted).map_or_else(|_| wanted.name.clone(), |topic| topic.name.to_string())
}

async fn propose_topics(
    controller: &Controller,
    command: Command,
) -> Result<Vec<Result<TopicId, TopicRefusal>>, Status> {
    match controller.propose(command).await.map_err(error::proposal)? {
        Outcome::Topics(outcomes) => Ok(outcomes),
        _ => Err(error::unexpected("topics")),
    }
}

/// Waits until all partitions of the topics are led; returns the topics of which some are not.
async fn await_leaders(
    controller: &Controller,
    topic_ids: &[TopicId],
    timeout_ms: u32,
) -> HashSet<TopicId> {
    let leaderless = |image: &ClusterImage| -> HashSet<TopicId> {
        let topics = topic_ids.iter().filter_map(|id| image.topic(*id));
        let waiting = topics.filter(|topic| topic.partitions.iter().any(|p| p.leader.is_none()));
        waiting.map(|topic| topic.topic_id).collect()
    };
    let mut images = controller.feed().subscribe();
    let all_led = images.wait_for(|image| leaderless(image).is_empty());
    let limit = Duration::from_millis(u64::from(timeout_ms)).min(WAIT_MAX);
    match tokio::time::timeout(limit, all_led).await {
        Ok(_) => HashSet::new(),
        Err(_) => leaderless(&controller.image()),
    }
}
