//! Reads that go to the leaders of several partitions by unary calls: asked once, and once more
//! where the answer was that somebody else leads by now.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::Duration;

use chronik_proto::v1;
use chronik_proto::v1::PartitionError;
use chronik_types::cluster_image::Partition;
use chronik_types::id::BrokerId;
use futures::future::{BoxFuture, join_all};
use tokio::time::timeout;

use super::{BrokerLink, LeaderRouter};
use crate::error::CallError;

const CALL_TIMEOUT: Duration = Duration::from_secs(10);

/// What answers about a partition have in common.
pub trait LeaderAnswer {
    fn raft_group_id(&self) -> u64;
    fn error(&self) -> PartitionError;
    fn leader(&self) -> Option<&v1::Leader>;
}

/// A question to the leader of one partition.
pub struct Question<Q> {
    pub partition: Partition,
    pub question: Q,
}

/// Questions for one broker, with the Raft groups they are about.
type ToBroker<Q> = (Arc<BrokerLink>, Vec<Q>, Vec<u64>);

/// Asks the leader of each partition. Answers are by Raft group; a partition whose leader is not
/// known has none.
pub async fn ask_leaders<Q: Clone, A: LeaderAnswer>(
    router: &LeaderRouter,
    questions: &[Question<Q>],
    ask: impl Fn(Arc<BrokerLink>, Vec<Q>) -> BoxFuture<'static, Result<Vec<A>, CallError>>,
) -> HashMap<u64, Result<A, CallError>> {
    let mut answers = HashMap::new();
    let mut asked: HashMap<u64, BrokerId> = HashMap::new();
    for _ in 0..2 {
        let mut by_broker: BTreeMap<BrokerId, ToBroker<Q>> = BTreeMap::new();
        for Question {
            partition,
            question,
        } in questions
        {
            let group = partition.raft_group_id.0;
            if is_settled(answers.get(&group)) {
                continue;
            }
            let Some(link) = router.target(partition) else {
                continue;
            };
            if asked.insert(group, link.broker_id) == Some(link.broker_id) {
                continue;
            }
            let entry = by_broker
                .entry(link.broker_id)
                .or_insert_with(|| (link, Vec::new(), Vec::new()));
            entry.1.push(question.clone());
            entry.2.push(group);
        }
        let calls = by_broker.into_values().map(|(link, questions, groups)| {
            let call = timeout(CALL_TIMEOUT, ask(link, questions));
            async move { (groups, call.await) }
        });
        for (groups, outcome) in join_all(calls).await {
            let outcome = outcome
                .unwrap_or_else(|_| Err(CallError::UnknownOutcome("no answer in time".to_owned())));
            record(router, groups, outcome, &mut answers);
        }
    }
    answers
}

/// Whether asking again would not help.
fn is_settled<A: LeaderAnswer>(answer: Option<&Result<A, CallError>>) -> bool {
    answer.is_some_and(|answer| {
        answer.as_ref().is_ok_and(|answer| {
            !matches!(
                answer.error(),
                PartitionError::NotLeader | PartitionError::UnknownPartition
            )
        })
    })
}

fn record<A: LeaderAnswer>(
    router: &LeaderRouter,
    groups: Vec<u64>,
    outcome: Result<Vec<A>, CallError>,
    answers: &mut HashMap<u64, Result<A, CallError>>,
) {
    match outcome {
        Ok(results) => {
            for result in results {
                if let Some(leader) = result.leader() {
                    router.note_leader(result.raft_group_id(), leader);
                }
                answers.insert(result.raft_group_id(), Ok(result));
            }
        }
        Err(error) => {
            for group in groups {
                answers.insert(group, Err(error.clone()));
            }
        }
    }
}
