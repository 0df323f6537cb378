//! OffsetFetch, versions 1 to 10: one group, several groups from version 8 on, and topic ids in
//! version 10.

use std::collections::BTreeMap;

use chronik_proto::v1;
use chronik_proto::v1::GroupError;

use super::coordinator::{self, CALL_TIMEOUT};
use super::resolve;
use crate::error::{ErrorCode, group_error};
use crate::metadata_cache::Snapshot;
use crate::protocol::messages as m;
use crate::protocol::messages::StrBytes;
use crate::protocol::messages::offset_fetch_response::{
    OffsetFetchResponseGroup, OffsetFetchResponsePartition, OffsetFetchResponsePartitions,
    OffsetFetchResponseTopic, OffsetFetchResponseTopics,
};
use crate::protocol::produce::TopicKey;
use crate::services::Context;

/// From this version on several groups are asked for at once.
const BATCHES_FROM: i16 = 8;
const TOPIC_IDS_FROM: i16 = 10;
/// From this version on there is an error for the whole request.
const TOP_ERROR_FROM: i16 = 2;

/// What one group was asked for. None: everything.
struct Asked {
    group: String,
    member_id: Option<String>,
    member_epoch: i32,
    topics: Option<Vec<(TopicKey, Vec<i32>)>>,
}

/// One partition's answer.
struct Committed {
    partition: i32,
    offset: i64,
    leader_epoch: i32,
    metadata: String,
    error: ErrorCode,
}

/// One group's answer: topics in the order asked.
struct Answer {
    error: ErrorCode,
    topics: Vec<(TopicKey, Vec<Committed>)>,
}

pub async fn handle(context: Context, request: m::OffsetFetchRequest) -> m::OffsetFetchResponse {
    let require_stable = request.require_stable;
    if context.version < BATCHES_FROM {
        let asked = Asked {
            group: request.group_id.to_string(),
            member_id: None,
            member_epoch: -1,
            topics: request.topics.map(|topics| {
                topics
                    .into_iter()
                    .map(|topic| (TopicKey::Name(topic.name), topic.partition_indexes))
                    .collect()
            }),
        };
        return one_group(
            context.version,
            ask_group(&context, asked, require_stable).await,
        );
    }
    let mut groups = Vec::with_capacity(request.groups.len());
    for group in request.groups {
        let asked = read_group(group, context.version);
        let name = asked.group.clone();
        groups.push(group_response(
            name,
            ask_group(&context, asked, require_stable).await,
        ));
    }
    message!(m::OffsetFetchResponse { groups: groups })
}

fn read_group(group: m::offset_fetch_request::OffsetFetchRequestGroup, version: i16) -> Asked {
    let key = |name: StrBytes, id: m::WireUuid| {
        if version >= TOPIC_IDS_FROM {
            TopicKey::Id(m::uuid(id))
        } else {
            TopicKey::Name(name)
        }
    };
    Asked {
        group: group.group_id.to_string(),
        member_id: group.member_id.map(StrBytes::into_string),
        member_epoch: group.member_epoch,
        topics: group.topics.map(|topics| {
            topics
                .into_iter()
                .map(|topic| (key(topic.name, topic.topic_id), topic.partition_indexes))
                .collect()
        }),
    }
}

async fn ask_group(context: &Context, asked: Asked, require_stable: bool) -> Answer {
    let snapshot = context.services.cache.load();
    let named = |key: &TopicKey| match key {
        // A name is passed on as it is: offsets outlive their topic.
        TopicKey::Name(name) => Some(name.to_string()),
        TopicKey::Id(_) => resolve::topic(&snapshot, key)
            .ok()
            .map(|t| t.name.to_string()),
    };
    let wanted: Vec<v1::TopicPartitions> = asked
        .topics
        .iter()
        .flatten()
        .filter_map(|(key, partitions)| {
            Some(v1::TopicPartitions {
                topic: named(key)?,
                partitions: partitions.clone(),
            })
        })
        .collect();
    let wire = v1::GroupOffsetsRequest {
        raft_group_id: 0,
        consumer_group: asked.group.clone(),
        member_id: asked.member_id,
        member_epoch: asked.member_epoch,
        all_topics: asked.topics.is_none(),
        topics: wanted,
    };
    let answer = coordinator::ask(
        &context.services,
        &asked.group,
        CALL_TIMEOUT,
        |mut client, raft_group_id| {
            let group = v1::GroupOffsetsRequest {
                raft_group_id,
                ..wire.clone()
            };
            let request = v1::FetchOffsetsRequest {
                groups: vec![group],
                require_stable,
            };
            async move { client.fetch_offsets(request).await }
        },
        group_error_of,
    )
    .await;
    let offsets = match answer {
        Ok(answer) => match group_error_of(&answer) {
            GroupError::None => answer.groups.into_iter().flat_map(|g| g.offsets).collect(),
            error => return failed(asked.topics, group_error(error)),
        },
        Err(code) => return failed(asked.topics, code),
    };
    let topics = match asked.topics {
        Some(topics) => requested(topics, offsets, named),
        None => everything(&snapshot, context.version, offsets),
    };
    Answer {
        error: ErrorCode::None,
        topics,
    }
}

