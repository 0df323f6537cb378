//! The coordinator of the groups of one partition of `__consumer_offsets`, as gateways call it.
//! Behind it is one task (`driver`), which loads, writes and keeps time.
//!
//! Invariant: what an answer promises is in the committed log before the answer.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use chronik_types::id::RaftGroupId;
use tokio::sync::{Notify, oneshot};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use uuid::Uuid;

use super::config::GroupConfig;
use super::driver::Driver;
use super::log::GroupLog;
use super::offsets::Offsets;
use super::partition::{Partition, Phase, Written};
use super::records::OffsetValue;
use super::state::{
    Group, GroupError, Join, JoinRefused, Joined, MemberDescription, Now, Reply, Sync, Synced,
};

pub use super::partition::{Commit, Membership};

/// A group as it is described to operators.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GroupDescription {
    pub state: &'static str,
    pub protocol_type: String,
    pub protocol_name: String,
    pub members: Vec<MemberDescription>,
}

/// A group in a list.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GroupListing {
    pub consumer_group: String,
    pub protocol_type: String,
    pub state: &'static str,
}

/// One partition's offset of a group, where there is one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FetchedOffset {
    pub topic: String,
    pub partition: i32,
    pub value: Option<OffsetValue>,
}

/// Serves the groups of one partition while its replica leads. Its task ends with `stop`.
pub struct Coordinator {
    shared: Arc<Shared>,
    stop: CancellationToken,
}

/// What callers and the task have in common.
pub(super) struct Shared {
    pub raft_group_id: RaftGroupId,
    pub config: Arc<GroupConfig>,
    partition: Mutex<Partition>,
    /// Something was decided that the task must look at.
    pub wake: Notify,
    started: Instant,
}

impl Shared {
    pub fn lock(&self) -> MutexGuard<'_, Partition> {
        self.partition
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    pub fn now(&self) -> Now {
        let wall = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap_or_default();
        Now {
            moment: self.started.elapsed(),
            wall_ms: i64::try_from(wall.as_millis()).unwrap_or(i64::MAX),
        }
    }
}

impl Coordinator {
    /// Starts the task of the partition whose replica is `log`.
    pub fn start<L: GroupLog>(
        raft_group_id: RaftGroupId,
        log: L,
        config: Arc<GroupConfig>,
        tasks: &TaskTracker,
        stop: CancellationToken,
    ) -> Coordinator {
        let shared = Arc::new(Shared {
            raft_group_id,
            config: config.clone(),
            partition: Mutex::new(Partition::new(config)),
            wake: Notify::new(),
            started: Instant::now(),
        });
        let leadership = log.leadership();
        let driver = Driver {
            shared: shared.clone(),
            log,
            stop: stop.clone(),
        };
        tasks.spawn(driver.run(leadership));
        Coordinator { shared, stop }
    }

    /// Runs `step` on the partition if it is led here, and wakes the task.
    fn with_leader<T>(
        &self,
        step: impl FnOnce(&mut Partition, Now) -> Result<T, GroupError>,
    ) -> Result<T, GroupError> {
        let mut partition = self.shared.lock();
        partition.check_leading()?;
        let result = step(&mut partition, self.shared.now());
        drop(partition);
        self.shared.wake.notify_one();
        result
    }

    /// Waits until the group's rebalance has ended.
    pub async fn join(&self, group: &str, request: Join) -> Result<Joined, JoinRefused> {
        let refused = |error| JoinRefused {
            error,
            member_id: String::new(),
        };
        let timeouts =
            self.shared.config.session_timeout_min_ms..=self.shared.config.session_timeout_max_ms;
        let asked_ms = u64::try_from(request.session_timeout.as_millis()).unwrap_or(u64::MAX);
        check_group_id(group).map_err(refused)?;
        if !timeouts.contains(&asked_ms) {
            return Err(refused(GroupError::InvalidSessionTimeout));
        }
        let (waiter, reply) = oneshot::channel();
        self.with_leader(|partition, now| {
            partition.join(now, group, request, waiter);
            Ok(())
        })
        .map_err(refused)?;
        match reply.await {
            Ok(Reply::Join(outcome)) => outcome,
            Ok(Reply::Sync(_)) | Err(_) => Err(refused(GroupError::NotCoordinator)),
        }
    }

    /// Waits until the leader's assignments are in the log.
    pub async fn sync(&self, group: &str, request: Sync) -> Result<Synced, GroupError> {
        check_group_id(group)?;
        let (waiter, reply) = oneshot::channel();
        self.with_leader(|partition, now| {
            partition.sync(now, group, request, waiter);
            Ok(())
        })?;
        match reply.await {
            Ok(Reply::Sync(outcome)) => outcome,
            Ok(Reply::Join(_)) | Err(_) => Err(GroupError::NotCoordinator),
        }
    }

