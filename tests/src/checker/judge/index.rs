//! The history by value and by offset: what the checks look things up in.

use std::collections::{BTreeMap, HashMap, HashSet};

use super::{Kind, Verdict};
use crate::checker::history::{CORRUPT, Event, Mode, PartitionNumber, Timed, WrittenValue};

/// What became of a send.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// Not known by the end of the history.
    Pending,
    Acked {
        offset: Option<u64>,
        micros: u64,
    },
    Failed,
    Unknown {
        micros: u64,
    },
}

#[derive(Debug, Clone)]
pub struct Send {
    pub micros: u64,
    /// Highest offset that anybody was acknowledged in the partition before this send began.
    pub floor: Option<u64>,
    pub outcome: Outcome,
}

/// A value where a reader found it.
#[derive(Debug, Clone, Copy)]
pub struct Sighting {
    pub value: WrittenValue,
    pub reader: u32,
    pub micros: u64,
}

/// A read back that came to its end, with the values it found per partition.
#[derive(Debug)]
pub struct ReadBack {
    pub reader: u32,
    pub what: String,
    pub micros: u64,
    pub values: Vec<HashSet<WrittenValue>>,
}

#[derive(Debug, Default)]
pub struct Index {
    pub names: Vec<String>,
    pub modes: HashMap<u32, Mode>,
    /// By partition.
    pub sends: Vec<HashMap<WrittenValue, Send>>,
    /// By partition and offset: the first sighting.
    pub log: Vec<BTreeMap<u64, Sighting>>,
    pub read_backs: Vec<ReadBack>,
    pub kinds: HashMap<u32, String>,
}

impl Index {
    pub fn of(history: &[Timed], verdict: &mut Verdict) -> Self {
        let mut index = Self::default();
        let mut highest_acked: Vec<Option<u64>> = Vec::new();
        for timed in history {
            index.take(timed, &mut highest_acked, verdict);
        }
        index.find_read_backs(history);
        index
    }

    pub fn name(&self, partition: PartitionNumber) -> &str {
        self.names.get(partition).map_or("?", String::as_str)
    }

    /// A value as people read it.
    pub fn describe(&self, partition: PartitionNumber, value: WrittenValue) -> String {
        let mode = match self.modes.get(&value.client) {
            Some(mode) => format!("{mode:?}").to_lowercase(),
            None => "unknown".to_owned(),
        };
        format!(
            "value {} of client {} ({mode}) in {}",
            value.sequence,
            value.client,
            self.name(partition)
        )
    }

    fn take(&mut self, timed: &Timed, highest_acked: &mut Vec<Option<u64>>, verdict: &mut Verdict) {
        let micros = timed.micros;
        match &timed.event {
            Event::Partition { partition, name } => {
                assert_eq!(
                    *partition,
                    self.names.len(),
                    "partitions are numbered through"
                );
                self.names.push(name.clone());
                self.sends.push(HashMap::new());
                self.log.push(BTreeMap::new());
                highest_acked.push(None);
            }
            Event::Client { client, mode } => {
                self.modes.insert(*client, *mode);
            }
            Event::Reader { reader, kind } => {
                self.kinds.insert(*reader, kind.clone());
            }
            Event::Send { partition, value } => {
                verdict.sends += 1;
                let send = Send {
                    micros,
                    floor: highest_acked[*partition],
                    outcome: Outcome::Pending,
                };
                let before = self.sends[*partition].insert(*value, send);
                assert!(before.is_none(), "values are sent once: {value:?}");
            }
            Event::Ok {
                partition,
                value,
                offset,
            } => {
                verdict.acked += 1;
                let outcome = Outcome::Acked {
                    offset: *offset,
                    micros,
                };
                self.set_outcome(*partition, *value, outcome);
                highest_acked[*partition] = highest_acked[*partition].max(*offset);
            }
            Event::Fail {
                partition, value, ..
            } => self.set_outcome(*partition, *value, Outcome::Failed),
            Event::Unknown {
                partition, value, ..
            } => self.set_outcome(*partition, *value, Outcome::Unknown { micros }),
            Event::Poll {
                reader,
                partition,
                offset,
                values,
            } => {
                verdict.reads += values.len();
                for (offset, value) in (*offset..).zip(values) {
                    let sighting = Sighting {
                        value: *value,
                        reader: *reader,
                        micros,
                    };
                    self.see(*partition, offset, sighting, verdict);
                }
            }
            _ => {}
        }
    }

    fn set_outcome(&mut self, partition: PartitionNumber, value: WrittenValue, outcome: Outcome) {
        let send = self.sends[partition]
            .get_mut(&value)
            .unwrap_or_else(|| panic!("an outcome without a send: {value:?}"));
        assert_eq!(send.outcome, Outcome::Pending, "two outcomes of {value:?}");
        send.outcome = outcome;
    }

    /// A value was read: it must have been sent before, and be what others saw at this offset.
    fn see(
        &mut self,
        partition: PartitionNumber,
        offset: u64,
        sighting: Sighting,
        verdict: &mut Verdict,
    ) {
        let Sighting {
            value,
            reader,
            micros,
        } = sighting;
        if value != CORRUPT && !self.sends[partition].contains_key(&value) {
            let what = format!(
                "reader {reader} found {} at offset {offset}, which nobody had sent",
                self.describe(partition, value)
            );
            verdict.add(Kind::Phantom, micros, what);
        }
        let first = *self.log[partition].entry(offset).or_insert(sighting);
        if first.value != value {
            let what = format!(
                "offset {offset} of {}: reader {} found {} at {:.3} s, reader {reader} found {}",
                self.name(partition),
                first.reader,
                self.describe(partition, first.value),
                first.micros as f64 / 1e6,
                self.describe(partition, value),
            );
            verdict.add(Kind::InconsistentOffset, micros, what);
        }
    }

    fn find_read_backs(&mut self, history: &[Timed]) {
        let mut open: HashMap<u32, ReadBack> = HashMap::new();
        for timed in history {
            match &timed.event {
                Event::ReadBack { reader, what } => {
                    let read_back = ReadBack {
                        reader: *reader,
                        what: what.clone(),
                        micros: timed.micros,
                        values: vec![HashSet::new(); self.names.len()],
                    };
                    open.insert(*reader, read_back);
                }
                Event::Poll {
                    reader,
                    partition,
                    values,
                    ..
                } => {
                    if let Some(read_back) = open.get_mut(reader) {
                        read_back.values[*partition].extend(values);
                    }
                }
                Event::Complete { reader } => self.read_backs.extend(open.remove(reader)),
                _ => {}
            }
        }
    }
}
