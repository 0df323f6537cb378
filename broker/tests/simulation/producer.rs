//! A producer of one partition. An idempotent one retries until each batch is acknowledged, in
//! order, several in flight; a plain one sends every batch once.
//!
//! Invariant: it knows of each batch whether it was acknowledged, refused, or neither.

use std::collections::VecDeque;

use bytes::Bytes;
use chronik_broker::replica::{Acks, AppendError, Appended};
use chronik_types::id::{BrokerId, RaftGroupId};
use chronik_types::record_batch::{HEADER_SIZE, LENGTH_PREFIX_SIZE, crc32c};
use rand::Rng;
use rand::rngs::StdRng;
use rand::seq::IndexedRandom;

use crate::invariants::BatchKey;
use crate::plan::{GroupPlan, Plan, Sabotage};
use crate::requests::Ask;
use crate::trace::event;
use crate::transit::Transit;

/// How long a client waits for an answer.
const ANSWER_LIMIT_MS: u64 = 3_000;

/// How long a quiet time is.
const QUIET_MS: u64 = 1_500;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Idempotent,
    Plain(Acks),
}

/// What became of a batch, as its producer was told.
pub enum Outcome {
    /// acks=all, durable by promise.
    Acked(Appended, BatchKey),
    /// Certainly not appended, and never sent again.
    Refused(BatchKey, AppendError),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Waiting,
    Sent { request: u64, until_ms: u64 },
    Done,
}

struct Batch {
    bytes: Bytes,
    key: BatchKey,
    state: State,
}

pub struct Producer {
    pub client: usize,
    pub group: RaftGroupId,
    pub kind: Kind,
    brokers: Vec<BrokerId>,
    target: BrokerId,
    batches: VecDeque<Batch>,
    in_flight_max: usize,
    next_sequence: i32,
    batch_count: u64,
    resume_at_ms: u64,
    /// An error came: what is in flight is waited for before anything is sent again.
    is_draining: bool,
    pub is_stopped: bool,
    /// A batch was acknowledged since this was reset.
    pub has_succeeded: bool,
    /// A batch was acknowledged, ever.
    is_known: bool,
    records_max: usize,
    record_bytes_max: usize,
    pace_ms: u64,
    pub has_quiet_times: bool,
    sent_acks: Acks,
}

impl Producer {
    pub fn new(
        client: usize,
        group: &GroupPlan,
        kind: Kind,
        plan: &Plan,
        random: &mut StdRng,
    ) -> Producer {
        let brokers: Vec<BrokerId> = group.replicas.iter().map(|r| r.broker_id).collect();
        let sent_acks = match (kind, plan.sabotage) {
            (Kind::Plain(acks), _) if acks != Acks::All => acks,
            (_, Sabotage::AckBeforeCommit) => Acks::Leader,
            _ => Acks::All,
        };
        Producer {
            client,
            group: group.id,
            kind,
            target: brokers[0],
            brokers,
            batches: VecDeque::new(),
            in_flight_max: random.random_range(1..=5),
            next_sequence: 0,
            batch_count: 0,
            resume_at_ms: 0,
            is_draining: false,
            is_stopped: false,
            has_succeeded: false,
            is_known: kind != Kind::Idempotent,
            records_max: plan.records_max,
            record_bytes_max: plan.record_bytes_max,
            pace_ms: plan.pace_ms,
            has_quiet_times: plan.has_quiet_times,
            sent_acks,
        }
    }

    /// Nothing is unresolved.
    pub fn is_idle(&self) -> bool {
        self.batches.is_empty()
    }

    pub fn step(&mut self, now_ms: u64, transit: &mut Transit, random: &mut StdRng) {
        let mut has_timed_out = false;
        for batch in &mut self.batches {
            if let State::Sent { until_ms, .. } = batch.state
                && until_ms <= now_ms
            {
                batch.state = self.kind.after_unknown();
                has_timed_out = true;
            }
        }
        if has_timed_out {
            self.turn_elsewhere(None, random);
        }
        self.forget_done();
        let in_flight = |batch: &&Batch| matches!(batch.state, State::Sent { .. });
        let in_flight = self.batches.iter().filter(in_flight).count();
        if self.is_draining && in_flight == 0 {
            self.is_draining = false;
            self.resume_at_ms = now_ms + random.random_range(10..100);
        }
        let turn = now_ms / QUIET_MS + self.group.0;
        let is_quiet = self.has_quiet_times && turn.is_multiple_of(3);
        if self.is_draining || now_ms < self.resume_at_ms || (is_quiet && !self.is_stopped) {
            return;
        }
        // A partition takes any first sequence number of a producer that it does not know, as Kafka's
        // do: a second batch could get in front of a first one that was refused.
        let in_flight_max = match self.is_known {
            true => self.in_flight_max,
            false => 1,
        };
        if !self.is_stopped && self.batches.len() < in_flight_max {
            let batch = self.make_batch(random);
            self.batches.push_back(batch);
            self.resume_at_ms = now_ms + self.pace_ms;
        }
        let (client, target, group, acks) = (self.client, self.target, self.group, self.sent_acks);
        for batch in &mut self.batches {
            if batch.state == State::Waiting {
                let ask = Ask::Produce(batch.bytes.clone(), acks);
                let request = transit.send(client, target, group, ask, random);
                batch.state = State::Sent {
                    request,
                    until_ms: now_ms + ANSWER_LIMIT_MS,
                };
            }
        }
    }