fn group_error_of(answer: &v1::FetchOffsetsResponse) -> GroupError {
    answer
        .groups
        .first()
        .map_or(GroupError::NotCoordinator, v1::GroupOffsets::error)
}

fn nothing(partition: i32, error: ErrorCode) -> Committed {
    Committed {
        partition,
        offset: -1,
        leader_epoch: -1,
        metadata: String::new(),
        error,
    }
}

fn failed(topics: Option<Vec<(TopicKey, Vec<i32>)>>, error: ErrorCode) -> Answer {
    let topics = topics
        .into_iter()
        .flatten()
        .map(|(key, partitions)| {
            (
                key,
                partitions.into_iter().map(|p| nothing(p, error)).collect(),
            )
        })
        .collect();
    Answer { error, topics }
}

fn requested(
    topics: Vec<(TopicKey, Vec<i32>)>,
    offsets: Vec<v1::CommittedOffset>,
    named: impl Fn(&TopicKey) -> Option<String>,
) -> Vec<(TopicKey, Vec<Committed>)> {
    let mut found: BTreeMap<(String, i32), v1::CommittedOffset> = offsets
        .into_iter()
        .map(|o| ((o.topic.clone(), o.partition), o))
        .collect();
    topics
        .into_iter()
        .map(|(key, partitions)| {
            let name = named(&key);
            let answers = partitions
                .into_iter()
                .map(|partition| match &name {
                    None => nothing(partition, ErrorCode::UnknownTopicId),
                    Some(name) => match found.remove(&(name.clone(), partition)) {
                        Some(offset) => committed(offset),
                        None => nothing(partition, ErrorCode::None),
                    },
                })
                .collect();
            (key, answers)
        })
        .collect()
}

/// All offsets of a group. Version 10 can only name topics that still exist.
fn everything(
    snapshot: &Snapshot,
    version: i16,
    offsets: Vec<v1::CommittedOffset>,
) -> Vec<(TopicKey, Vec<Committed>)> {
    let mut topics: BTreeMap<String, Vec<Committed>> = BTreeMap::new();
    for offset in offsets {
        topics
            .entry(offset.topic.clone())
            .or_default()
            .push(committed(offset));
    }
    topics
        .into_iter()
        .filter_map(|(name, offsets)| {
            let key = if version >= TOPIC_IDS_FROM {
                TopicKey::Id(snapshot.image.topic_by_name(&name)?.topic_id.0)
            } else {
                TopicKey::Name(name.into())
            };
            Some((key, offsets))
        })
        .collect()
}

fn committed(offset: v1::CommittedOffset) -> Committed {
    Committed {
        partition: offset.partition,
        offset: offset.offset,
        leader_epoch: offset.leader_epoch,
        metadata: offset.metadata,
        error: ErrorCode::None,
    }
}

fn one_group(version: i16, answer: Answer) -> m::OffsetFetchResponse {
    let topics = answer
        .topics
        .into_iter()
        .filter_map(|(key, offsets)| match key {
            TopicKey::Name(name) => Some((name, offsets)),
            TopicKey::Id(_) => None,
        })
        .map(|(name, offsets)| {
            let partitions = offsets
                .into_iter()
                .map(|o| {
                    message!(OffsetFetchResponsePartition {
                        partition_index: o.partition,
                        committed_offset: o.offset,
                        committed_leader_epoch: o.leader_epoch,
                        metadata: Some(o.metadata.into()),
                        error_code: o.error.code(),
                    })
                })
                .collect();
            message!(OffsetFetchResponseTopic {
                name: name,
                partitions: partitions
            })
        })
        .collect();
    let error_code = if version >= TOP_ERROR_FROM {
        answer.error.code()
    } else {
        0
    };
    message!(m::OffsetFetchResponse {
        topics: topics,
        error_code: error_code
    })
}

fn group_response(group: String, answer: Answer) -> OffsetFetchResponseGroup {
    let topics = answer
        .topics
        .into_iter()
        .map(|(key, offsets)| {
            let partitions = offsets
                .into_iter()
                .map(|o| {
                    message!(OffsetFetchResponsePartitions {
                        partition_index: o.partition,
                        committed_offset: o.offset,
                        committed_leader_epoch: o.leader_epoch,
                        metadata: Some(o.metadata.into()),
                        error_code: o.error.code(),
                    })
                })
                .collect();
            match key {
                TopicKey::Name(name) => {
                    message!(OffsetFetchResponseTopics {
                        name: name,
                        partitions: partitions
                    })
                }
                TopicKey::Id(id) => message!(OffsetFetchResponseTopics {
                    topic_id: m::wire_uuid(id),
                    partitions: partitions,
                }),
            }
        })
        .collect();
    message!(OffsetFetchResponseGroup {
        group_id: group.into(),
        topics: topics,
        error_code: answer.error.code(),
    })
}
