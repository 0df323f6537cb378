//! The high watermark, as the leaders tell it under the epoch they were asked for: under one epoch
//! or a later one it does not fall. A leader that does not know yet that it was replaced may lag;
//! that shows as an earlier epoch, and is counted.

use std::collections::{BTreeMap, HashMap};

use super::index::Index;
use super::{Kind, Verdict};
use crate::checker::history::{Event, Timed};

pub fn check(history: &[Timed], index: &Index, verdict: &mut Verdict) {
    // By partition and epoch: the highest answer, and the place in the history where it stands.
    let mut highest: Vec<BTreeMap<i64, (u64, usize)>> = vec![BTreeMap::new(); index.names.len()];
    let mut asked: HashMap<u64, usize> = HashMap::new();
    for (place, timed) in history.iter().enumerate() {
        match &timed.event {
            Event::Ask { key } => {
                asked.insert(*key, place);
            }
            Event::Watermark {
                key,
                partition,
                epoch,
                offset,
            } => {
                let Some(asked) = asked.remove(key) else {
                    continue;
                };
                let before = highest[*partition]
                    .iter()
                    .filter(|(_, (_, answered))| *answered < asked);
                for (earlier, (known, _)) in before {
                    if offset >= known {
                        continue;
                    }
                    if earlier > epoch {
                        verdict.note("answers of a leader that had been replaced");
                        continue;
                    }
                    let what = format!(
                        "the high watermark of {} is {offset} under epoch {epoch}, and was {known} \
                         under epoch {earlier}",
                        index.name(*partition)
                    );
                    verdict.add(Kind::WatermarkFell, timed.micros, what);
                }
                let entry = highest[*partition]
                    .entry(*epoch)
                    .or_insert((*offset, place));
                if *offset > entry.0 {
                    *entry = (*offset, place);
                }
            }
            _ => {}
        }
    }
}
