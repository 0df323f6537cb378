//! DeleteRecords, versions 0 to 2 (KIP-107).
//!
//! Invariant: success is told only where the leader said that the new log start offset is committed.

use std::collections::{HashMap, HashSet};

use chronik_proto::v1;
use chronik_proto::v1::PartitionError;
use chronik_types::cluster_image::{Partition, Topic};
use chronik_types::topic_config;
use futures::FutureExt;

use super::resolve;
use super::topic_results::timeout_ms;
use crate::controller_client::call_error;
use crate::error::{CallError, ErrorCode, produce_call_error, produce_error};
use crate::leader_router::{LeaderAnswer, Question, ask_leaders};
use crate::protocol::messages as m;
use crate::protocol::messages::delete_records_response::{
    DeleteRecordsPartitionResult, DeleteRecordsTopicResult,
};
use crate::protocol::produce::TopicKey;
use crate::services::Context;

/// Kafka's "not known", where there is an error.
const NO_LOW_WATERMARK: i64 = -1;

impl LeaderAnswer for v1::PartitionDeleteRecordsResult {
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

pub async fn handle(
    context: Context,
    request: m::DeleteRecordsRequest,
) -> m::DeleteRecordsResponse {
    let services = &context.services;
    let snapshot = services.cache.load();
    let timeout_ms = timeout_ms(request.timeout_ms);
    let mut questions = Vec::new();
    let mut seen = HashSet::new();
    let mut topics = Vec::with_capacity(request.topics.len());
    for topic in &request.topics {
        let key = TopicKey::Name(topic.name.clone());
        let mut asked = Vec::with_capacity(topic.partitions.len());
        for partition in &topic.partitions {
            let found = resolve::topic(&snapshot, &key)
                .and_then(|topic| deletable(topic, partition.partition_index));
            let group = found.and_then(|found| {
                let raft_group_id = found.raft_group_id.0;
                if !seen.insert(raft_group_id) {
                    return Err(ErrorCode::InvalidRequest);
                }
                let question = v1::PartitionDeleteRecords {
                    raft_group_id,
                    before_offset: partition.offset,
                };
                questions.push(Question {
                    partition: found.clone(),
                    question,
                });
                Ok(raft_group_id)
            });
            asked.push((partition.partition_index, group));
        }
        topics.push((topic.name.clone(), asked));
    }
    let mut answers = ask_leaders(&services.router, &questions, |link, partitions| {
        async move {
            let request = v1::DeleteRecordsRequest {
                timeout_ms,
                partitions,
            };
            let answer = link.data().delete_records(request).await;
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
                .map(|(index, group)| answer(index, group, &mut answers))
                .collect();
            message!(DeleteRecordsTopicResult {
                name: name,
                partitions: partitions
            })
        })
        .collect();
    message!(m::DeleteRecordsResponse { topics: topics })
}

/// The partition, if its records may be deleted: as in Apache Kafka not those of internal topics,
/// nor of topics that are only compacted.
fn deletable(topic: &Topic, index: i32) -> Result<&Partition, ErrorCode> {
    let partition = resolve::partition(topic, index)?;
    if topic.is_internal() {
        return Err(ErrorCode::InvalidTopic);
    }
    if !topic_config::has_cleanup(&topic.configs, "delete") {
        return Err(ErrorCode::PolicyViolation);
    }
    Ok(partition)
}

fn answer(
    index: i32,
    group: Result<u64, ErrorCode>,
    answers: &mut HashMap<u64, Result<v1::PartitionDeleteRecordsResult, CallError>>,
) -> DeleteRecordsPartitionResult {
    let mut response = message!(DeleteRecordsPartitionResult {
        partition_index: index,
        low_watermark: NO_LOW_WATERMARK,
    });
    let error = match group.map(|group| answers.remove(&group)) {
        Err(code) => code,
        Ok(None) => ErrorCode::LeaderNotAvailable,
        Ok(Some(Err(error))) => produce_call_error(&error),
        Ok(Some(Ok(result))) => {
            let error = produce_error(result.error());
            if error == ErrorCode::None {
                response.low_watermark = result.log_start_offset;
            }
            error
        }
    };
    response.error_code = error.code();
    response
}
