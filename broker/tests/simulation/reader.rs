//! A consumer of one partition: reads from where it is to the end, of the leader or of any replica.

use chronik_broker::replica::{ReadError, ReadResult};
use chronik_types::epoch::LeaderEpoch;
use chronik_types::id::{BrokerId, RaftGroupId};
use chronik_types::offset::Offset;
use rand::Rng;
use rand::rngs::StdRng;
use rand::seq::IndexedRandom;

use crate::invariants::{Stored, stored};
use crate::plan::GroupPlan;
use crate::requests::Ask;
use crate::transit::Transit;

const ANSWER_LIMIT_MS: u64 = 2_000;
/// How often it looks back at what it has read, which may not be in anybody's memory any more.
const LOOKS_BACK: f64 = 0.02;

pub struct Reader {
    client: usize,
    pub group: RaftGroupId,
    brokers: Vec<BrokerId>,
    target: BrokerId,
    pub next: Offset,
    last_epoch: LeaderEpoch,
    asked: Option<Asked>,
    resume_at_ms: u64,
    /// It reads of any replica, not of the leader only.
    reads_anywhere: bool,
}

struct Asked {
    request: u64,
    until_ms: u64,
    from: Offset,
    /// It says nothing of where the reader is.
    looks_back: bool,
}

/// What a reader got, to be judged.
pub struct Got {
    pub from: Offset,
    pub batches: Vec<Stored>,
    pub high_watermark: Offset,
}

impl Reader {
    pub fn new(client: usize, group: &GroupPlan, reads_anywhere: bool) -> Reader {
        let brokers: Vec<BrokerId> = group.replicas.iter().map(|r| r.broker_id).collect();
        Reader {
            client,
            group: group.id,
            target: brokers[0],
            brokers,
            next: Offset::ZERO,
            last_epoch: LeaderEpoch(-1),
            asked: None,
            resume_at_ms: 0,
            reads_anywhere,
        }
    }

    pub fn step(&mut self, now_ms: u64, transit: &mut Transit, random: &mut StdRng) {
        let is_late = |asked: &Asked| asked.until_ms <= now_ms;
        if self.asked.as_ref().is_some_and(is_late) {
            self.asked = None;
            self.target = *self.brokers.choose(random).unwrap();
        }
        if self.asked.is_some() || now_ms < self.resume_at_ms {
            return;
        }
        let looks_back = random.random_bool(LOOKS_BACK);
        let from = match looks_back {
            true => Offset(random.random_range(0..=self.next.0)),
            false => self.next,
        };
        let ask = match self.reads_anywhere {
            true => Ask::ReadAny(from),
            false if looks_back => Ask::Read(from, LeaderEpoch(-1)),
            false => Ask::Read(from, self.last_epoch),
        };
        let request = transit.send(self.client, self.target, self.group, ask, random);
        self.asked = Some(Asked {
            request,
            until_ms: now_ms + ANSWER_LIMIT_MS,
            from,
            looks_back,
        });
    }

    /// Who is asked at the moment, if anybody is.
    pub fn target(&self) -> BrokerId {
        self.target
    }

    pub fn answered(
        &mut self,
        now_ms: u64,
        request: u64,
        result: Result<ReadResult, ReadError>,
        may_be_unreadable: bool,
        random: &mut StdRng,
    ) -> Result<Option<Got>, String> {
        let Some(asked) = self.asked.take_if(|asked| asked.request == request) else {
            return Ok(None);
        };
        let result = match result {
            Ok(result) => result,
            Err(ReadError::NotLeader { leader }) => {
                self.resume_at_ms = now_ms + random.random_range(5..50);
                let somewhere = *self.brokers.choose(random).unwrap();
                self.target = leader.map_or(somewhere, |hint| hint.broker_id);
                return Ok(None);
            }
            // A replica that is behind what this reader has from another one.
            Err(ReadError::OffsetOutOfRange { .. }) => {
                self.resume_at_ms = now_ms + random.random_range(5..50);
                self.target = *self.brokers.choose(random).unwrap();
                return Ok(None);
            }
            // Only a broker that cannot read its disk says so.
            Err(ReadError::Corrupt(_)) if may_be_unreadable => {
                self.resume_at_ms = now_ms + random.random_range(5..50);
                self.target = *self.brokers.choose(random).unwrap();
                return Ok(None);
            }
            Err(error) => return Err(format!("a reader got an error that it must not: {error}")),
        };
        if let Some(end) = result.diverging {
            return Err(format!(
                "group {}: a reader at {} with records of epoch {} is told that they diverge: {end:?}",
                self.group, self.next, self.last_epoch
            ));
        }
        let mut batches = Vec::new();
        for bytes in &result.records {
            batches.extend(stored(bytes)?);
        }
        match batches.last() {
            _ if asked.looks_back => {}
            Some(last) => {
                self.next = last.next_offset;
                self.last_epoch = last.leader_epoch;
            }
            None => self.resume_at_ms = now_ms + random.random_range(5..30),
        }
        if self.reads_anywhere && random.random_bool(0.1) {
            self.target = *self.brokers.choose(random).unwrap();
        }
        Ok(Some(Got {
            from: asked.from,
            batches,
            high_watermark: result.high_watermark,
        }))
    }
}
