//! JSON of placement and operations: partitions by state, moves, elections, drains, settings.

use chronik_proto::v1;
use chronik_types::cluster_image as image;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::dto::Partition;
use super::error::Problem;

/// A state of a partition that needs attention.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum PartitionState {
    /// Fewer in-sync replicas than the assignment has.
    UnderReplicated,
    /// Fewer in-sync replicas than `min.insync.replicas`: acks=all is refused.
    UnderMinIsr,
    /// One more lost replica, and acks=all is refused.
    AtMinIsr,
    /// Without a leader on a live broker.
    Offline,
    /// Replicas are being moved, or wait for that.
    Reassigning,
    /// Led, but not by its preferred leader.
    NotPreferredLeader,
}

#[derive(Debug, Serialize, Deserialize, ToSchema)]
pub struct Partitions {
    pub partitions: Vec<PartitionOfTopic>,
}

#[derive(Debug, Serialize, Deserialize, ToSchema)]
pub struct PartitionOfTopic {
    pub topic: String,
    pub min_insync_replicas: usize,
    #[serde(flatten)]
    pub partition: Partition,
}

#[derive(Debug, Serialize, Deserialize, ToSchema)]
pub struct PartitionRef {
    pub topic: String,
    pub partition: i32,
}

#[derive(Debug, Default, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct NewReassignments {
    pub partitions: Vec<NewReassignment>,
    /// Only check.
    #[serde(default)]
    pub validate_only: bool,
}

#[derive(Debug, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct NewReassignment {
    pub topic: String,
    pub partition: i32,
    /// Brokers that shall hold the partition, preferred leader first.
    pub replicas: Vec<i32>,
}

#[derive(Debug, Serialize, Deserialize, ToSchema)]
pub struct PartitionResults {
    pub partitions: Vec<PartitionResult>,
}

#[derive(Debug, Serialize, Deserialize, ToSchema)]
pub struct PartitionResult {
    pub topic: String,
    pub partition: i32,
    /// Why it was refused; none: it was taken.
    pub problem: Option<Problem>,
}

#[derive(Debug, Serialize, Deserialize, ToSchema)]
pub struct Reassignments {
    pub reassignments: Vec<Reassignment>,
}

/// A move of a partition's replicas.
#[derive(Debug, Serialize, Deserialize, ToSchema)]
pub struct Reassignment {
    pub topic: String,
    pub partition: i32,
    /// Brokers that shall hold it in the end, preferred leader first.
    pub target: Vec<i32>,
    /// Where it goes back to when it is cancelled.
    pub original: Vec<i32>,
    pub adding: Vec<i32>,
    pub removing: Vec<i32>,
    /// False: it waits its turn.
    pub active: bool,
    /// request, drain or balance.
    pub cause: String,
    /// None: the leader has not told yet.
    pub progress: Option<MoveProgress>,
}

#[derive(Debug, Serialize, Deserialize, ToSchema)]
pub struct MoveProgress {
    /// Entries in the leader's log.
    pub log_entries: u64,
    pub replicas: Vec<ReplicaProgress>,
}

#[derive(Debug, Serialize, Deserialize, ToSchema)]
pub struct ReplicaProgress {
    pub broker_id: i32,
    /// Entries that the leader has and this replica lacks; none: nothing is known of it yet.
    pub lag_entries: Option<u64>,
    /// The copy of segment files that the replica takes now, if it does.
    pub copy: Option<CopyProgress>,
}

#[derive(Debug, Serialize, Deserialize, ToSchema)]
pub struct CopyProgress {
    /// What has come.
    pub copied_bytes: u64,
    /// Of the whole copy.
    pub total_bytes: u64,
}

#[derive(Debug, Default, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct NewElections {
    /// None: every partition that its preferred leader does not lead.
    pub partitions: Option<Vec<PartitionRef>>,
    /// Always refused: there are no unclean elections.
    #[serde(default)]
    pub unclean: bool,
    /// How long to wait for the leaders. Default 10,000.
    pub timeout_ms: Option<u32>,
}

