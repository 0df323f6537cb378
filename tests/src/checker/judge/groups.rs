//! A group's commits: what was acknowledged stays, and a member goes on where the group was.
//!
//! Invariant: only commits that were acknowledged bind the group. One of unknown outcome may take
//! effect at any time while its member is in the group, so a higher offset seen for a moment is no
//! anomaly if a lower commit was sent after it.

use std::collections::{BTreeMap, HashMap};

use super::index::Index;
use super::{Kind, Verdict};
use crate::checker::history::{Event, PartitionNumber, Timed};

/// What is known of the group's offset in one partition.
#[derive(Debug, Clone, Default)]
struct Position {
    /// Highest commit that was acknowledged.
    acked: u64,
    /// Highest commit that was sent.
    sent: u64,
    /// Highest offset that an observer was told.
    told: u64,
    /// When a commit of each offset was last sent, by place in the history.
    last_sent: BTreeMap<u64, usize>,
}

struct Commit {
    partition: PartitionNumber,
    offset: u64,
    floor: u64,
}

/// A member that was given a partition and has not read it yet.
struct Begin {
    floor: u64,
}

struct Groups<'a> {
    index: &'a Index,
    positions: Vec<Position>,
    commits: HashMap<u64, Vec<Commit>>,
    begins: HashMap<(u32, PartitionNumber), Begin>,
    /// For each question: what was acknowledged and told, per partition, when it was asked.
    asked: HashMap<u64, Vec<Position>>,
}

pub fn check(history: &[Timed], index: &Index, verdict: &mut Verdict) {
    let mut groups = Groups {
        index,
        positions: vec![Position::default(); index.names.len()],
        commits: HashMap::new(),
        begins: HashMap::new(),
        asked: HashMap::new(),
    };
    // Only questions that an answer about the group belongs to are worth remembering.
    let answered: std::collections::HashSet<u64> = history
        .iter()
        .filter_map(|timed| match timed.event {
            Event::Position { key, .. } => Some(key),
            _ => None,
        })
        .collect();
    for (place, timed) in history.iter().enumerate() {
        if let Event::Ask { key } = timed.event
            && !answered.contains(&key)
        {
            continue;
        }
        groups.take(place, timed, verdict);
    }
}

impl Groups<'_> {
    fn take(&mut self, place: usize, timed: &Timed, verdict: &mut Verdict) {
        let micros = timed.micros;
        match &timed.event {
            Event::Commit {
                key,
                partition,
                offset,
                ..
            } => {
                let position = &mut self.positions[*partition];
                position.sent = position.sent.max(*offset);
                position.last_sent.insert(*offset, place);
                let floor = position.acked;
                self.commits.entry(*key).or_default().push(Commit {
                    partition: *partition,
                    offset: *offset,
                    floor,
                });
            }
            Event::Committed { key } => self.committed(*key, micros, verdict),
            Event::Assign { reader, partition } => {
                let floor = self.positions[*partition].acked;
                self.begins.insert((*reader, *partition), Begin { floor });
            }
            Event::Revoke { reader, partition } => {
                self.begins.remove(&(*reader, *partition));
            }
            Event::Poll {
                reader,
                partition,
                offset,
                ..
            } => self.begin(*reader, *partition, *offset, micros, verdict),
            Event::Ask { key } => {
                self.asked.insert(*key, self.positions.clone());
            }
            Event::Position {
                key,
                partition,
                offset,
            } => self.told(*key, *partition, *offset, micros, verdict),
            _ => {}
        }
    }

    fn committed(&mut self, key: u64, micros: u64, verdict: &mut Verdict) {
        for commit in self.commits.remove(&key).into_iter().flatten() {
            let position = &mut self.positions[commit.partition];
            if commit.offset < commit.floor {
                let what = format!(
                    "offset {} of {} was committed, though the group had committed {} before: its \
                     member did not own the partition any more",
                    commit.offset,
                    self.index.name(commit.partition),
                    commit.floor
                );
                verdict.add(Kind::CommitFell, micros, what);
            }
            position.acked = position.acked.max(commit.offset);
        }
    }

    /// A member's first read after it was given the partition.
    fn begin(
        &mut self,
        reader: u32,
        partition: PartitionNumber,
        offset: u64,
        micros: u64,
        verdict: &mut Verdict,
    ) {
        let Some(begin) = self.begins.remove(&(reader, partition)) else {
            return;
        };
        let name = self.index.name(partition);
        let sent = self.positions[partition].sent;
        if offset < begin.floor {
            let what = format!(
                "member {reader} began to read {name} at offset {offset}, though the group had \
                 committed {} before",
                begin.floor
            );
            verdict.add(Kind::CommitFell, micros, what);
        } else if offset > sent {
            let what = format!(
                "member {reader} began to read {name} at offset {offset}, beyond every commit, the \
                 highest being {sent}"
            );
            verdict.add(Kind::Skipped, micros, what);
        }
    }

    fn told(
        &mut self,
        key: u64,
        partition: PartitionNumber,
        offset: u64,
        micros: u64,
        verdict: &mut Verdict,
    ) {
        let Some(then) = self.asked.get(&key) else {
            return;
        };
        let then = &then[partition];
        let now = &mut self.positions[partition];
        let name = self.index.name(partition);
        if offset < then.acked {
            let what = format!(
                "the group's offset in {name} is {offset}, though {} was committed before",
                then.acked
            );
            verdict.add(Kind::CommitFell, micros, what);
        } else if offset > now.sent {
            let what = format!(
                "the group's offset in {name} is {offset}, the highest ever committed is {}",
                now.sent
            );
            verdict.add(Kind::Phantom, micros, what);
        } else if offset < then.told {
            let sent = |offset| now.last_sent.get(&offset).copied();
            if sent(offset) < sent(then.told) {
                let what = format!(
                    "the group's offset in {name} is {offset}, and was {} before",
                    then.told
                );
                verdict.add(Kind::CommitFell, micros, what);
            }
        }
        now.told = now.told.max(offset);
    }
}