    pub fn heartbeat(&self, group: &str, who: &Membership) -> Result<(), GroupError> {
        check_group_id(group)?;
        let mut partition = self.shared.lock();
        partition.check_leading()?;
        partition.heartbeat(self.shared.now(), group, who)
    }

    /// One outcome per member, once the log has what they mean.
    pub async fn leave(
        &self,
        group: &str,
        members: &[(String, Option<String>)],
    ) -> Result<Vec<Result<(), GroupError>>, GroupError> {
        check_group_id(group)?;
        let (done, written) = oneshot::channel();
        let outcomes =
            self.with_leader(|partition, now| partition.leave(now, group, members, done))?;
        flatten(written.await)?;
        Ok(outcomes)
    }

    /// One outcome per offset, once the log has the commit.
    pub async fn commit(
        &self,
        group: &str,
        who: &Membership,
        offsets: Vec<Commit>,
        retention_ms: Option<i64>,
    ) -> Result<Vec<Result<(), GroupError>>, GroupError> {
        check_length(group)?;
        let queued = self.with_leader(|partition, now| {
            partition.commit(now, group, who, offsets, retention_ms)
        })?;
        let mut written = Vec::with_capacity(queued.written.len());
        for write in queued.written {
            written.push(flatten(write.await));
        }
        let outcome = |in_write: Result<usize, GroupError>| {
            written
                .get(in_write?)
                .copied()
                .unwrap_or(Err(GroupError::TimedOut))
        };
        Ok(queued.outcomes.into_iter().map(outcome).collect())
    }

    /// The offsets asked for, or all (`None`). A group that does not exist has none.
    pub fn fetch_offsets(
        &self,
        group: &str,
        topics: Option<&[(String, Vec<i32>)]>,
    ) -> Result<Vec<FetchedOffset>, GroupError> {
        let partition = self.shared.lock();
        partition.check_leading()?;
        let none = Offsets::default();
        let offsets = partition.get(group).map_or(&none, |entry| &entry.offsets);
        let fetched = |topic: &str, partition, value| FetchedOffset {
            topic: topic.to_owned(),
            partition,
            value,
        };
        Ok(match topics {
            None => offsets
                .iter()
                .map(|(topic, at, committed)| fetched(topic, at, Some(committed.value.clone())))
                .collect(),
            Some(topics) => topics
                .iter()
                .flat_map(|(topic, partitions)| {
                    partitions
                        .iter()
                        .map(move |at| fetched(topic, *at, offsets.get(topic, *at).cloned()))
                })
                .collect(),
        })
    }

    pub fn describe(&self, group: &str) -> Result<GroupDescription, GroupError> {
        let partition = self.shared.lock();
        partition.check_leading()?;
        let group = &partition.get(group).ok_or(GroupError::UnknownGroup)?.group;
        Ok(GroupDescription {
            state: group.state().name(),
            protocol_type: group.protocol_type().unwrap_or_default().to_owned(),
            protocol_name: group.protocol_name().unwrap_or_default().to_owned(),
            members: group.describe(),
        })
    }

    pub fn list(&self) -> Result<Vec<GroupListing>, GroupError> {
        let partition = self.shared.lock();
        partition.check_leading()?;
        let listing = |id: &str, group: &Group<_>| GroupListing {
            consumer_group: id.to_owned(),
            protocol_type: group.protocol_type().unwrap_or_default().to_owned(),
            state: group.state().name(),
        };
        Ok(partition
            .iter()
            .map(|(id, entry)| listing(id, &entry.group))
            .collect())
    }

    /// Whether groups are served from here now.
    pub fn is_leading(&self) -> bool {
        self.shared.lock().phase() == Phase::Leading
    }

    /// Ends the task; calls that wait learn that this is no longer their coordinator.
    pub(super) fn stop(&self) {
        self.stop.cancel();
    }

    pub(super) fn topics_removed(&self, topics: &[(Uuid, Arc<str>)]) {
        self.shared.lock().topics_removed(topics);
        self.shared.wake.notify_one();
    }
}

impl Drop for Coordinator {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

/// A write whose sender was dropped went down with the leadership before it was sent.
fn flatten(written: Result<Written, oneshot::error::RecvError>) -> Written {
    written.unwrap_or(Err(GroupError::NotCoordinator))
}

/// Membership needs a name; offsets may be kept under the empty one, as in Kafka.
fn check_group_id(group: &str) -> Result<(), GroupError> {
    if group.is_empty() {
        Err(GroupError::InvalidGroup)
    } else {
        check_length(group)
    }
}

fn check_length(group: &str) -> Result<(), GroupError> {
    let fits = group.len() <= super::records::STRING_MAX_BYTES;
    if fits {
        Ok(())
    } else {
        Err(GroupError::InvalidGroup)
    }
}
