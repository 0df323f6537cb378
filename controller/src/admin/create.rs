//! CreateTopics and CreatePartitions.

use std::collections::{BTreeMap, HashMap, HashSet};

use chronik_proto::{uuid_bytes, v1};
use chronik_types::cluster_image::ClusterImage;
use chronik_types::id::{BrokerId, TopicId};
use chronik_types::topic_config;
use tonic::Status;
use uuid::Uuid;

use super::{Refused, await_leaders, name, propose_topics, topic_result};
use crate::apply::collision_key;
use crate::command::{Command, PartitionsPlan, TopicPlan, TopicRefusal};
use crate::config::Config;
use crate::controller::Controller;
use crate::placement::{Candidate, candidates, place};

type E = v1::AdminError;

const CONSUMER_OFFSETS: &str = "__consumer_offsets";
/// Kafka's replication factor is a 16-bit number.
const REPLICATION_FACTOR_MAX: i32 = i16::MAX as i32;

pub async fn create_topics(
    controller: &Controller,
    request: v1::CreateTopicsRequest,
) -> Result<v1::CreateTopicsResponse, Status> {
    let image = controller.image();
    let mut counts: HashMap<&str, usize> = HashMap::new();
    for topic in &request.topics {
        *counts.entry(&topic.name).or_default() += 1;
    }
    let mut planner = Planner::new(controller.config(), &image);
    let mut results: Vec<(String, Result<TopicPlan, Refused>)> = Vec::new();
    for topic in &request.topics {
        if counts
            .remove(topic.name.as_str())
            .is_some_and(|count| count == 1)
        {
            results.push((topic.name.clone(), planner.topic(topic)));
        } else if !results.iter().any(|(name, _)| *name == topic.name) {
            let refused = Refused::new(E::DuplicateInRequest, "the request names the topic twice");
            results.push((topic.name.clone(), Err(refused)));
        }
    }
    let mut leaderless = HashSet::new();
    if !request.validate_only {
        let created = propose_plans(controller, &mut results).await?;
        leaderless = await_leaders(controller, &created, request.timeout_ms).await;
    }
    let topics = results
        .into_iter()
        .map(|(name, result)| created_topic(name, result, &leaderless))
        .collect();
    Ok(v1::CreateTopicsResponse { topics })
}

pub async fn create_partitions(
    controller: &Controller,
    request: v1::CreatePartitionsRequest,
) -> Result<v1::TopicResults, Status> {
    let image = controller.image();
    let mut seen = HashSet::new();
    let mut planner = Planner::new(controller.config(), &image);
    let mut results: Vec<(String, Result<PartitionsPlan, Refused>)> = Vec::new();
    for topic in &request.topics {
        let result = if seen.insert(topic.name.as_str()) {
            planner.partitions(topic)
        } else {
            Err(Refused::new(
                E::DuplicateInRequest,
                "the request names the topic twice",
            ))
        };
        results.push((topic.name.clone(), result));
    }
    let mut leaderless = HashSet::new();
    let plans: Vec<PartitionsPlan> = results
        .iter()
        .filter_map(|(_, result)| result.as_ref().ok().cloned())
        .collect();
    if !request.validate_only && !plans.is_empty() {
        let outcomes =
            propose_topics(controller, Command::CreatePartitions { topics: plans }).await?;
        let grown: Vec<TopicId> = outcomes
            .iter()
            .filter_map(|o| o.as_ref().ok().copied())
            .collect();
        let planned = results.iter_mut().filter(|(_, result)| result.is_ok());
        for ((_, result), outcome) in planned.zip(outcomes) {
            if let Err(refusal) = outcome {
                *result = Err(refusal.into());
            }
        }
        leaderless = await_leaders(controller, &grown, request.timeout_ms).await;
    }
    let topics = results
        .into_iter()
        .map(|(name, result)| match result {
            Ok(plan) if leaderless.contains(&plan.topic_id) => v1::TopicResult {
                topic_id: uuid_bytes(plan.topic_id.0),
                ..topic_result(name, Err(timed_out()))
            },
            result => topic_result(name, result.map(|plan| plan.topic_id)),
        })
        .collect();
    Ok(v1::TopicResults { topics })
}

