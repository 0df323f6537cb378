//! ListOffsets, versions 1 to 11.

use std::collections::{HashMap, HashSet};

use chronik_proto::v1;
use chronik_proto::v1::PartitionError;
use futures::FutureExt;

use super::resolve;
use crate::controller_client::call_error;
use crate::error::{CallError, ErrorCode, read_error};
use crate::leader_router::{LeaderAnswer, Question, ask_leaders};
use crate::metadata_cache::Snapshot;
use crate::protocol::messages as m;
use crate::protocol::messages::list_offsets_response::{
    ListOffsetsPartitionResponse, ListOffsetsTopicResponse,
};
use crate::protocol::produce::TopicKey;
use crate::services::Context;

const READ_COMMITTED: i8 = 1;
/// From this version on there are leader epochs.
const LEADER_EPOCHS_FROM: i16 = 4;

impl LeaderAnswer for v1::PartitionListOffsetsResult {
    fn raft_group_id(&self) -> u64 {
        self.raft_group_id
    }

    fn error(&self) -> PartitionError {
        self.error()
    }

    fn leader(&self) -> Option<&v1::Leader> {
        self.leader.as_ref()
    }
}

pub async fn handle(context: Context, request: m::ListOffsetsRequest) -> m::ListOffsetsResponse {
    let services = &context.services;
    let snapshot = services.cache.load();
    let read_committed = request.isolation_level == READ_COMMITTED;
    let mut questions = Vec::new();
    let mut seen = HashSet::new();
    let mut topics = Vec::with_capacity(request.topics.len());
    for topic in &request.topics {
        let key = TopicKey::Name(topic.name.clone());
        let mut asked = Vec::with_capacity(topic.partitions.len());
        for partition in &topic.partitions {
            let current_leader_epoch = if context.version < LEADER_EPOCHS_FROM {
                -1
            } else {
                partition.current_leader_epoch
            };
            let question = ask(&snapshot, &key, partition.partition_index).and_then(|found| {
                let first = seen.insert(found.raft_group_id.0);
                if first {
                    Ok(found)
                } else {
                    Err(ErrorCode::InvalidRequest)
                }
            });
            let group = question.map(|found| {
                let raft_group_id = found.raft_group_id.0;
                let timestamp = partition.timestamp;
                let question = v1::PartitionListOffsets {
                    raft_group_id,
                    current_leader_epoch,
                    timestamp,
                };
                questions.push(Question {
                    partition: found,
                    question,
                });
                raft_group_id
            });
            asked.push((partition.partition_index, group));
        }
        topics.push((topic.name.clone(), asked));
    }
    let mut answers = ask_leaders(&services.router, &questions, |link, partitions| {
        async move {
            let request = v1::ListOffsetsRequest {
                read_committed,
                partitions,
            };
            let answer = link.data().list_offsets(request).await;
            answer
                .map(|a| a.into_inner().partitions)
                .map_err(|status| call_error(&status))
        }
        .boxed()
    })
    .await;
    let topics = topics
        .into_iter()
        .map(|(name, asked)| {
            let partitions = asked
                .into_iter()
                .map(|(index, group)| answer(index, group, &mut answers, context.version))
                .collect();
            message!(ListOffsetsTopicResponse {
                name: name,
                partitions: partitions
            })
        })
        .collect();
    message!(m::ListOffsetsResponse { topics: topics })
}

fn ask(
    snapshot: &Snapshot,
    key: &TopicKey,
    index: i32,
) -> Result<chronik_types::cluster_image::Partition, ErrorCode> {
    resolve::partition(resolve::topic(snapshot, key)?, index).cloned()
}

fn answer(
    index: i32,
    group: Result<u64, ErrorCode>,
    answers: &mut HashMap<u64, Result<v1::PartitionListOffsetsResult, CallError>>,
    version: i16,
) -> ListOffsetsPartitionResponse {
    let mut response = message!(ListOffsetsPartitionResponse {
        partition_index: index,
        timestamp: -1,
        offset: -1,
        leader_epoch: -1,
    });
    let error = match group.map(|group| answers.remove(&group)) {
        Err(code) => code,
        Ok(None) => ErrorCode::LeaderNotAvailable,
        Ok(Some(Err(_))) => ErrorCode::NotLeaderOrFollower,
        Ok(Some(Ok(result))) => {
            let error = read_error(result.error());
            if error == ErrorCode::None {
                response.timestamp = result.timestamp;
                response.offset = result.offset;
                if version >= LEADER_EPOCHS_FROM {
                    response.leader_epoch = result.leader_epoch;
                }
            }
            error
        }
    };
    response.error_code = error.code();
    response
}
