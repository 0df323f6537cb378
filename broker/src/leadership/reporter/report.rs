//! What is told of one partition, and whether there is anything to tell.
//!
//! Invariant: pure. A report is due exactly while the image says something else than what the leader
//! knows.

use std::collections::{BTreeMap, BTreeSet};

use chronik_proto::v1;
use chronik_types::cluster_image::Partition;
use chronik_types::id::BrokerId;

use crate::leadership::FollowerState;
use crate::replica::{Leadership, Progress};

/// Whether the image says something else than what this leader knows.
pub fn differs(
    partition: &Partition,
    broker_id: BrokerId,
    leadership: Leadership,
    states: &BTreeMap<BrokerId, FollowerState>,
    fenced: &BTreeSet<BrokerId>,
) -> bool {
    if states.is_empty() || partition.leader_epoch > leadership.leader_epoch {
        // Not looked at yet; or another leader has reported, and Raft will tell us too.
        return false;
    }
    if partition.leader != Some(broker_id) || partition.leader_epoch < leadership.leader_epoch {
        return true;
    }
    let is_in_sync = |broker: &BrokerId, state: &FollowerState| {
        *broker == broker_id || (*state == FollowerState::CaughtUp && !fenced.contains(broker))
    };
    let in_sync = states.iter().filter(|(b, s)| is_in_sync(b, s)).count();
    let all_known = partition.isr.iter().all(|broker| {
        let state = states.get(broker);
        state.is_some_and(|state| is_in_sync(broker, state))
    });
    !all_known || partition.isr.len() != in_sync
}

pub fn report(
    partition: &Partition,
    leadership: Leadership,
    states: &BTreeMap<BrokerId, FollowerState>,
) -> v1::PartitionReport {
    use v1::replica_progress::State;
    let replicas = states.iter().map(|(broker, state)| {
        let state = match state {
            FollowerState::CaughtUp => State::CaughtUp,
            FollowerState::Lagging => State::Lagging,
            FollowerState::Unreachable => State::Unreachable,
        };
        v1::ReplicaProgress {
            broker_id: broker.0,
            state: state.into(),
        }
    });
    v1::PartitionReport {
        raft_group_id: partition.raft_group_id.0,
        leader_epoch: leadership.leader_epoch.0,
        partition_epoch: partition.partition_epoch.0,
        replicas: replicas.collect(),
        voters: Vec::new(),
    }
}

/// How far the replicas are that are being filled.
pub fn move_progress(
    partition: &Partition,
    leadership: Leadership,
    progress: &Progress,
) -> v1::MoveProgress {
    let entries = |index: Option<u64>| index.map_or(0, |index| index.saturating_add(1));
    let log_entries = entries(progress.last_index);
    let replicas = partition.adding().into_iter().map(|broker| {
        let mut followers = progress.followers.iter();
        let known = followers.find(|follower| follower.replica.broker_id == broker);
        let matched = known.filter(|follower| follower.matched.is_some());
        v1::move_progress::Replica {
            broker_id: broker.0,
            lag_entries: matched.map(|f| log_entries.saturating_sub(entries(f.matched))),
            copy: None,
        }
    });
    v1::MoveProgress {
        raft_group_id: partition.raft_group_id.0,
        leader_epoch: leadership.leader_epoch.0,
        log_entries,
        replicas: replicas.collect(),
    }
}

#[cfg(test)]
mod tests {
    use chronik_types::epoch::{LeaderEpoch, PartitionEpoch};
    use chronik_types::id::{PartitionIndex, RaftGroupId};

    use super::*;
    use FollowerState::{CaughtUp, Unreachable};

    fn partition(leader: i32, epoch: i32, isr: &[i32]) -> Partition {
        Partition {
            partition: PartitionIndex(0),
            raft_group_id: RaftGroupId(1),
            replicas: Vec::new(),
            isr: isr.iter().copied().map(BrokerId).collect(),
            leader: Some(BrokerId(leader)),
            leader_epoch: LeaderEpoch(epoch),
            partition_epoch: PartitionEpoch(3),
            ..Partition::default()
        }
    }

    fn check(partition: &Partition, states: &[(i32, FollowerState)], fenced: &[i32]) -> bool {
        let leadership = Leadership {
            leader_epoch: LeaderEpoch(5),
            is_leader: true,
            ..Default::default()
        };
        let states = states
            .iter()
            .map(|(broker, state)| (BrokerId(*broker), *state))
            .collect();
        let fenced = fenced.iter().copied().map(BrokerId).collect();
        differs(partition, BrokerId(1), leadership, &states, &fenced)
    }

    #[test]
    fn a_report_is_due_while_image_and_reality_differ() {
        let all = [(1, CaughtUp), (2, CaughtUp), (3, CaughtUp)];
        let one_gone = [(1, CaughtUp), (2, CaughtUp), (3, Unreachable)];
        assert!(!check(&partition(1, 5, &[3, 1, 2]), &all, &[]));
        assert!(
            check(&partition(1, 4, &[1, 2, 3]), &all, &[]),
            "a new leader epoch"
        );
        assert!(
            check(&partition(2, 5, &[1, 2, 3]), &all, &[]),
            "another leader"
        );
        assert!(
            !check(&partition(2, 6, &[1, 2, 3]), &all, &[]),
            "a newer leader has reported"
        );
        assert!(
            check(&partition(1, 5, &[1, 2, 3]), &one_gone, &[]),
            "the ISR shrinks"
        );
        assert!(check(&partition(1, 5, &[1, 2]), &all, &[]), "the ISR grows");
        assert!(
            !check(&partition(1, 5, &[1, 2]), &all, &[3]),
            "but not by a fenced broker"
        );
    }
}