/// Proposes what was planned and puts refusals in place; returns the created topics.
async fn propose_plans(
    controller: &Controller,
    results: &mut [(String, Result<TopicPlan, Refused>)],
) -> Result<Vec<TopicId>, Status> {
    let plans: Vec<TopicPlan> = results
        .iter()
        .filter_map(|(_, result)| result.as_ref().ok().cloned())
        .collect();
    if plans.is_empty() {
        return Ok(Vec::new());
    }
    let outcomes = propose_topics(controller, Command::CreateTopics { topics: plans }).await?;
    let created = outcomes
        .iter()
        .filter_map(|outcome| outcome.as_ref().ok().copied())
        .collect();
    let planned = results.iter_mut().filter(|(_, result)| result.is_ok());
    for ((_, result), outcome) in planned.zip(outcomes) {
        if let Err(refusal) = outcome {
            *result = Err(refusal.into());
        }
    }
    Ok(created)
}

fn timed_out() -> Refused {
    Refused::new(
        E::TimedOut,
        "created, but not every partition has a leader yet",
    )
}

fn created_topic(
    name: String,
    result: Result<TopicPlan, Refused>,
    leaderless: &HashSet<TopicId>,
) -> v1::CreatedTopic {
    let plan = match result {
        Ok(plan) => plan,
        Err(refused) => {
            return v1::CreatedTopic {
                name,
                error: refused.error.into(),
                error_message: refused.message,
                ..Default::default()
            };
        }
    };
    let late = leaderless.contains(&plan.topic_id).then(timed_out);
    let first = plan.assignments.first().map_or(0, Vec::len);
    v1::CreatedTopic {
        name,
        error: late.as_ref().map_or(E::None, |late| late.error).into(),
        error_message: late.map(|late| late.message).unwrap_or_default(),
        topic_id: uuid_bytes(plan.topic_id.0),
        partition_count: i32::try_from(plan.assignments.len()).unwrap_or(i32::MAX),
        replication_factor: i32::try_from(first).unwrap_or(i32::MAX),
        configs: plan.configs.into_iter().collect(),
    }
}

/// Checks and places the topics of one request, one after the other.
struct Planner<'a> {
    config: &'a Config,
    image: &'a ClusterImage,
    candidates: Vec<Candidate>,
    /// Partitions that the request may still create.
    budget: usize,
}

impl<'a> Planner<'a> {
    fn new(config: &'a Config, image: &'a ClusterImage) -> Self {
        let budget = usize::try_from(config.partitions_per_request_max).unwrap_or(usize::MAX);
        Self {
            config,
            image,
            candidates: candidates(image),
            budget,
        }
    }

    fn topic(&mut self, topic: &v1::NewTopic) -> Result<TopicPlan, Refused> {
        name::check(&topic.name).map_err(|why| Refused::new(E::InvalidTopicName, why))?;
        if self.image.topic_by_name(&topic.name).is_some() {
            return Err(TopicRefusal::NameExists.into());
        }
        if topic.name.contains(['.', '_']) {
            let key = collision_key(&topic.name);
            let mut names = self.image.topic_ids.keys();
            if let Some(other) = names.find(|other| collision_key(other) == key) {
                return Err(TopicRefusal::NameCollides(other.to_string()).into());
            }
        }
        let mut configs: BTreeMap<String, String> = topic.configs.clone().into_iter().collect();
        for (name, value) in &configs {
            topic_config::validate(name, value)
                .map_err(|error| Refused::new(E::InvalidConfig, error.to_string()))?;
        }
        if topic.name == CONSUMER_OFFSETS {
            let policy = topic_config::CLEANUP_POLICY.to_owned();
            configs
                .entry(policy)
                .or_insert_with(|| "compact".to_owned());
        }
        let assignments = if topic.assignments.is_empty() {
            self.place_topic(topic)?
        } else {
            self.take(topic.assignments.len())?;
            let count = topic
                .assignments
                .first()
                .map_or(0, |list| list.broker_ids.len());
            self.given(&topic.assignments, count)?
        };
        let topic_id = TopicId(Uuid::new_v4());
        Ok(TopicPlan {
            topic_id,
            name: topic.name.clone(),
            configs,
            assignments,
        })
    }

