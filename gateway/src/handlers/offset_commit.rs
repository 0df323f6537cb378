//! OffsetCommit, versions 2 to 10; topics by name, and by id from version 10 on.

use std::collections::HashMap;

use chronik_proto::v1;
use chronik_proto::v1::GroupError;

use super::coordinator::{self, CALL_TIMEOUT};
use super::resolve;
use crate::error::{ErrorCode, group_error};
use crate::metadata_cache::Snapshot;
use crate::protocol::messages as m;
use crate::protocol::messages::StrBytes;
use crate::protocol::messages::offset_commit_response::{
    OffsetCommitResponsePartition, OffsetCommitResponseTopic,
};
use crate::protocol::produce::TopicKey;
use crate::services::Context;

const TOPIC_IDS_FROM: i16 = 10;

/// A topic of the request: how it was named, its name where known, and what is wrong with each
/// partition before the coordinator is asked.
struct Topic {
    key: TopicKey,
    name: Option<String>,
    partitions: Vec<(i32, ErrorCode)>,
}

pub async fn handle(context: Context, request: m::OffsetCommitRequest) -> m::OffsetCommitResponse {
    let snapshot = context.services.cache.load();
    let group = request.group_id.to_string();
    let mut offsets = Vec::new();
    let mut topics = Vec::with_capacity(request.topics.len());
    for topic in request.topics {
        topics.push(read_topic(&snapshot, context.version, topic, &mut offsets));
    }
    let wire = v1::CommitOffsetsRequest {
        raft_group_id: 0,
        consumer_group: group.clone(),
        generation: request.generation_id_or_member_epoch,
        member_id: request.member_id.to_string(),
        group_instance_id: request.group_instance_id.map(StrBytes::into_string),
        offsets,
        retention_ms: request.retention_time_ms,
    };
    let answer = if wire.offsets.is_empty() {
        Ok(v1::CommitOffsetsResponse::default())
    } else {
        coordinator::ask(
            &context.services,
            &group,
            CALL_TIMEOUT,
            |mut client, raft_group_id| {
                let request = v1::CommitOffsetsRequest {
                    raft_group_id,
                    ..wire.clone()
                };
                async move { client.commit_offsets(request).await }
            },
            whole_error,
        )
        .await
    };
    respond(topics, answer)
}

fn read_topic(
    snapshot: &Snapshot,
    version: i16,
    topic: m::offset_commit_request::OffsetCommitRequestTopic,
    offsets: &mut Vec<v1::OffsetToCommit>,
) -> Topic {
    let key = if version >= TOPIC_IDS_FROM {
        TopicKey::Id(m::uuid(topic.topic_id))
    } else {
        TopicKey::Name(topic.name)
    };
    let known = resolve::topic(snapshot, &key);
    let mut partitions = Vec::with_capacity(topic.partitions.len());
    for partition in topic.partitions {
        let index = partition.partition_index;
        let found = known.and_then(|topic| resolve::partition(topic, index).map(|_| topic));
        match found {
            Ok(topic) => {
                offsets.push(v1::OffsetToCommit {
                    topic_id: chronik_proto::uuid_bytes(topic.topic_id.0),
                    topic: topic.name.to_string(),
                    partition: index,
                    offset: partition.committed_offset,
                    leader_epoch: partition.committed_leader_epoch,
                    metadata: partition
                        .committed_metadata
                        .map(StrBytes::into_string)
                        .unwrap_or_default(),
                });
                partitions.push((index, ErrorCode::None));
            }
            Err(code) => partitions.push((index, code)),
        }
    }
    Topic {
        key,
        name: known.ok().map(|topic| topic.name.to_string()),
        partitions,
    }
}

/// NOT_COORDINATOR is said of every partition or of none.
fn whole_error(answer: &v1::CommitOffsetsResponse) -> GroupError {
    answer
        .results
        .first()
        .map_or(GroupError::None, v1::OffsetCommitResult::error)
}

fn respond(
    topics: Vec<Topic>,
    answer: Result<v1::CommitOffsetsResponse, ErrorCode>,
) -> m::OffsetCommitResponse {
    let results: Result<HashMap<(String, i32), ErrorCode>, ErrorCode> = answer.map(|answer| {
        let result = |r: v1::OffsetCommitResult| {
            let error = group_error(r.error());
            ((r.topic, r.partition), error)
        };
        answer.results.into_iter().map(result).collect()
    });
    let topics = topics
        .into_iter()
        .map(|topic| {
            let name = topic.name.unwrap_or_default();
            let partitions = topic
                .partitions
                .into_iter()
                .map(|(index, before)| {
                    let error = match (&results, before) {
                        (Ok(results), ErrorCode::None) => results
                            .get(&(name.clone(), index))
                            .copied()
                            // Sent, and not mentioned in the answer.
                            .unwrap_or(ErrorCode::RequestTimedOut),
                        (Err(code), ErrorCode::None) => *code,
                        (_, before) => before,
                    };
                    message!(OffsetCommitResponsePartition {
                        partition_index: index,
                        error_code: error.code(),
                    })
                })
                .collect();
            match topic.key {
                TopicKey::Name(name) => {
                    message!(OffsetCommitResponseTopic {
                        name: name,
                        partitions: partitions
                    })
                }
                TopicKey::Id(id) => message!(OffsetCommitResponseTopic {
                    topic_id: m::wire_uuid(id),
                    partitions: partitions,
                }),
            }
        })
        .collect();
    message!(m::OffsetCommitResponse { topics: topics })
}
