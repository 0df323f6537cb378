//! All groups of one partition of `__consumer_offsets` while it is led here: their timers, and the
//! writes that wait for the log. No I/O: the coordinator's task moves the writes.
//!
//! Invariant: writes reach the log in the order in which they were decided. Without leadership
//! nothing is kept; every waiter is dropped and so learns that this is not its coordinator.

mod time;
mod writes;

use std::collections::{BTreeSet, HashMap, VecDeque};
use std::sync::Arc;

use tokio::sync::oneshot;
use uuid::Uuid;

use writes::Then;
pub(super) use writes::Write;

use super::config::GroupConfig;
use super::loaded::Loaded;
use super::offsets::Offsets;
use super::records::{OffsetValue, STRING_MAX_BYTES, group_record, offset_record};
use super::state::{Effect, Group, GroupError, Join, JoinRefused, Moment, Now, Reply, Sync};

/// Largest record batch written, in bytes, unless one group alone needs more. Below the default
/// of `max.message.bytes` (1,048,588).
const BATCH_MAX_BYTES: usize = 1_000_000;
/// Longest topic name (Kafka's rule).
const TOPIC_NAME_MAX_BYTES: usize = 249;

pub(super) type Waiter = oneshot::Sender<Reply>;
pub(super) type Written = Result<(), GroupError>;

/// One partition's offset in a commit.
#[derive(Debug, Clone)]
pub struct Commit {
    pub topic: String,
    pub topic_id: Uuid,
    pub partition: i32,
    pub offset: i64,
    pub leader_epoch: i32,
    pub metadata: String,
}

/// Under which membership a request is made.
#[derive(Debug, Clone, Default)]
pub struct Membership {
    /// -1 with an empty member id: from outside the group.
    pub generation: i32,
    pub member_id: String,
    pub group_instance_id: Option<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Phase {
    /// Led elsewhere, or nowhere.
    Away,
    Loading,
    Leading,
}

/// A group with its offsets.
pub(super) struct Entry {
    pub group: Group<Waiter>,
    pub offsets: Offsets,
    /// Where the group is in `timers`. Never later than the group's next deadline.
    timer: Option<Moment>,
}

/// A commit on its way to the log.
#[derive(Default)]
pub(super) struct QueuedCommit {
    /// Per offset: refused, or which write has it.
    pub outcomes: Vec<Result<usize, GroupError>>,
    pub written: Vec<oneshot::Receiver<Written>>,
}

/// Owned by its coordinator, behind a mutex.
pub(super) struct Partition {
    config: Arc<GroupConfig>,
    phase: Phase,
    groups: HashMap<String, Entry>,
    timers: BTreeSet<(Moment, String)>,
    next_expiry_check: Moment,
    writes: VecDeque<Write>,
    writes_size_bytes: usize,
}

impl Partition {
    pub fn new(config: Arc<GroupConfig>) -> Partition {
        Partition {
            config,
            phase: Phase::Away,
            groups: HashMap::new(),
            timers: BTreeSet::new(),
            next_expiry_check: Moment::MAX,
            writes: VecDeque::new(),
            writes_size_bytes: 0,
        }
    }

    // ---- Leadership ----

    pub fn step_down(&mut self) {
        self.phase = Phase::Away;
        self.groups.clear();
        self.timers.clear();
        self.writes.clear();
        self.writes_size_bytes = 0;
        self.next_expiry_check = Moment::MAX;
    }

    pub fn begin_loading(&mut self) {
        self.step_down();
        self.phase = Phase::Loading;
    }

    pub fn become_leader(&mut self, loaded: Loaded, now: Now) {
        for (id, (value, offsets)) in loaded.groups {
            let group = match value {
                Some(value) => Group::from_value(self.config.clone(), value, now.moment),
                None => Group::new(self.config.clone(), now.wall_ms),
            };
            self.groups.insert(
                id.clone(),
                Entry {
                    group,
                    offsets,
                    timer: None,
                },
            );
            self.set_timer(&id);
        }
        self.phase = Phase::Leading;
        self.next_expiry_check = now.moment + self.config.offsets_retention_check_interval();
    }

