//! ElectLeaders: preferred leaders, at once instead of after the rebalancer's delay.

use std::collections::HashSet;
use std::time::Duration;

use chronik_proto::v1;
use chronik_types::cluster_image::{ClusterImage, Partition};
use chronik_types::id::{BrokerId, PartitionIndex, TopicId};
use tonic::Status;

use super::reassignments::{find, partition_result};
use super::{Refused, WAIT_MAX};
use crate::command::{Command, WantedLeader};
use crate::controller::Controller;
use crate::rebalance::{at, preferred_leader};
use crate::rpc::error;

type E = v1::AdminError;

/// Leaders asked for in one command.
const LEADERS_PER_COMMAND: usize = 5_000;

/// A partition that was asked for, by what it is called and by what it is.
struct Asked {
    topic: String,
    partition: i32,
    result: Result<Wanted, Refused>,
}

#[derive(Clone, Copy)]
struct Wanted {
    topic_id: TopicId,
    partition: PartitionIndex,
    leader: BrokerId,
}

pub async fn elect_leaders(
    controller: &Controller,
    request: v1::ElectLeadersRequest,
) -> Result<v1::PartitionResults, Status> {
    let image = controller.image();
    let mut asked = if request.all {
        all_misled(&image)
    } else {
        named(&image, &request.partitions)
    };
    if request.unclean {
        for one in &mut asked {
            one.result = Err(Refused::new(
                E::UncleanElectionUnsupported,
                "a leader without a majority of the replicas could lose what was acknowledged; \
                 bring a majority back, or restore the topic",
            ));
        }
    }
    let wanted: Vec<Wanted> = asked
        .iter()
        .filter_map(|one| one.result.as_ref().ok().copied())
        .collect();
    for part in wanted.chunks(LEADERS_PER_COMMAND) {
        let leaders = part.iter().filter_map(|wanted| {
            let partition = image.topic(wanted.topic_id)?.partition(wanted.partition)?;
            Some(WantedLeader {
                at: at(wanted.topic_id, partition),
                leader: Some(wanted.leader),
            })
        });
        let command = Command::SetWantedLeaders {
            leaders: leaders.collect(),
        };
        controller.propose(command).await.map_err(error::proposal)?;
    }
    await_elected(controller, &wanted, request.timeout_ms).await;
    let image = controller.image();
    let partitions = asked
        .into_iter()
        .map(|one| {
            let refused = match one.result {
                Ok(wanted) if leads(&image, &wanted) => None,
                Ok(_) => Some(Refused::new(
                    E::TimedOut,
                    "the leader was asked to hand over and has not done so yet",
                )),
                Err(refused) => Some(refused),
            };
            partition_result(one.topic, one.partition, refused)
        })
        .collect();
    Ok(v1::PartitionResults { partitions })
}

fn named(image: &ClusterImage, partitions: &[v1::PartitionRef]) -> Vec<Asked> {
    let mut seen = HashSet::new();
    let mut asked = Vec::with_capacity(partitions.len());
    for wanted in partitions {
        if !seen.insert((wanted.topic.as_str(), wanted.partition)) {
            continue;
        }
        let result = match find(image, &wanted.topic, wanted.partition) {
            Some((topic, partition)) => checked(image, topic.topic_id, partition),
            None => Err(Refused::new(
                E::UnknownPartition,
                "there is no such partition",
            )),
        };
        asked.push(Asked {
            topic: wanted.topic.clone(),
            partition: wanted.partition,
            result,
        });
    }
    asked
}

/// Every partition whose preferred leader does not lead.
fn all_misled(image: &ClusterImage) -> Vec<Asked> {
    let topics = image.topics.values();
    let partitions = topics.flat_map(|t| t.partitions.iter().map(move |p| (t, p)));
    partitions
        .filter(|(_, partition)| partition.leader != preferred_leader(partition))
        .map(|(topic, partition)| Asked {
            topic: topic.name.to_string(),
            partition: partition.partition.0,
            result: checked(image, topic.topic_id, partition),
        })
        .collect()
}

fn checked(
    image: &ClusterImage,
    topic_id: TopicId,
    partition: &Partition,
) -> Result<Wanted, Refused> {
    let unavailable = |why: &str| Refused::new(E::PreferredLeaderNotAvailable, why);
    let leader = preferred_leader(partition).ok_or_else(|| unavailable("there is none"))?;
    if partition.leader == Some(leader) {
        let why = "the preferred leader leads already";
        return Err(Refused::new(E::ElectionNotNeeded, why));
    }
    if !image.is_live(leader) || !partition.isr.contains(&leader) {
        return Err(unavailable("the preferred leader is not in sync"));
    }
    if partition.leader.is_none() {
        return Err(Refused::new(
            E::LeaderNotAvailable,
            "the partition has no leader; one is elected as soon as a majority of its replicas is up",
        ));
    }
    Ok(Wanted {
        topic_id,
        partition: partition.partition,
        leader,
    })
}

fn leads(image: &ClusterImage, wanted: &Wanted) -> bool {
    let partition = image
        .topic(wanted.topic_id)
        .and_then(|topic| topic.partition(wanted.partition));
    partition.is_some_and(|partition| partition.leader == Some(wanted.leader))
}

async fn await_elected(controller: &Controller, wanted: &[Wanted], timeout_ms: u32) {
    let mut images = controller.feed().subscribe();
    let all = images.wait_for(|image| wanted.iter().all(|wanted| leads(image, wanted)));
    let limit = Duration::from_millis(u64::from(timeout_ms)).min(WAIT_MAX);
    // What is not so by then is told partition by partition.
    let _ = tokio::time::timeout(limit, all).await;
}