    fn partitions(&mut self, topic: &v1::NewPartitions) -> Result<PartitionsPlan, Refused> {
        let present = self
            .image
            .topic_by_name(&topic.name)
            .ok_or_else(|| Refused::from(TopicRefusal::Unknown))?;
        let present_count = present.partitions.len();
        let total = usize::try_from(topic.total_count).unwrap_or(0);
        if total <= present_count {
            return Err(Refused::new(
                E::InvalidPartitions,
                format!("the topic has {present_count} partitions already"),
            ));
        }
        let added = total - present_count;
        self.take(added)?;
        let replication_factor = present.partitions.first().map_or(1, |p| p.replicas.len());
        let assignments = if topic.assignments.is_empty() {
            self.place(added, replication_factor)?
        } else if topic.assignments.len() == added {
            self.given(&topic.assignments, replication_factor)?
        } else {
            return Err(Refused::new(
                E::InvalidReplicaAssignment,
                format!("{added} new partitions need {added} assignments"),
            ));
        };
        Ok(PartitionsPlan {
            topic_id: present.topic_id,
            present_count,
            assignments,
        })
    }

    fn place_topic(&mut self, topic: &v1::NewTopic) -> Result<Vec<Vec<BrokerId>>, Refused> {
        let defaults = &self.config.topic_defaults;
        let partition_count = match topic.partition_count {
            -1 if topic.name == CONSUMER_OFFSETS => defaults.consumer_offsets_partition_count,
            -1 => defaults.partition_count,
            count => count,
        };
        let factor = match topic.replication_factor {
            -1 => defaults.replication_factor,
            factor => factor,
        };
        // Not lowered where there are fewer brokers, as in Kafka: a topic that was created while the
        // cluster started would have one replica for ever.
        let replication_factor = match factor {
            factor @ 1..=REPLICATION_FACTOR_MAX => usize::try_from(factor).unwrap_or(1),
            _ => {
                return Err(Refused::new(
                    E::InvalidReplicationFactor,
                    "the replication factor must be 1 or more, or -1 for the default",
                ));
            }
        };
        let partition_count = usize::try_from(partition_count)
            .ok()
            .filter(|count| *count > 0)
            .ok_or_else(|| {
                let message = "the number of partitions must be 1 or more, or -1 for the default";
                Refused::new(E::InvalidPartitions, message)
            })?;
        self.take(partition_count)?;
        self.place(partition_count, replication_factor)
    }

    fn place(
        &mut self,
        partition_count: usize,
        replication_factor: usize,
    ) -> Result<Vec<Vec<BrokerId>>, Refused> {
        place(
            &mut self.candidates,
            partition_count,
            replication_factor,
            rand::random_range(0..1024),
        )
        .map_err(|error| Refused::new(E::InvalidReplicationFactor, error.to_string()))
    }

    fn take(&mut self, partition_count: usize) -> Result<(), Refused> {
        let left = self.budget.checked_sub(partition_count);
        self.budget = left.ok_or_else(|| {
            let max = self.config.partitions_per_request_max;
            Refused::new(
                E::InvalidPartitions,
                format!("one request creates at most {max}"),
            )
        })?;
        Ok(())
    }

    /// An assignment that the client chose.
    fn given(
        &self,
        assignments: &[v1::BrokerList],
        replication_factor: usize,
    ) -> Result<Vec<Vec<BrokerId>>, Refused> {
        let invalid = |why: String| Refused::new(E::InvalidReplicaAssignment, why);
        let mut given = Vec::with_capacity(assignments.len());
        for assignment in assignments {
            let brokers: Vec<BrokerId> = assignment
                .broker_ids
                .iter()
                .copied()
                .map(BrokerId)
                .collect();
            if brokers.is_empty() || brokers.len() != replication_factor {
                return Err(invalid(
                    "every partition needs the same number of replicas, 1 or more".to_owned(),
                ));
            }
            let distinct: HashSet<_> = brokers.iter().collect();
            if distinct.len() != brokers.len() {
                return Err(invalid("a partition names a broker twice".to_owned()));
            }
            if let Some(unknown) = brokers
                .iter()
                .find(|id| !self.image.brokers.contains_key(id))
            {
                return Err(invalid(format!("broker {unknown} is not registered")));
            }
            given.push(brokers);
        }
        Ok(given)
    }
}
