//! The committed offsets of one group.
//!
//! Invariant: for each partition the commit that is furthest in the log is in force, in whatever
//! order outcomes of writes arrive here.

use std::collections::BTreeMap;

use chronik_types::offset::Offset;

use super::records::OffsetValue;

/// A commit, and where in the coordinator's log it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CommittedOffset {
    pub value: OffsetValue,
    pub written_at: Offset,
}

/// Owned by the group's entry in its coordinator.
#[derive(Debug, Default)]
pub struct Offsets {
    by_topic: BTreeMap<String, BTreeMap<i32, CommittedOffset>>,
}

impl Offsets {
    pub fn is_empty(&self) -> bool {
        self.by_topic.is_empty()
    }

    pub fn get(&self, topic: &str, partition: i32) -> Option<&OffsetValue> {
        self.by_topic
            .get(topic)?
            .get(&partition)
            .map(|committed| &committed.value)
    }

    /// All of them, by topic and partition.
    pub fn iter(&self) -> impl Iterator<Item = (&str, i32, &CommittedOffset)> {
        self.by_topic.iter().flat_map(|(topic, partitions)| {
            partitions
                .iter()
                .map(move |(partition, committed)| (topic.as_str(), *partition, committed))
        })
    }

    /// A commit is in the log at `written_at`.
    pub fn committed(
        &mut self,
        topic: &str,
        partition: i32,
        value: OffsetValue,
        written_at: Offset,
    ) {
        if !self.by_topic.contains_key(topic) {
            self.by_topic.insert(topic.to_owned(), BTreeMap::new());
        }
        let Some(partitions) = self.by_topic.get_mut(topic) else {
            return;
        };
        if partitions
            .get(&partition)
            .is_none_or(|known| known.written_at <= written_at)
        {
            partitions.insert(partition, CommittedOffset { value, written_at });
        }
    }

    /// A tombstone is in the log at `written_at`.
    pub fn removed(&mut self, topic: &str, partition: i32, written_at: Offset) {
        let Some(partitions) = self.by_topic.get_mut(topic) else {
            return;
        };
        if partitions
            .get(&partition)
            .is_some_and(|known| known.written_at <= written_at)
        {
            partitions.remove(&partition);
        }
        if partitions.is_empty() {
            self.by_topic.remove(topic);
        }
    }

    /// Partitions whose offsets are too old: by their own time of expiry, else `retention_ms`
    /// after the commit or after `unused_since_ms`, whichever is later. None: the group is in use
    /// and nothing expires.
    pub fn expired(
        &self,
        now_ms: i64,
        retention_ms: i64,
        unused_since_ms: Option<i64>,
    ) -> Vec<(String, i32)> {
        let is_expired = |value: &OffsetValue| match (unused_since_ms, value.expire_timestamp_ms) {
            (None, _) => false,
            (Some(_), Some(expire_ms)) => now_ms >= expire_ms,
            (Some(unused_ms), None) => {
                let since = unused_ms.max(value.commit_timestamp_ms);
                now_ms.saturating_sub(since) >= retention_ms
            }
        };
        self.iter()
            .filter(|(_, _, committed)| is_expired(&committed.value))
            .map(|(topic, partition, _)| (topic.to_owned(), partition))
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use uuid::Uuid;

    use super::*;

    fn value(offset: i64, commit_timestamp_ms: i64) -> OffsetValue {
        OffsetValue {
            offset,
            leader_epoch: -1,
            metadata: String::new(),
            commit_timestamp_ms,
            expire_timestamp_ms: None,
            topic_id: Uuid::nil(),
        }
    }

    #[test]
    fn the_commit_furthest_in_the_log_wins() {
        let mut offsets = Offsets::default();
        offsets.committed("t", 0, value(5, 0), Offset(11));
        offsets.committed("t", 0, value(4, 0), Offset(10));
        assert_eq!(offsets.get("t", 0).unwrap().offset, 5);
        offsets.removed("t", 0, Offset(10));
        assert_eq!(offsets.get("t", 0).unwrap().offset, 5);
        offsets.removed("t", 0, Offset(12));
        assert!(offsets.is_empty());
    }

    #[test]
    fn offsets_expire_only_while_the_group_is_not_in_use() {
        let mut offsets = Offsets::default();
        offsets.committed("old", 0, value(1, 100), Offset(1));
        offsets.committed("new", 0, value(1, 900), Offset(2));
        let own = OffsetValue {
            expire_timestamp_ms: Some(150),
            ..value(1, 900)
        };
        offsets.committed("own", 0, own, Offset(3));
        assert_eq!(offsets.expired(1_000, 500, None), vec![]);
        let expired = offsets.expired(1_000, 500, Some(0));
        assert_eq!(expired, vec![("old".to_owned(), 0), ("own".to_owned(), 0)]);
        assert_eq!(
            offsets.expired(1_000, 500, Some(800)),
            vec![("own".to_owned(), 0)]
        );
    }
}