    /// None: the answer is not about a batch that is waited for, or says nothing for good.
    pub fn answered(
        &mut self,
        request: u64,
        result: Result<Appended, AppendError>,
        random: &mut StdRng,
    ) -> Result<Option<Outcome>, String> {
        let is_asked =
            |batch: &Batch| matches!(batch.state, State::Sent { request: r, .. } if r == request);
        let Some(at) = self.batches.iter().position(is_asked) else {
            return Ok(None);
        };
        let batch = &mut self.batches[at];
        let key = batch.key;
        let error = match result {
            Ok(appended) => {
                batch.state = State::Done;
                self.has_succeeded = true;
                self.is_known = true;
                let is_promised = self.kind != Kind::Plain(Acks::Leader);
                return Ok(is_promised.then_some(Outcome::Acked(appended, key)));
            }
            Err(error) => error,
        };
        event!(
            "client {} group {}: {key:?} at broker {}: {error}",
            self.client,
            self.group,
            self.target
        );
        check_error(&error)?;
        batch.state = self.kind.after_unknown();
        let hint = match &error {
            AppendError::NotLeader { leader } => leader.map(|hint| hint.broker_id),
            _ => Some(self.target),
        };
        self.turn_elsewhere(hint, random);
        let may_be_appended = matches!(
            error,
            AppendError::TimedOut | AppendError::NotEnoughReplicasAfterAppend { .. }
        );
        let is_refused = self.kind != Kind::Idempotent && !may_be_appended;
        Ok(is_refused.then_some(Outcome::Refused(key, error)))
    }

    fn turn_elsewhere(&mut self, hint: Option<BrokerId>, random: &mut StdRng) {
        self.is_draining = true;
        let somewhere = *self.brokers.choose(random).unwrap();
        self.target = hint.unwrap_or(somewhere);
    }

    fn forget_done(&mut self) {
        match self.kind {
            // In order, so that what is sent again follows what was sent before it.
            Kind::Idempotent => {
                while self.batches.front().is_some_and(|b| b.state == State::Done) {
                    self.batches.pop_front();
                }
            }
            Kind::Plain(_) => self.batches.retain(|batch| batch.state != State::Done),
        }
    }

    fn make_batch(&mut self, random: &mut StdRng) -> Batch {
        self.batch_count += 1;
        let count = random.random_range(1..=self.records_max);
        let size = random.random_range(1..=self.record_bytes_max);
        // One value is enough to tell batches apart; what a record looks like inside is not looked
        // at by any part of this.
        let mut body = format!("{} {} ", self.client, self.batch_count).into_bytes();
        body.resize(body.len() + size * count, b'x');
        let sequence = match self.kind {
            Kind::Idempotent => Some(self.next_sequence),
            Kind::Plain(_) => None,
        };
        let bytes = encode(&body, count, self.client, sequence);
        self.next_sequence += count as i32;
        Batch {
            key: BatchKey::of(&bytes),
            bytes: bytes.into(),
            state: State::Waiting,
        }
    }
}

impl Kind {
    /// What to do with a batch whose outcome is not known.
    fn after_unknown(self) -> State {
        match self {
            Kind::Idempotent => State::Waiting,
            Kind::Plain(_) => State::Done,
        }
    }
}

/// Errors that a correct producer never gets.
fn check_error(error: &AppendError) -> Result<(), String> {
    match error {
        AppendError::NotLeader { .. }
        | AppendError::TimedOut
        | AppendError::NotEnoughReplicas { .. }
        | AppendError::NotEnoughReplicasAfterAppend { .. }
        | AppendError::OutOfOrderSequence { .. }
        | AppendError::Storage
        | AppendError::Overloaded => Ok(()),
        other => Err(format!("a producer got an error that it must not: {other}")),
    }
}

/// A record batch v2 as a client sends it.
fn encode(body: &[u8], count: usize, producer: usize, sequence: Option<i32>) -> Vec<u8> {
    let mut bytes = vec![0; HEADER_SIZE];
    bytes.extend_from_slice(body);
    let length = (bytes.len() - LENGTH_PREFIX_SIZE) as i32;
    let count = count as i32;
    bytes[8..12].copy_from_slice(&length.to_be_bytes());
    bytes[16] = 2;
    bytes[23..27].copy_from_slice(&(count - 1).to_be_bytes());
    let (id, epoch) = match sequence {
        Some(_) => (producer as i64, 0_i16),
        None => (-1, -1),
    };
    bytes[43..51].copy_from_slice(&id.to_be_bytes());
    bytes[51..53].copy_from_slice(&epoch.to_be_bytes());
    bytes[53..57].copy_from_slice(&sequence.unwrap_or(-1).to_be_bytes());
    bytes[57..61].copy_from_slice(&count.to_be_bytes());
    let crc = crc32c(&bytes[21..]);
    bytes[17..21].copy_from_slice(&crc.to_be_bytes());
    bytes
}
