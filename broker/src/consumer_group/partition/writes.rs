//! Writes of a partition's groups: from a decision to the log, and what its outcome changes.
//!
//! Invariant: writes reach the log in the order in which they were decided; state that others see
//! changes when the log has the write.

use bytes::Bytes;
use chronik_types::offset::Offset;
use tokio::sync::oneshot;

use super::{BATCH_MAX_BYTES, Entry, Partition, Written};
use crate::consumer_group::batch::{self, Record, UnreadableBatch};
use crate::consumer_group::loaded::{read_batch, replay_offset};
use crate::consumer_group::offsets::Offsets;
use crate::consumer_group::records::{Key, OffsetValue};
use crate::consumer_group::state::{Group, GroupError, Now, Purpose};

/// Records that go to the log together, and what happens then.
pub struct Write {
    records: Vec<Record>,
    size_bytes: usize,
    then: Then,
}

pub enum Then {
    Committed {
        group: String,
        offsets: Vec<(String, i32, OffsetValue)>,
        done: oneshot::Sender<Written>,
    },
    Group {
        group: String,
        purpose: Purpose,
        done: Option<oneshot::Sender<Written>>,
    },
    Removed {
        group: String,
        offsets: Vec<(String, i32)>,
        whole_group: bool,
    },
}

impl Partition {
    pub(super) fn queue(&mut self, records: Vec<Record>, then: Then) {
        let size_bytes = records.iter().map(Record::size_bytes_max).sum();
        self.writes_size_bytes += size_bytes;
        self.writes.push_back(Write {
            records,
            size_bytes,
            then,
        });
    }

    /// The writes that go to the log next, as one record batch.
    pub fn take_writes(&mut self, now: Now) -> Option<(Bytes, Vec<Write>)> {
        let mut taken = Vec::new();
        let mut size_bytes = 0;
        while let Some(write) = self.writes.front() {
            if !taken.is_empty() && size_bytes + write.size_bytes > BATCH_MAX_BYTES {
                break;
            }
            size_bytes += write.size_bytes;
            taken.extend(self.writes.pop_front());
        }
        self.writes_size_bytes -= size_bytes;
        let records: Vec<Record> = taken
            .iter_mut()
            .flat_map(|write| std::mem::take(&mut write.records))
            .collect();
        (!records.is_empty()).then(|| (batch::encode(&records, now.wall_ms), taken))
    }

    /// The outcome of writes that were taken: the offset of the first record, or an error.
    pub fn written(&mut self, now: Now, writes: Vec<Write>, outcome: Result<Offset, GroupError>) {
        let mut at = outcome;
        for write in writes {
            let record_count = write.then.record_count();
            self.write_done(now, write.then, at);
            at = at.map(|offset| offset.plus(record_count));
        }
    }

    fn write_done(&mut self, now: Now, then: Then, outcome: Result<Offset, GroupError>) {
        match then {
            Then::Committed {
                group,
                offsets,
                done,
            } => {
                if let Ok(base) = outcome {
                    let config = &self.config;
                    let entry = self.groups.entry(group).or_insert_with(|| Entry {
                        group: Group::new(config.clone(), now.wall_ms),
                        offsets: Offsets::default(),
                        timer: None,
                    });
                    for (delta, (topic, partition, value)) in (0..).zip(offsets) {
                        entry
                            .offsets
                            .committed(&topic, partition, value, base.plus(delta));
                    }
                }
                let _ = done.send(outcome.map(|_| ()));
            }
            Then::Group {
                group,
                purpose,
                done,
            } => {
                let outcome = outcome.map(|_| ());
                let mut effects = Vec::new();
                if let Some(entry) = self.groups.get_mut(&group) {
                    entry.group.stored(now, purpose, outcome, &mut effects);
                }
                self.finish(now, &group, effects, None);
                if let Some(done) = done {
                    let _ = done.send(outcome);
                }
            }
            Then::Removed {
                group,
                offsets,
                whole_group,
            } => {
                let (Ok(base), Some(entry)) = (outcome, self.groups.get_mut(&group)) else {
                    return; // The next check finds them again.
                };
                for (delta, (topic, partition)) in (0..).zip(offsets) {
                    entry.offsets.removed(&topic, partition, base.plus(delta));
                }
                if whole_group && entry.offsets.is_empty() && entry.group.is_unused() {
                    if let Some(moment) = entry.timer {
                        self.timers.remove(&(moment, group.clone()));
                    }
                    self.groups.remove(&group);
                }
            }
        }
    }

    /// Offsets that are in the log though their write was answered as unknown.
    pub fn catch_up(&mut self, bytes: &Bytes, now: Now) -> Result<Offset, UnreadableBatch> {
        let (next, records) = read_batch(bytes)?;
        for (offset, record) in records {
            if let Ok(Key::Offset {
                group,
                topic,
                partition,
            }) = Key::parse(&record.key)
            {
                let config = &self.config;
                let entry = self.groups.entry(group).or_insert_with(|| Entry {
                    group: Group::new(config.clone(), now.wall_ms),
                    offsets: Offsets::default(),
                    timer: None,
                });
                replay_offset(&mut entry.offsets, &topic, partition, record.value, offset);
            }
        }
        Ok(next)
    }
}

impl Write {
    pub fn record_count(&self) -> i64 {
        self.then.record_count()
    }
}

impl Then {
    fn record_count(&self) -> i64 {
        let count = match self {
            Then::Committed { offsets, .. } => offsets.len(),
            Then::Group { .. } => 1,
            Then::Removed {
                offsets,
                whole_group,
                ..
            } => offsets.len() + usize::from(*whole_group),
        };
        count as i64
    }
}
