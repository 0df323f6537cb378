//! States of partitions that need attention: one definition for REST and metrics, and the same as
//! that of Kafka's kafka-topics; but that a partition whose majority is gone is offline, since its leader
//! commits nothing, and has stepped down.

use chronik_types::cluster_image::{ClusterImage, Partition, Topic};
use chronik_types::id::ReplicaId;
use chronik_types::topic_config;

use super::dto::PartitionState;
use crate::rebalance::preferred_leader;

/// What acks=all needs.
pub fn min_insync_replicas(topic: &Topic) -> usize {
    let name = topic_config::MIN_INSYNC_REPLICAS;
    let number = topic_config::effective_number(&topic.configs, name);
    usize::try_from(number).unwrap_or(0).max(1)
}

pub fn is_in(
    image: &ClusterImage,
    topic: &Topic,
    partition: &Partition,
    state: PartitionState,
) -> bool {
    let is_led = partition.leader.is_some_and(|leader| image.is_live(leader));
    match state {
        PartitionState::UnderReplicated => partition.is_under_replicated(),
        PartitionState::UnderMinIsr => partition.isr.len() < min_insync_replicas(topic),
        PartitionState::AtMinIsr => partition.isr.len() == min_insync_replicas(topic),
        PartitionState::Offline => !is_led || lacks_majority(image, partition),
        PartitionState::Reassigning => partition.reassignment.is_some(),
        PartitionState::NotPreferredLeader => {
            is_led && partition.leader != preferred_leader(partition)
        }
    }
}

/// No leader can commit. Of a partition that is being moved it is not known here which replicas vote.
fn lacks_majority(image: &ClusterImage, partition: &Partition) -> bool {
    let is_live = |replica: &&ReplicaId| image.is_live(replica.broker_id);
    let live = partition.replicas.iter().filter(is_live).count();
    partition.reassignment.is_none() && live <= partition.replicas.len() / 2
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use chronik_types::cluster_image::{Broker, Drain};
    use chronik_types::epoch::BrokerEpoch;
    use chronik_types::id::{BrokerId, TopicId};
    use uuid::Uuid;

    use super::*;
    use PartitionState::{
        AtMinIsr, NotPreferredLeader, Offline, Reassigning, UnderMinIsr, UnderReplicated,
    };

    fn check(isr: &[i32], leader: Option<i32>, min: &str, expected: &[PartitionState]) {
        check_without(&[3], isr, leader, min, expected);
    }

    fn check_without(
        fenced: &[i32],
        isr: &[i32],
        leader: Option<i32>,
        min: &str,
        expected: &[PartitionState],
    ) {
        let mut image = ClusterImage::default();
        for id in 1..=3 {
            let broker = Broker {
                broker_id: BrokerId(id),
                incarnation_id: Uuid::nil(),
                broker_epoch: BrokerEpoch(1),
                rpc_address: String::new(),
                rack: None,
                fenced: fenced.contains(&id),
                drain: Drain::None,
            };
            image.brokers.insert(broker.broker_id, broker);
        }
        let replica = |id| ReplicaId {
            broker_id: BrokerId(id),
            incarnation: 1,
        };
        let partition = Partition {
            replicas: vec![replica(1), replica(2), replica(3)],
            isr: isr.iter().copied().map(BrokerId).collect(),
            leader: leader.map(BrokerId),
            ..Partition::default()
        };
        let topic = Topic {
            topic_id: TopicId(Uuid::nil()),
            name: "t".into(),
            configs: BTreeMap::from([("min.insync.replicas".to_owned(), min.to_owned())]),
            partitions: vec![partition.clone()],
        };
        let all = [
            UnderReplicated,
            UnderMinIsr,
            AtMinIsr,
            Offline,
            Reassigning,
            NotPreferredLeader,
        ];
        let found = all
            .into_iter()
            .filter(|state| is_in(&image, &topic, &partition, *state));
        assert_eq!(found.collect::<Vec<_>>(), expected, "{isr:?} {leader:?}");
    }

    #[test]
    fn each_state_means_what_kafka_topics_means_by_it() {
        check(&[1, 2, 3], Some(1), "2", &[]);
        check(&[1, 2], Some(1), "2", &[UnderReplicated, AtMinIsr]);
        check(&[1], Some(1), "2", &[UnderReplicated, UnderMinIsr]);
        check(&[1, 2, 3], Some(2), "2", &[NotPreferredLeader]);
        check(&[1, 2, 3], None, "2", &[Offline]);
        check(&[3], Some(3), "1", &[UnderReplicated, AtMinIsr, Offline]);
    }

    #[test]
    fn without_a_majority_a_partition_is_offline_whoever_is_said_to_lead() {
        let under = [UnderReplicated, AtMinIsr];
        check_without(&[3], &[1], Some(1), "1", &under);
        let offline = [UnderReplicated, AtMinIsr, Offline];
        check_without(&[2, 3], &[1], Some(1), "1", &offline);
    }
}
