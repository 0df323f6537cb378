//! AlterReassignments and ListReassignments.

use std::collections::HashSet;

use chronik_proto::v1;
use chronik_types::cluster_image::{ClusterImage, Partition, Reassignment, Topic};
use chronik_types::id::{BrokerId, PartitionIndex};
use tonic::Status;

use super::Refused;
use crate::command::{Command, Outcome, ReassignmentChange, ReassignmentRefusal};
use crate::controller::{Controller, now};
use crate::rpc::error;

type E = v1::AdminError;

/// Changes that go into one command.
const CHANGES_PER_COMMAND: usize = 5_000;

impl From<ReassignmentRefusal> for Refused {
    fn from(refusal: ReassignmentRefusal) -> Self {
        let error = match refusal {
            ReassignmentRefusal::UnknownPartition => E::UnknownPartition,
            ReassignmentRefusal::UnknownBroker(_) | ReassignmentRefusal::InvalidTarget => {
                E::InvalidReplicaAssignment
            }
            ReassignmentRefusal::NoneInProgress => E::NoReassignmentInProgress,
            ReassignmentRefusal::NeverLed => E::LeaderNotAvailable,
        };
        Self::new(error, refusal.to_string())
    }
}

pub async fn alter_reassignments(
    controller: &Controller,
    request: v1::AlterReassignmentsRequest,
) -> Result<v1::PartitionResults, Status> {
    let image = controller.image();
    let mut seen = HashSet::new();
    let mut planned: Vec<Result<ReassignmentChange, Refused>> = Vec::new();
    for asked in &request.changes {
        let is_first = seen.insert((asked.topic.as_str(), asked.partition));
        planned.push(match is_first {
            true => checked(&image, asked, &request),
            false => Err(Refused::new(
                E::DuplicateInRequest,
                "the request names the partition twice",
            )),
        });
    }
    if !request.validate_only {
        propose(controller, &mut planned).await?;
    }
    let partitions = request
        .changes
        .into_iter()
        .zip(planned)
        .map(|(asked, result)| partition_result(asked.topic, asked.partition, result.err()))
        .collect();
    Ok(v1::PartitionResults { partitions })
}

pub async fn list_reassignments(
    controller: &Controller,
    request: v1::ListReassignmentsRequest,
) -> Result<v1::ListReassignmentsResponse, Status> {
    let image = controller.image();
    let mut reassignments = Vec::new();
    if request.partitions.is_empty() {
        let mut topics: Vec<_> = image.topics.values().collect();
        topics.sort_unstable_by(|a, b| a.name.cmp(&b.name));
        for topic in topics {
            let states = topic.partitions.iter();
            reassignments.extend(states.filter_map(|p| state(controller, topic, p)));
        }
    } else {
        for wanted in &request.partitions {
            if let Some((topic, partition)) = find(&image, &wanted.topic, wanted.partition) {
                reassignments.extend(state(controller, topic, partition));
            }
        }
    }
    Ok(v1::ListReassignmentsResponse { reassignments })
}

/// The partition of that name and index.
pub fn find<'a>(
    image: &'a ClusterImage,
    topic: &str,
    partition: i32,
) -> Option<(&'a Topic, &'a Partition)> {
    let topic = image.topic_by_name(topic)?;
    Some((topic, topic.partition(PartitionIndex(partition))?))
}

/// The result of one partition on the wire.
pub fn partition_result(
    topic: String,
    partition: i32,
    refused: Option<Refused>,
) -> v1::PartitionResult {
    let (error, error_message) = match refused {
        None => (E::None, String::new()),
        Some(refused) => (refused.error, refused.message),
    };
    v1::PartitionResult {
        topic,
        partition,
        error: error.into(),
        error_message,
    }
}

fn checked(
    image: &ClusterImage,
    asked: &v1::ReassignmentChange,
    request: &v1::AlterReassignmentsRequest,
) -> Result<ReassignmentChange, Refused> {
    let (topic, partition) = find(image, &asked.topic, asked.partition)
        .ok_or_else(|| Refused::from(ReassignmentRefusal::UnknownPartition))?;
    let target: Option<Vec<BrokerId>> = asked
        .target
        .as_ref()
        .map(|target| target.broker_ids.iter().copied().map(BrokerId).collect());
    match &target {
        None if partition.reassignment.is_none() => {
            return Err(ReassignmentRefusal::NoneInProgress.into());
        }
        None => {}
        Some(target) => {
            if let Some(unknown) = target.iter().find(|id| !image.brokers.contains_key(id)) {
                return Err(ReassignmentRefusal::UnknownBroker(*unknown).into());
            }
            let distinct: HashSet<_> = target.iter().collect();
            if target.is_empty() || distinct.len() != target.len() {
                return Err(ReassignmentRefusal::InvalidTarget.into());
            }
            let present = match partition.reassignment.as_deref() {
                Some(moving) => moving.original.len(),
                None => partition.replicas.len(),
            };
            if request.keep_replication_factor && target.len() != present {
                return Err(Refused::new(
                    E::InvalidReplicationFactor,
                    format!(
                        "the partition has {present} replicas, the target {}",
                        target.len()
                    ),
                ));
            }
            if partition.leader_epoch.0 == 0 {
                return Err(ReassignmentRefusal::NeverLed.into());
            }
        }
    }
    let cause = v1::Reassignment {
        cause: request.cause,
        ..Default::default()
    };
    Ok(ReassignmentChange {
        topic_id: topic.topic_id,
        partition: partition.partition,
        target,
        cause: Reassignment::from(cause).cause,
    })
}

/// Proposes what was planned, and puts refusals in its place.
async fn propose(
    controller: &Controller,
    planned: &mut [Result<ReassignmentChange, Refused>],
) -> Result<(), Status> {
    let mut good: Vec<&mut Result<ReassignmentChange, Refused>> =
        planned.iter_mut().filter(|result| result.is_ok()).collect();
    for part in good.chunks_mut(CHANGES_PER_COMMAND) {
        let changes = part.iter().filter_map(|result| result.as_ref().ok());
        let command = Command::AlterReassignments {
            changes: changes.cloned().collect(),
        };
        let outcome = controller.propose(command).await.map_err(error::proposal)?;
        let Outcome::Reassigned(outcomes) = outcome else {
            return Err(error::unexpected("AlterReassignments"));
        };
        for (result, outcome) in part.iter_mut().zip(outcomes) {
            if let Err(refusal) = outcome {
                **result = Err(refusal.into());
            }
        }
    }
    Ok(())
}

fn state(
    controller: &Controller,
    topic: &Topic,
    partition: &Partition,
) -> Option<v1::ReassignmentState> {
    let moving = partition.reassignment.as_deref()?;
    let progress = controller.moves().to_wire(partition.raft_group_id, now());
    let ids = |brokers: Vec<BrokerId>| brokers.into_iter().map(|id| id.0).collect();
    // While a move waits its turn, its target is not there yet: Kafka's tools expect it all the same.
    let mut replicas: Vec<BrokerId> = moving.target.clone();
    replicas.extend(partition.brokers().filter(|id| !moving.target.contains(id)));
    Some(v1::ReassignmentState {
        topic: topic.name.to_string(),
        partition: partition.partition.0,
        replicas: ids(replicas),
        adding: ids(partition.adding()),
        removing: ids(partition.removing()),
        reassignment: Some(moving.into()),
        progress,
    })
}
