//! What time brings to a partition's groups: timers of members, and the expiry of offsets.
//!
//! Invariant: a group's timer is never later than its next deadline; expired offsets are gone only
//! once the log says so.

use std::sync::Arc;

use uuid::Uuid;

use super::writes::Then;
use super::{Partition, Phase};
use crate::consumer_group::records::{group_record, offset_record};
use crate::consumer_group::state::{Moment, Now};

/// Offsets that are removed by one write.
const OFFSETS_PER_REMOVAL: usize = 1_000;

impl Partition {
    pub fn next_deadline(&self) -> Moment {
        let timer = self
            .timers
            .first()
            .map_or(Moment::MAX, |(moment, _)| *moment);
        timer.min(self.next_expiry_check)
    }

    /// Does what is due.
    pub fn on_time(&mut self, now: Now) {
        let mut due = Vec::new();
        while let Some((moment, _)) = self.timers.first()
            && *moment <= now.moment
        {
            due.extend(self.timers.pop_first().map(|(_, group)| group));
        }
        for id in due {
            let mut effects = Vec::new();
            if let Some(entry) = self.groups.get_mut(&id) {
                entry.timer = None;
                entry.group.on_time(now, &mut effects);
            }
            self.finish(now, &id, effects, None);
        }
        if self.next_expiry_check <= now.moment {
            self.expire(now);
            self.next_expiry_check = now.moment + self.config.offsets_retention_check_interval();
        }
    }

    /// Queues the removal of expired offsets, and of groups that are empty and have none.
    fn expire(&mut self, now: Now) {
        let retention_ms = self.config.offsets_retention_ms();
        let mut removals = Vec::new();
        for (id, entry) in &self.groups {
            let group = &entry.group;
            if !group.is_unused() {
                continue;
            }
            // Offsets of a group that never had members expire by their own age.
            let unused_since_ms = if group.protocol_type().is_some() {
                group.state_changed_wall_ms()
            } else {
                0
            };
            let expired = entry
                .offsets
                .expired(now.wall_ms, retention_ms, Some(unused_since_ms));
            let whole_group = expired.len() == entry.offsets.iter().count();
            if whole_group || !expired.is_empty() {
                removals.push((id.clone(), expired, whole_group));
            }
        }
        for (id, offsets, whole_group) in removals {
            self.queue_removal(&id, offsets, whole_group);
        }
    }

    /// Topics are gone: so are the offsets committed for them.
    pub fn topics_removed(&mut self, topics: &[(Uuid, Arc<str>)]) {
        if self.phase != Phase::Leading {
            return;
        }
        let is_gone = |topic: &str, id: Uuid| {
            topics
                .iter()
                .any(|(gone_id, name)| &**name == topic && (id.is_nil() || id == *gone_id))
        };
        let mut removals = Vec::new();
        for (group, entry) in &self.groups {
            let offsets: Vec<_> = entry
                .offsets
                .iter()
                .filter(|(topic, _, committed)| is_gone(topic, committed.value.topic_id))
                .map(|(topic, partition, _)| (topic.to_owned(), partition))
                .collect();
            if !offsets.is_empty() {
                removals.push((group.clone(), offsets));
            }
        }
        for (group, offsets) in removals {
            self.queue_removal(&group, offsets, false);
        }
    }

    fn queue_removal(&mut self, group: &str, offsets: Vec<(String, i32)>, whole_group: bool) {
        for chunk in offsets.chunks(OFFSETS_PER_REMOVAL) {
            let records = chunk
                .iter()
                .map(|(topic, at)| offset_record(group, topic, *at, None))
                .collect();
            let then = Then::Removed {
                group: group.to_owned(),
                offsets: chunk.to_vec(),
                whole_group: false,
            };
            self.queue(records, then);
        }
        if whole_group {
            let then = Then::Removed {
                group: group.to_owned(),
                offsets: Vec::new(),
                whole_group: true,
            };
            self.queue(vec![group_record(group, None)], then);
        }
    }
}
