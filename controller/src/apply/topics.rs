//! Topics, partitions and configs.
//!
//! Invariant: a Raft group id is given out once, and a replica's incarnation is the revision at
//! which it was assigned.

use std::collections::BTreeSet;
use std::sync::Arc;

use chronik_types::cluster_image::{ClusterImage, ImageChange, Partition, Topic};
use chronik_types::epoch::{LeaderEpoch, PartitionEpoch};
use chronik_types::id::{BrokerId, PartitionIndex, RaftGroupId, ReplicaId, TopicId};

use crate::command::{Outcome, PartitionsPlan, SetTopicConfigs, TopicPlan, TopicRefusal};
use crate::state::State;

pub fn create(state: &mut State, plans: Vec<TopicPlan>, change: &mut ImageChange) -> Outcome {
    let mut results = Vec::with_capacity(plans.len());
    for plan in plans {
        if let Some(refusal) = refusal(&state.image, &change.topics, &plan) {
            results.push(Err(refusal));
            continue;
        }
        let partitions = plan
            .assignments
            .iter()
            .enumerate()
            .map(|(index, brokers)| {
                new_partition(state, plan.topic_id, index, brokers, change.revision)
            })
            .collect();
        change.topics.push(Arc::new(Topic {
            topic_id: plan.topic_id,
            name: plan.name.into(),
            configs: plan.configs,
            partitions,
        }));
        results.push(Ok(plan.topic_id));
    }
    Outcome::Topics(results)
}

pub fn delete(state: &mut State, topic_ids: &[TopicId], change: &mut ImageChange) -> Outcome {
    let mut removed = BTreeSet::new();
    let mut results = Vec::with_capacity(topic_ids.len());
    for topic_id in topic_ids {
        match state.image.topic(*topic_id) {
            Some(topic) if removed.insert(*topic_id) => {
                for partition in &topic.partitions {
                    state.groups.remove(&partition.raft_group_id);
                }
                change.removed_topics.push(*topic_id);
                results.push(Ok(*topic_id));
            }
            _ => results.push(Err(TopicRefusal::Unknown)),
        }
    }
    Outcome::Topics(results)
}

pub fn create_partitions(
    state: &mut State,
    plans: Vec<PartitionsPlan>,
    change: &mut ImageChange,
) -> Outcome {
    let mut results = Vec::with_capacity(plans.len());
    for plan in plans {
        let result = match state.image.topic(plan.topic_id).cloned() {
            None => Err(TopicRefusal::Unknown),
            Some(topic)
                if topic.partitions.len() != plan.present_count
                    || change
                        .topics
                        .iter()
                        .any(|other| other.topic_id == topic.topic_id) =>
            {
                Err(TopicRefusal::Changed)
            }
            Some(topic) => match unknown_broker(&state.image, &plan.assignments) {
                Some(broker_id) => Err(TopicRefusal::UnknownBroker(broker_id)),
                None => {
                    change
                        .topics
                        .push(Arc::new(grown(state, &topic, &plan, change.revision)));
                    Ok(plan.topic_id)
                }
            },
        };
        results.push(result);
    }
    Outcome::Topics(results)
}

pub fn set_configs(state: &State, command: SetTopicConfigs, change: &mut ImageChange) -> Outcome {
    let result = match state.image.topic(command.topic_id) {
        None => Err(TopicRefusal::Unknown),
        Some(topic) if topic.configs != command.expected => Err(TopicRefusal::Changed),
        Some(topic) => {
            if topic.configs != command.configs {
                let topic = Topic {
                    configs: command.configs,
                    ..(**topic).clone()
                };
                change.topics.push(Arc::new(topic));
            }
            Ok(command.topic_id)
        }
    };
    Outcome::Topics(vec![result])
}

/// Names that differ only in '.' and '_' give the same metric names, so Kafka keeps them apart.
pub fn collision_key(name: &str) -> String {
    name.replace('.', "_")
}

fn refusal(image: &ClusterImage, created: &[Arc<Topic>], plan: &TopicPlan) -> Option<TopicRefusal> {
    let name = plan.name.as_str();
    if image.topic_by_name(name).is_some() || created.iter().any(|topic| &*topic.name == name) {
        return Some(TopicRefusal::NameExists);
    }
    if name.contains(['.', '_']) {
        let key = collision_key(name);
        let collides = |other: &&Arc<str>| {
            other.len() == key.len() && other.contains(['.', '_']) && collision_key(other) == key
        };
        let created = created.iter().map(|topic| &topic.name).find(collides);
        if let Some(other) = created.or_else(|| image.topic_ids.keys().find(collides)) {
            return Some(TopicRefusal::NameCollides(other.to_string()));
        }
    }
    if image.topic(plan.topic_id).is_some() {
        return Some(TopicRefusal::Changed);
    }
    unknown_broker(image, &plan.assignments).map(TopicRefusal::UnknownBroker)
}

fn unknown_broker(image: &ClusterImage, assignments: &[Vec<BrokerId>]) -> Option<BrokerId> {
    assignments
        .iter()
        .flatten()
        .copied()
        .find(|id| !image.brokers.contains_key(id))
}

fn grown(state: &mut State, topic: &Topic, plan: &PartitionsPlan, revision: u64) -> Topic {
    let mut topic = topic.clone();
    for brokers in &plan.assignments {
        let index = topic.partitions.len();
        topic.partitions.push(new_partition(
            state,
            topic.topic_id,
            index,
            brokers,
            revision,
        ));
    }
    topic
}

/// A partition nobody leads yet: its ISR are the replicas that can take part at once.
fn new_partition(
    state: &mut State,
    topic_id: TopicId,
    index: usize,
    brokers: &[BrokerId],
    revision: u64,
) -> Partition {
    // The leader bounds partitions per request far below this.
    let partition = PartitionIndex(i32::try_from(index).unwrap_or(i32::MAX));
    let raft_group_id = RaftGroupId(state.next_raft_group_id);
    state.next_raft_group_id = state.next_raft_group_id.saturating_add(1);
    state.groups.insert(raft_group_id, (topic_id, partition));
    let live = |id: &BrokerId| state.image.is_live(*id);
    let mut isr: Vec<BrokerId> = brokers.iter().copied().filter(live).collect();
    if isr.is_empty() {
        isr = brokers.to_vec();
    }
    Partition {
        partition,
        raft_group_id,
        replicas: brokers
            .iter()
            .map(|id| ReplicaId {
                broker_id: *id,
                incarnation: revision,
            })
            .collect(),
        isr,
        leader: None,
        leader_epoch: LeaderEpoch(0),
        partition_epoch: PartitionEpoch(0),
        reassignment: None,
        wanted_leader: None,
    }
}
