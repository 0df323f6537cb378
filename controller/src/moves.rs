//! How far the replicas are that are being filled, as partition leaders tell. In the memory of the
//! leading controller only: progress costs no transaction.
//!
//! Invariant: bounded by the partitions that are being moved; what was not told again for a while is
//! not shown.

use std::collections::{BTreeMap, HashMap};
use std::time::{Duration, Instant};

use chronik_proto::v1;
use chronik_types::cluster_image::ClusterImage;
use chronik_types::id::{BrokerId, RaftGroupId};

/// Progress that is older is not shown: its teller leads no more.
const FRESH_FOR: Duration = Duration::from_secs(5);
/// Partitions of which progress is kept.
const MOVES_MAX: usize = 100_000;

/// Entries of the log, and how many of them each replica that is being filled lacks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Progress {
    pub leader_epoch: i32,
    pub log_entries: u64,
    /// None: nothing is known of the replica yet.
    pub lags: BTreeMap<BrokerId, Option<u64>>,
    told_at: Instant,
}

#[derive(Debug, Default)]
pub struct Moves {
    progress: HashMap<RaftGroupId, Progress>,
}

impl Moves {
    /// Takes what a leader told, unless one of a later leader epoch has told before.
    pub fn take(&mut self, told: Vec<v1::MoveProgress>, now: Instant) {
        for one in told {
            let group = RaftGroupId(one.raft_group_id);
            let known = self.progress.get(&group);
            let is_old = known
                .is_some_and(|known| known.leader_epoch > one.leader_epoch && is_fresh(known, now));
            if is_old || (known.is_none() && self.progress.len() >= MOVES_MAX) {
                continue;
            }
            let lags = one.replicas.iter();
            let progress = Progress {
                leader_epoch: one.leader_epoch,
                log_entries: one.log_entries,
                lags: lags
                    .map(|r| (BrokerId(r.broker_id), r.lag_entries))
                    .collect(),
                told_at: now,
            };
            self.progress.insert(group, progress);
        }
    }

    pub fn of(&self, group: RaftGroupId, now: Instant) -> Option<&Progress> {
        let known = self.progress.get(&group);
        known.filter(|known| is_fresh(known, now))
    }

    /// Entries that all replicas together lack.
    pub fn total_lag(&self, now: Instant) -> u64 {
        let fresh = self.progress.values().filter(|known| is_fresh(known, now));
        let lags = fresh.flat_map(|known| known.lags.values());
        lags.fold(0, |sum, lag| sum.saturating_add(lag.unwrap_or(0)))
    }

    /// Forgets partitions that are not being moved.
    pub fn retain_moving(&mut self, image: &ClusterImage) {
        if self.progress.is_empty() {
            return;
        }
        let partitions = image.topics.values().flat_map(|topic| &topic.partitions);
        let moving: std::collections::HashSet<RaftGroupId> = partitions
            .filter(|partition| partition.reassignment.is_some())
            .map(|partition| partition.raft_group_id)
            .collect();
        self.progress.retain(|group, _| moving.contains(group));
    }
}

impl Progress {
    pub fn to_wire(&self, group: RaftGroupId) -> v1::MoveProgress {
        let replica = |(id, lag): (&BrokerId, &Option<u64>)| v1::move_progress::Replica {
            broker_id: id.0,
            lag_entries: *lag,
        };
        v1::MoveProgress {
            raft_group_id: group.0,
            leader_epoch: self.leader_epoch,
            log_entries: self.log_entries,
            replicas: self.lags.iter().map(replica).collect(),
        }
    }
}

fn is_fresh(progress: &Progress, now: Instant) -> bool {
    now.saturating_duration_since(progress.told_at) <= FRESH_FOR
}

#[cfg(test)]
mod tests {
    use super::*;

    fn told(leader_epoch: i32, lag: u64) -> Vec<v1::MoveProgress> {
        vec![v1::MoveProgress {
            raft_group_id: 1,
            leader_epoch,
            log_entries: 10,
            replicas: vec![v1::move_progress::Replica {
                broker_id: 4,
                lag_entries: Some(lag),
            }],
        }]
    }

    #[test]
    fn the_latest_leader_is_believed_while_it_tells() {
        let start = Instant::now();
        let mut moves = Moves::default();
        let lag = |moves: &Moves, now| {
            let progress = moves.of(RaftGroupId(1), now)?;
            progress.lags[&BrokerId(4)]
        };
        moves.take(told(5, 7), start);
        moves.take(told(4, 9), start + Duration::from_secs(1));
        assert_eq!(lag(&moves, start), Some(7));
        assert_eq!(lag(&moves, start + Duration::from_secs(6)), None);
        moves.take(told(4, 9), start + Duration::from_secs(6));
        assert_eq!(lag(&moves, start + Duration::from_secs(6)), Some(9));
        moves.retain_moving(&ClusterImage::default());
        assert_eq!(lag(&moves, start + Duration::from_secs(6)), None);
    }
}