    pub fn phase(&self) -> Phase {
        self.phase
    }

    pub fn check_leading(&self) -> Result<(), GroupError> {
        match self.phase {
            Phase::Away => Err(GroupError::NotCoordinator),
            Phase::Loading => Err(GroupError::Loading),
            Phase::Leading => Ok(()),
        }
    }

    pub fn get(&self, group: &str) -> Option<&Entry> {
        self.groups.get(group)
    }

    pub fn iter(&self) -> impl Iterator<Item = (&str, &Entry)> {
        self.groups.iter().map(|(id, entry)| (id.as_str(), entry))
    }

    // ---- Requests. The caller has checked that the partition is led here ----

    pub fn join(&mut self, now: Now, group: &str, request: Join, waiter: Waiter) {
        let is_new = !self.groups.contains_key(group);
        if is_new {
            if !request.member_id.is_empty() {
                let refused = JoinRefused {
                    error: GroupError::UnknownMember,
                    member_id: request.member_id,
                };
                let _ = waiter.send(Reply::Join(Err(refused)));
                return;
            }
            let created = Group::new(self.config.clone(), now.wall_ms);
            let entry = Entry {
                group: created,
                offsets: Offsets::default(),
                timer: None,
            };
            self.groups.insert(group.to_owned(), entry);
        }
        let mut effects = Vec::new();
        if let Some(entry) = self.groups.get_mut(group) {
            entry.group.join(now, request, waiter, &mut effects);
            if is_new && entry.group.is_unused() {
                self.groups.remove(group);
            }
        }
        self.finish(now, group, effects, None);
    }

    pub fn sync(&mut self, now: Now, group: &str, request: Sync, waiter: Waiter) {
        let mut effects = Vec::new();
        match self.groups.get_mut(group) {
            Some(entry) => entry.group.sync(now, request, waiter, &mut effects),
            None => effects.push(Effect::Reply(
                waiter,
                Reply::Sync(Err(GroupError::UnknownMember)),
            )),
        }
        self.finish(now, group, effects, None);
    }

    pub fn heartbeat(&mut self, now: Now, group: &str, who: &Membership) -> Result<(), GroupError> {
        let entry = self
            .groups
            .get_mut(group)
            .ok_or(GroupError::UnknownMember)?;
        // Moves a deadline only further away, so the timer may stay where it is.
        entry.group.heartbeat(
            now,
            who.generation,
            &who.member_id,
            who.group_instance_id.as_deref(),
        )
    }

    /// One outcome per member. The last one out makes the group empty; `done` then tells when the
    /// log has it.
    pub fn leave(
        &mut self,
        now: Now,
        group: &str,
        members: &[(String, Option<String>)],
        done: oneshot::Sender<Written>,
    ) -> Result<Vec<Result<(), GroupError>>, GroupError> {
        let entry = self
            .groups
            .get_mut(group)
            .ok_or(GroupError::UnknownMember)?;
        let mut effects = Vec::new();
        let outcomes = members
            .iter()
            .map(|(id, instance)| {
                entry
                    .group
                    .leave(now, id, instance.as_deref(), &mut effects)
            })
            .collect();
        self.finish(now, group, effects, Some(done));
        Ok(outcomes)
    }

