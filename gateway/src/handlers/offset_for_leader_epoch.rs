//! OffsetForLeaderEpoch, versions 2 to 4 (KIP-320).

use std::collections::HashMap;

use chronik_proto::v1;
use chronik_proto::v1::PartitionError;
use futures::FutureExt;

use super::resolve;
use crate::controller_client::call_error;
use crate::error::{CallError, ErrorCode, read_error};
use crate::leader_router::{LeaderAnswer, Question, ask_leaders};
use crate::protocol::messages as m;
use crate::protocol::messages::offset_for_leader_epoch_response::{
    EpochEndOffset, OffsetForLeaderTopicResult,
};
use crate::protocol::produce::TopicKey;
use crate::services::Context;

impl LeaderAnswer for v1::PartitionEpochEndOffset {
    fn raft_group_id(&self) -> u64 {
        self.raft_group_id
    }

    fn error(&self) -> PartitionError {
        self.error()
    }

    fn leader(&self) -> Option<&v1::Leader> {
        None
    }
}

pub async fn handle(
    context: Context,
    request: m::OffsetForLeaderEpochRequest,
) -> m::OffsetForLeaderEpochResponse {
    let services = &context.services;
    let snapshot = services.cache.load();
    let mut questions = Vec::new();
    let mut topics = Vec::with_capacity(request.topics.len());
    for topic in &request.topics {
        let key = TopicKey::Name(topic.topic.clone());
        let mut asked = Vec::with_capacity(topic.partitions.len());
        for partition in &topic.partitions {
            let found = resolve::topic(&snapshot, &key)
                .and_then(|topic| resolve::partition(topic, partition.partition));
            let group = found.map(|found| {
                let raft_group_id = found.raft_group_id.0;
                let question = v1::PartitionLeaderEpoch {
                    raft_group_id,
                    current_leader_epoch: partition.current_leader_epoch,
                    leader_epoch: partition.leader_epoch,
                };
                questions.push(Question {
                    partition: found.clone(),
                    question,
                });
                raft_group_id
            });
            asked.push((partition.partition, group));
        }
        topics.push((topic.topic.clone(), asked));
    }
    let answers = ask_leaders(&services.router, &questions, |link, partitions| {
        async move {
            let request = v1::OffsetForLeaderEpochRequest { partitions };
            let answer = link.data().offset_for_leader_epoch(request).await;
            answer
                .map(|a| a.into_inner().partitions)
                .map_err(|status| call_error(&status))
        }
        .boxed()
    })
    .await;
    let topics = topics
        .into_iter()
        .map(|(topic, asked)| {
            let partitions = asked
                .into_iter()
                .map(|(index, group)| answer(index, group, &answers))
                .collect();
            message!(OffsetForLeaderTopicResult {
                topic: topic,
                partitions: partitions
            })
        })
        .collect();
    message!(m::OffsetForLeaderEpochResponse { topics: topics })
}

fn answer(
    index: i32,
    group: Result<u64, ErrorCode>,
    answers: &HashMap<u64, Result<v1::PartitionEpochEndOffset, CallError>>,
) -> EpochEndOffset {
    let mut response = message!(EpochEndOffset {
        partition: index,
        leader_epoch: -1,
        end_offset: -1
    });
    let error = match group.map(|group| answers.get(&group)) {
        Err(code) => code,
        Ok(None | Some(Err(_))) => ErrorCode::NotLeaderOrFollower,
        Ok(Some(Ok(result))) => {
            let error = read_error(result.error());
            if error == ErrorCode::None
                && let Some(end) = &result.end
            {
                response.leader_epoch = end.leader_epoch;
                response.end_offset = end.end_offset;
            }
            error
        }
    };
    response.error_code = error.code();
    response
}
