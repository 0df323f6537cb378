//! Rebuilds a log's state from the records of the WAL, on top of what the checkpoint says.
//!
//! Invariant: replay gives exactly the state that the same operations gave before the crash. An entry
//! that is in segments already is skipped, so replaying twice changes nothing.

use bytes::Bytes;
use chronik_types::offset::Offset;

use super::replacement::Replacement;
use super::state::{LogState, ReplicaState, TailEntry};
use super::write::check_batches;
use crate::checkpoint::GroupCheckpoint;
use crate::clock::now_ms;
use crate::entry::{LogEntry, Payload, Purged};
use crate::memory::Memory;
use crate::segment::Segment;
use crate::wal::Action;

/// A log while the WAL is being read.
#[derive(Debug)]
pub struct Replay {
    pub state: LogState,
    /// What cannot be true of this log, unless it turns out that it was deleted later: the WAL may
    /// still have the later records of a deleted log but not its first ones.
    pub damage: Option<String>,
    now_ms: i64,
}

impl Replay {
    pub fn new(state: LogState) -> Self {
        Replay {
            state,
            damage: None,
            now_ms: now_ms(),
        }
    }

    /// Applies one record of the group. Not for `Delete` and `Mark`.
    pub fn apply(&mut self, record_number: u64, file_sequence: u64, action: Action) {
        if record_number < self.state.replay_from_record {
            return;
        }
        if let Action::Install(content) = &action {
            self.install(record_number, content);
            return;
        }
        if self.damage.is_some() {
            return;
        }
        match action {
            Action::Entries {
                relocated,
                committed_next,
                entries,
            } => {
                for entry in entries {
                    if let Err(damage) = self.entry(relocated, file_sequence, entry) {
                        self.damage = Some(damage);
                        return;
                    }
                }
                self.state.committed_next = self.state.committed_next.max(committed_next);
            }
            Action::Vote(vote) => self.state.vote = Some(Bytes::copy_from_slice(&vote)),
            Action::Truncate { next } => {
                let next = next
                    .max(self.state.flushed_next)
                    .max(self.state.first_index);
                self.state.cut(next);
            }
            Action::Purge {
                purged,
                state_index,
                state,
            } => self.purge(purged, state_index, &state),
            Action::LogStart(offset) => {
                self.state.log_start = self.state.log_start.max(offset);
            }
            Action::Replace(body) => match Replacement::decode(&body) {
                Some(replacement) => {
                    // Without effect if the checkpoint has it already.
                    self.state.apply_replacement(&replacement);
                }
                None => self.damage = Some(format!("record {record_number} makes no sense")),
            },
            Action::Delete | Action::Mark | Action::Install(_) => {}
        }
    }

    /// Whatever was before, and if it made no sense, does not matter any more.
    fn install(&mut self, record_number: u64, content: &Bytes) {
        let Some(content) = GroupCheckpoint::decode_alone(content) else {
            self.damage = Some(format!("record {record_number} makes no sense"));
            return;
        };
        self.damage = None;
        let new = content.into_state(self.state.segment_bytes);
        self.state.replace_content(new);
        // A checkpoint may come to name this state while the WAL still has what was before.
        self.state.replay_from_record = record_number.saturating_add(1);
    }

    fn purge(&mut self, purged: Purged, state_index: u64, bytes: &Bytes) {
        let state = &mut self.state;
        if state.purged.is_none_or(|old| old.index < purged.index) {
            state.purged = Some(purged);
        }
        // It was committed, whatever else the records say.
        state.committed_next = state.committed_next.max(purged.index.saturating_add(1));
        let is_newer = |saved: &ReplicaState| saved.index < state_index;
        if state.replica_state.as_ref().is_none_or(is_newer) {
            let saved = ReplicaState {
                index: state_index,
                state: Bytes::copy_from_slice(bytes),
            };
            state.durable_replica_state = Some(saved.clone());
            state.replica_state = Some(saved);
        }
    }

    fn entry(&mut self, relocated: bool, file: u64, entry: LogEntry) -> Result<(), String> {
        let state = &mut self.state;
        let (index, next_index) = (entry.index, state.next_index());
        if index < state.flushed_next {
            return Ok(());
        }
        if state.may_start_anywhere() {
            let committed_next = state.committed_next;
            state.start_at(index);
            state.committed_next = committed_next;
        } else if index > next_index {
            return Err(format!("entry {index} follows where {next_index} is due"));
        } else if index < next_index {
            if relocated && state.stored_term_at(index) == entry.term {
                return Ok(());
            }
            return Err(format!("entry {index} is there twice"));
        }
        let mut next_offset = state.log_end_offset();
        let payload = match entry.payload {
            Payload::Blank => Payload::Blank,
            // Copied, so that an entry does not keep the whole frame in memory.
            Payload::Membership(bytes) => Payload::Membership(Bytes::copy_from_slice(&bytes)),
            Payload::Control(bytes) => Payload::Control(Bytes::copy_from_slice(&bytes)),
            Payload::Batches {
                bytes,
                base_offset,
                next_offset: next,
            } => {
                if base_offset != next_offset {
                    return Err(format!(
                        "entry {index} has offset {base_offset}, not {next_offset}"
                    ));
                }
                check_batches(&bytes, base_offset, next)?;
                next_offset = next;
                let bytes = Bytes::copy_from_slice(&bytes);
                Payload::Batches {
                    bytes,
                    base_offset,
                    next_offset,
                }
            }
        };
        let entry = LogEntry {
            index,
            term: entry.term,
            payload,
        };
        state.push(TailEntry { entry, next_offset }, self.now_ms);
        state.made_durable(index, index + 1, file);
        Ok(())
    }

    /// To be called after the last record. Gives the segments too that turn out to be superfluous.
    pub fn finish(self) -> Result<(LogState, Vec<Segment>), String> {
        if let Some(damage) = self.damage {
            return Err(damage);
        }
        let mut state = self.state;
        state.committed_next = state
            .committed_next
            .max(state.flushed_next)
            .clamp(state.first_index, state.next_index());
        debug_assert!(state.tail_base >= Offset::ZERO);
        state.advance_ready();
        if let Some(purged) = state.purged
            && purged.index >= state.next_index()
        {
            let (purged, next) = (purged.index, state.next_index());
            return Err(format!(
                "entry {purged} is purged, but the log ends before {next}"
            ));
        }
        if state.log_start > state.log_end_offset() {
            let (start, end) = (state.log_start, state.log_end_offset());
            return Err(format!(
                "the log starts at offset {start} and ends at {end}"
            ));
        }
        state.durable_purged = state.purged;
        state.durable_log_start = state.log_start;
        state.next_generation = state
            .segments
            .iter()
            .map(|segment| segment.generation)
            .fold(state.generation, u32::max)
            .saturating_add(1);
        // Memory is counted when all logs are there.
        let gone = state.trim(&Memory::default());
        Ok((state, gone))
    }
}
