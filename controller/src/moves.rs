//! How far the replicas are that are being filled, as partition leaders tell, and the brokers that take
//! copies. In the memory of the leading controller only: progress costs no transaction.
//!
//! Invariant: bounded by the partitions that are being moved and by the brokers; what was not told again for a while is
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
/// Copies of one broker of which progress is kept: more than one takes at a time.
const COPIES_MAX: usize = 1_000;

/// Entries of the log, and how many of them each replica that is being filled lacks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Progress {
    pub leader_epoch: i32,
    pub log_entries: u64,
    /// None: nothing is known of the replica yet.
    pub lags: BTreeMap<BrokerId, Option<u64>>,
    told_at: Instant,
}

/// What has come of a copy, in bytes.
#[derive(Debug, Clone, Copy)]
struct CopyProgress {
    copied: u64,
    total: u64,
    told_at: Instant,
}

#[derive(Debug, Default)]
pub struct Moves {
    progress: HashMap<RaftGroupId, Progress>,
    /// By the broker that takes them.
    copies: HashMap<BrokerId, HashMap<RaftGroupId, CopyProgress>>,
}

impl Moves {
    /// Takes what a leader told, unless one of a later leader epoch has told before.
    pub fn take(&mut self, told: Vec<v1::MoveProgress>, now: Instant) {
        for one in told {
            let group = RaftGroupId(one.raft_group_id);
            let known = self.progress.get(&group);
            let is_old = known.is_some_and(|known| {
                known.leader_epoch > one.leader_epoch && is_fresh(known.told_at, now)
            });
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

    /// Takes what a broker tells of all copies that it takes, if it tells of any.
    pub fn take_copies(&mut self, broker: BrokerId, told: &[v1::CopyProgress], now: Instant) {
        if told.is_empty() {
            return;
        }
        let copy = |one: &v1::CopyProgress| {
            let copy = CopyProgress {
                copied: one.copied_bytes.min(one.total_bytes),
                total: one.total_bytes,
                told_at: now,
            };
            (RaftGroupId(one.raft_group_id), copy)
        };
        let copies = told.iter().take(COPIES_MAX).map(copy).collect();
        self.copies.insert(broker, copies);
    }

    /// The partition's progress as operators see it.
    pub fn to_wire(&self, group: RaftGroupId, now: Instant) -> Option<v1::MoveProgress> {
        let known = self.of(group, now)?;
        let replica = |(id, lag): (&BrokerId, &Option<u64>)| v1::move_progress::Replica {
            broker_id: id.0,
            lag_entries: *lag,
            copy: self.copy(*id, group, now),
        };
        Some(v1::MoveProgress {
            raft_group_id: group.0,
            leader_epoch: known.leader_epoch,
            log_entries: known.log_entries,
            replicas: known.lags.iter().map(replica).collect(),
        })
    }

    fn copy(&self, broker: BrokerId, group: RaftGroupId, now: Instant) -> Option<v1::CopyProgress> {
        let copy = self.copies.get(&broker)?.get(&group)?;
        is_fresh(copy.told_at, now).then_some(v1::CopyProgress {
            raft_group_id: group.0,
            copied_bytes: copy.copied,
            total_bytes: copy.total,
        })
    }

    pub fn of(&self, group: RaftGroupId, now: Instant) -> Option<&Progress> {
        let known = self.progress.get(&group);
        known.filter(|known| is_fresh(known.told_at, now))
    }

    /// Entries that all replicas together lack.
    pub fn total_lag(&self, now: Instant) -> u64 {
        let fresh = self
            .progress
            .values()
            .filter(|known| is_fresh(known.told_at, now));
        let lags = fresh.flat_map(|known| known.lags.values());
        lags.fold(0, |sum, lag| sum.saturating_add(lag.unwrap_or(0)))
    }

    /// Forgets partitions that are not being moved, and brokers that are not there.
    pub fn retain_moving(&mut self, image: &ClusterImage) {
        self.copies
            .retain(|broker, _| image.brokers.contains_key(broker));
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

fn is_fresh(told_at: Instant, now: Instant) -> bool {
    now.saturating_duration_since(told_at) <= FRESH_FOR
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
                copy: None,
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

    #[test]
    fn a_copy_is_shown_while_its_broker_tells_of_it() {
        let start = Instant::now();
        let mut moves = Moves::default();
        let copy = |group, copied_bytes| v1::CopyProgress {
            raft_group_id: group,
            copied_bytes,
            total_bytes: 100,
        };
        let shown = |moves: &Moves, now| {
            let shown = moves.to_wire(RaftGroupId(1), now)?;
            let copy = shown.replicas[0].copy?;
            Some((copy.copied_bytes, copy.total_bytes))
        };
        moves.take(told(5, 7), start);
        assert_eq!(shown(&moves, start), None);
        moves.take_copies(BrokerId(4), &[copy(1, 30), copy(2, 60)], start);
        moves.take_copies(BrokerId(3), &[copy(1, 99)], start);
        assert_eq!(shown(&moves, start), Some((30, 100)));
        let later = start + Duration::from_secs(3);
        moves.take_copies(BrokerId(4), &[copy(1, 500)], later);
        assert_eq!(
            shown(&moves, later),
            Some((100, 100)),
            "never more than all"
        );
        moves.take_copies(BrokerId(4), &[copy(2, 70)], later);
        assert_eq!(shown(&moves, later), None, "it is done, or was given up");
        moves.take_copies(BrokerId(4), &[copy(1, 60)], later);
        let much_later = later + Duration::from_secs(6);
        moves.take(told(5, 7), much_later);
        assert_eq!(shown(&moves, much_later), None);
        moves.retain_moving(&ClusterImage::default());
        assert!(moves.copies.is_empty());
    }
}
