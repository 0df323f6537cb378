//! Progress: who was stuck, and whether the history shows enough to be judged.

use super::index::{Index, Outcome};
use super::{Kind, Verdict};
use crate::checker::history::{Event, Timed};

pub fn check(history: &[Timed], index: &Index, verdict: &mut Verdict) {
    let end = history.last().map_or(0, |timed| timed.micros);
    for timed in history {
        if let Event::Stuck { who, why } = &timed.event {
            verdict.add(Kind::Stuck, timed.micros, format!("{who}: {why}"));
        }
    }
    for (partition, sends) in index.sends.iter().enumerate() {
        for (value, send) in sends {
            if send.outcome == Outcome::Pending {
                let what = format!("{} has no outcome", index.describe(partition, *value));
                verdict.add(Kind::Stuck, send.micros, what);
            }
        }
    }
    if index.read_backs.is_empty() {
        let what = "nothing was read back to its end".to_owned();
        verdict.add(Kind::Incomplete, end, what);
    }
    for (partition, sends) in index.sends.iter().enumerate() {
        let acked = |send: &super::index::Send| matches!(send.outcome, Outcome::Acked { .. });
        if !sends.values().any(acked) {
            let what = format!("nothing was acknowledged in {}", index.name(partition));
            verdict.add(Kind::Incomplete, end, what);
        }
    }
}