#[derive(Debug, Default, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct NewRebalance {
    /// Only show what would be moved.
    pub dry_run: bool,
}

#[derive(Debug, Serialize, Deserialize, ToSchema)]
pub struct Rebalance {
    /// The moves were asked for.
    pub executed: bool,
    pub moves: Vec<RebalanceMove>,
}

#[derive(Debug, Serialize, Deserialize, ToSchema)]
pub struct RebalanceMove {
    pub topic: String,
    pub partition: i32,
    pub from: Vec<i32>,
    pub to: Vec<i32>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum DrainKind {
    None,
    /// It shall lead nothing.
    Leaders,
    /// It shall hold nothing.
    Replicas,
}

#[derive(Debug, Default, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct NewDrain {
    /// Move all replicas away, not only leadership.
    #[serde(default)]
    pub decommission: bool,
}

/// What a drain has still to do.
#[derive(Debug, Serialize, Deserialize, ToSchema)]
pub struct Drain {
    pub broker_id: i32,
    pub drain: DrainKind,
    /// Partitions that the broker leads.
    pub leader_count: usize,
    /// Partitions that it holds.
    pub replica_count: usize,
    /// Those of them that are being moved away, or wait for that.
    pub moving_count: usize,
    /// Those that it leads and nobody else could lead now.
    pub stuck_leader_count: usize,
    /// Nothing is left of what the drain is to move.
    pub done: bool,
}

#[derive(Debug, Serialize, Deserialize, ToSchema)]
pub struct ClusterSettings {
    /// Partitions whose replicas are moved at the same time.
    pub reassignment_parallel_max: u32,
    /// Bytes per second that one broker takes in by copies of segment files; none: unlimited.
    pub reassignment_bytes_per_second: Option<u64>,
    /// Whether leadership goes back to preferred leaders by itself.
    pub leader_balance_enable: bool,
}

#[derive(Debug, Default, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ClusterSettingsChange {
    pub reassignment_parallel_max: Option<u32>,
    /// 0: unlimited.
    pub reassignment_bytes_per_second: Option<u64>,
    pub leader_balance_enable: Option<bool>,
}

impl From<v1::ReassignmentState> for Reassignment {
    fn from(state: v1::ReassignmentState) -> Self {
        use v1::reassignment::Cause;
        let moving = state.reassignment.unwrap_or_default();
        let cause = match moving.cause() {
            Cause::Request => "request",
            Cause::Drain => "drain",
            Cause::Balance => "balance",
        };
        let replica = |replica: v1::move_progress::Replica| ReplicaProgress {
            broker_id: replica.broker_id,
            lag_entries: replica.lag_entries,
            copy: replica.copy.map(|copy| CopyProgress {
                copied_bytes: copy.copied_bytes,
                total_bytes: copy.total_bytes,
            }),
        };
        let progress = state.progress.map(|progress| MoveProgress {
            log_entries: progress.log_entries,
            replicas: progress.replicas.into_iter().map(replica).collect(),
        });
        Self {
            topic: state.topic,
            partition: state.partition,
            adding: state.adding,
            removing: state.removing,
            active: moving.active,
            cause: cause.to_owned(),
            target: moving.target,
            original: moving.original,
            progress,
        }
    }
}

impl From<image::Drain> for DrainKind {
    fn from(drain: image::Drain) -> Self {
        match drain {
            image::Drain::None => Self::None,
            image::Drain::Leaders => Self::Leaders,
            image::Drain::Replicas => Self::Replicas,
        }
    }
}

impl From<v1::ClusterSettings> for ClusterSettings {
    fn from(settings: v1::ClusterSettings) -> Self {
        Self {
            reassignment_parallel_max: settings.reassignment_parallel_max,
            reassignment_bytes_per_second: settings.reassignment_bytes_per_second,
            leader_balance_enable: settings.leader_balance_enable,
        }
    }
}
