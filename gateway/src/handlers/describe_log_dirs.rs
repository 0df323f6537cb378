//! DescribeLogDirs, versions 1 to 5: the one log dir of each broker that the client's endpoint stands for,
//! as that broker tells it.

use std::collections::{BTreeMap, HashMap};

use chronik_proto::v1;
use chronik_types::cluster_image::{ClusterImage, Partition, Topic};
use chronik_types::id::BrokerId;
use futures::future::join_all;
use tokio::time::timeout;

use super::coordinator::CALL_TIMEOUT;
use crate::error::ErrorCode;
use crate::protocol::messages as m;
use crate::protocol::messages::describe_log_dirs_response::{
    DescribeLogDirsPartition, DescribeLogDirsResult, DescribeLogDirsTopic,
};
use crate::services::{Context, Services};

pub async fn handle(
    context: Context,
    request: m::DescribeLogDirsRequest,
) -> m::DescribeLogDirsResponse {
    let services = &context.services;
    let snapshot = services.cache.load();
    let mut brokers = snapshot.endpoints.brokers_at(&context.origin.endpoint);
    if brokers.is_empty() {
        // An endpoint that stands for no broker is one that clients only start from.
        brokers = snapshot.image.brokers.keys().copied().collect();
    }
    let answers = join_all(brokers.into_iter().map(|id| describe(services, id))).await;
    let names = names(&snapshot.image, &request);
    let results = answers.into_iter().map(|answer| match answer {
        Some(answer) => result(answer, &names),
        // Kafka's admin client takes no other error of a folder, and gives the whole answer up at one.
        None => message!(DescribeLogDirsResult {
            error_code: ErrorCode::KafkaStorageError.code()
        }),
    });
    message!(m::DescribeLogDirsResponse {
        results: results.collect()
    })
}

/// What a broker has; None where it does not answer.
async fn describe(services: &Services, broker_id: BrokerId) -> Option<v1::DescribeLogsResponse> {
    let mut client = services.router.link(broker_id)?.data();
    let asked = client.describe_logs(v1::DescribeLogsRequest {});
    let answer = timeout(CALL_TIMEOUT, asked).await.ok()?.ok()?;
    Some(answer.into_inner())
}

/// Topic and partition of each Raft group that is asked for; all, where none is named.
fn names<'a>(
    image: &'a ClusterImage,
    request: &m::DescribeLogDirsRequest,
) -> HashMap<u64, (&'a str, i32)> {
    let mut names = HashMap::new();
    match &request.topics {
        None => {
            for topic in image.topics.values() {
                names.extend(topic.partitions.iter().map(|one| named(topic, one)));
            }
        }
        Some(topics) => {
            for wanted in topics {
                let Some(topic) = image.topic_by_name(&wanted.topic) else {
                    continue;
                };
                let partitions = wanted.partitions.iter();
                let found = partitions.filter_map(|index| topic.partition((*index).into()));
                names.extend(found.map(|one| named(topic, one)));
            }
        }
    }
    names
}

/// The partition's Raft group, and what clients call the partition.
fn named<'a>(topic: &'a Topic, partition: &Partition) -> (u64, (&'a str, i32)) {
    let index = partition.partition.0;
    (partition.raft_group_id.0, (&*topic.name, index))
}

fn result(
    answer: v1::DescribeLogsResponse,
    names: &HashMap<u64, (&str, i32)>,
) -> DescribeLogDirsResult {
    let mut topics: BTreeMap<&str, Vec<DescribeLogDirsPartition>> = BTreeMap::new();
    for log in &answer.logs {
        // A log of a topic that is deleted, or newer than this gateway's image.
        let Some((topic, index)) = names.get(&log.raft_group_id) else {
            continue;
        };
        topics
            .entry(topic)
            .or_default()
            .push(message!(DescribeLogDirsPartition {
                partition_index: *index,
                partition_size: to_i64(log.size_bytes),
                offset_lag: to_i64(log.offset_lag),
                is_future_key: false,
            }));
    }
    let topics = topics.into_iter().map(|(name, partitions)| {
        message!(DescribeLogDirsTopic {
            name: name.to_owned().into(),
            partitions: partitions
        })
    });
    message!(DescribeLogDirsResult {
        error_code: ErrorCode::None.code(),
        log_dir: answer.folder.into(),
        topics: topics.collect(),
        total_bytes: to_i64(answer.total_bytes),
        usable_bytes: to_i64(answer.available_bytes),
    })
}

fn to_i64(number: u64) -> i64 {
    i64::try_from(number).unwrap_or(i64::MAX)
}
