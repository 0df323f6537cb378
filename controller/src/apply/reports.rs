//! Partition leaders' reports: who leads, and which replicas are in sync.
//!
//! Invariant: the leader epoch of a partition never falls, and an ISR changes only by
//! compare-and-set on the partition epoch (but for a new leader joining it).

use std::collections::BTreeMap;

use chronik_types::cluster_image::{ClusterImage, ImageChange, Partition};
use chronik_types::id::BrokerId;

use super::brokers::following;
use super::reassignment::completed;
use crate::command::{Outcome, PartitionKey, PartitionReport, ReportOutcome, ReportPartitions};
use crate::state::State;

pub fn report(state: &State, command: &ReportPartitions, change: &mut ImageChange) -> Outcome {
    let session = command.session;
    let current = state
        .image
        .brokers
        .get(&session.broker_id)
        .is_some_and(|broker| broker.broker_epoch == session.broker_epoch && !broker.fenced);
    if !current {
        return Outcome::Fenced;
    }
    // One batch may report a partition twice: later reports see what earlier ones did.
    let mut changed: BTreeMap<PartitionKey, Partition> = BTreeMap::new();
    let mut outcomes = Vec::with_capacity(command.reports.len());
    for report in &command.reports {
        let Some(key) = state.groups.get(&report.raft_group_id) else {
            outcomes.push(ReportOutcome::UnknownPartition);
            continue;
        };
        let stored = state
            .image
            .topic(key.0)
            .and_then(|topic| topic.partition(key.1));
        let Some(partition) = changed.get(key).or(stored) else {
            outcomes.push(ReportOutcome::UnknownPartition);
            continue;
        };
        let (outcome, next) = decide(&state.image, partition, session.broker_id, report);
        outcomes.push(outcome);
        if let Some(next) = next {
            changed.insert(*key, next);
        }
    }
    change.partitions.extend(
        changed
            .into_iter()
            .map(|((topic_id, _), partition)| (topic_id, partition)),
    );
    Outcome::Reported(outcomes)
}

/// What one report makes of its partition.
fn decide(
    image: &ClusterImage,
    partition: &Partition,
    reporter: BrokerId,
    report: &PartitionReport,
) -> (ReportOutcome, Option<Partition>) {
    if partition.replica_on(reporter).is_none() {
        return (ReportOutcome::UnknownPartition, None);
    }
    if report.leader_epoch < partition.leader_epoch {
        return (ReportOutcome::StaleLeaderEpoch, None);
    }
    let same_epoch = report.leader_epoch == partition.leader_epoch;
    if same_epoch && partition.leader.is_some_and(|leader| leader != reporter) {
        // One term has one leader, so one of the two is wrong; the first one known stays.
        return (ReportOutcome::StaleLeaderEpoch, None);
    }
    let isr = in_sync(image, partition, reporter, report);
    let mut next = partition.clone();
    next.leader = Some(reporter);
    next.leader_epoch = report.leader_epoch;
    let mut outcome = ReportOutcome::Accepted;
    if report.partition_epoch == partition.partition_epoch {
        next.isr = isr;
        // The voters are those of this very epoch: whatever was asked since would have raised it.
        if let Some(done) = completed(&next, &report.voters, |id| image.is_live(id)) {
            next = done;
        }
    } else {
        if !next.isr.contains(&reporter) {
            next.isr.push(reporter);
        }
        // A fenced last member of the ISR has no claim left once another replica leads.
        next.isr.retain(|id| *id == reporter || image.is_live(*id));
        if next.isr.len() != isr.len() || !isr.iter().all(|id| next.isr.contains(id)) {
            outcome = ReportOutcome::StalePartitionEpoch;
        }
    }
    let can_take_over =
        |id: &BrokerId| *id != reporter && next.isr.contains(id) && next.replica_on(*id).is_some();
    next.wanted_leader = next.wanted_leader.filter(can_take_over);
    if next == *partition {
        return (outcome, None);
    }
    next.partition_epoch = following(partition);
    (outcome, Some(next))
}

/// Replicas that are caught up and on live brokers, and the leader; in assignment order.
fn in_sync(
    image: &ClusterImage,
    partition: &Partition,
    leader: BrokerId,
    report: &PartitionReport,
) -> Vec<BrokerId> {
    let caught_up =
        |id: BrokerId| id == leader || (report.caught_up.contains(&id) && image.is_live(id));
    partition
        .replicas
        .iter()
        .map(|r| r.broker_id)
        .filter(|id| caught_up(*id))
        .collect()
}