    /// Queues the commit. An error is the answer for all offsets.
    pub fn commit(
        &mut self,
        now: Now,
        group: &str,
        who: &Membership,
        offsets: Vec<Commit>,
        retention_ms: Option<i64>,
    ) -> Result<QueuedCommit, GroupError> {
        match self.groups.get_mut(group) {
            Some(entry) => entry.group.check_commit(
                now,
                who.generation,
                &who.member_id,
                who.group_instance_id.as_deref(),
            )?,
            None if who.generation >= 0 => return Err(GroupError::IllegalGeneration),
            None => {}
        }
        if self.writes_size_bytes > self.config.write_queue_max_bytes {
            return Err(GroupError::TimedOut);
        }
        let mut queued = QueuedCommit::default();
        let mut write: Vec<(String, i32, OffsetValue)> = Vec::new();
        let mut size_bytes = 0;
        for commit in offsets {
            if commit.metadata.len() > self.config.offset_metadata_max_bytes.min(STRING_MAX_BYTES)
                || commit.topic.len() > TOPIC_NAME_MAX_BYTES
            {
                queued.outcomes.push(Err(GroupError::MetadataTooLarge));
                continue;
            }
            let added = group.len() + commit.topic.len() + commit.metadata.len() + 96;
            if !write.is_empty() && size_bytes + added > BATCH_MAX_BYTES / 2 {
                queued
                    .written
                    .push(self.queue_commit(group, std::mem::take(&mut write)));
                size_bytes = 0;
            }
            size_bytes += added;
            queued.outcomes.push(Ok(queued.written.len()));
            write.push((
                commit.topic.clone(),
                commit.partition,
                commit.into_value(now, retention_ms),
            ));
        }
        if !write.is_empty() {
            queued.written.push(self.queue_commit(group, write));
        }
        Ok(queued)
    }

    fn queue_commit(
        &mut self,
        group: &str,
        offsets: Vec<(String, i32, OffsetValue)>,
    ) -> oneshot::Receiver<Written> {
        let (done, written) = oneshot::channel();
        let records = offsets
            .iter()
            .map(|(topic, partition, value)| offset_record(group, topic, *partition, Some(value)))
            .collect();
        self.queue(
            records,
            Then::Committed {
                group: group.to_owned(),
                offsets,
                done,
            },
        );
        written
    }

    /// Does what a group's step asked for, and sets its timer anew.
    fn finish(
        &mut self,
        now: Now,
        group: &str,
        effects: Vec<Effect<Waiter>>,
        mut done: Option<oneshot::Sender<Written>>,
    ) {
        for effect in effects {
            match effect {
                // Nobody waits any more where the client is gone.
                Effect::Reply(waiter, reply) => drop(waiter.send(reply)),
                Effect::Store(purpose, value) => {
                    let records = vec![group_record(group, Some(&value))];
                    let then = Then::Group {
                        group: group.to_owned(),
                        purpose,
                        done: done.take(),
                    };
                    self.queue(records, then);
                }
            }
        }
        if let Some(done) = done {
            let _ = done.send(Ok(())); // Nothing has to be written.
        }
        self.set_timer(group);
        if let Some(entry) = self.groups.get(group) {
            tracing::debug!(
                consumer_group = group,
                state = entry.group.state().name(),
                generation = entry.group.generation(),
                members = entry.group.member_count(),
                at_ms = now.wall_ms,
                "consumer group after a step"
            );
        }
    }

    fn set_timer(&mut self, group: &str) {
        let Some(entry) = self.groups.get_mut(group) else {
            return;
        };
        let next = entry.group.next_deadline();
        if next == entry.timer {
            return;
        }
        if let Some(moment) = entry.timer {
            self.timers.remove(&(moment, group.to_owned()));
        }
        entry.timer = next;
        if let Some(moment) = next {
            self.timers.insert((moment, group.to_owned()));
        }
    }
}

impl Commit {
    fn into_value(self, now: Now, retention_ms: Option<i64>) -> OffsetValue {
        OffsetValue {
            offset: self.offset,
            leader_epoch: self.leader_epoch,
            metadata: self.metadata,
            commit_timestamp_ms: now.wall_ms,
            expire_timestamp_ms: retention_ms.map(|ms| now.wall_ms.saturating_add(ms)),
            topic_id: self.topic_id,
        }
    }
}
