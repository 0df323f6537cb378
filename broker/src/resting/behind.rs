//! Leaders at rest speak to followers that are behind: a message to a follower may be lost, it may be restarted, and
//! a link can come and go without that anybody sees it.
//!
//! Invariant: a follower that is connected and not known to have all there is, and to know that it is committed, is
//! spoken to within a few passes. Followers of one broker that does not answer hold up nobody else.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use chronik_types::id::{BrokerId, RaftGroupId, ReplicaId};
use futures::StreamExt;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::debug;
use uuid::Uuid;

use crate::peers::campaign::greet;
use crate::peers::{LinkTable, Peers};
use crate::replica::Replica;

/// Leaders that speak to followers of one broker at the same time.
const SPEAKING_MAX: usize = 64;

/// What is remembered from one pass to the next.
pub(super) struct Behind {
    peers: Peers,
    stop: CancellationToken,
    /// Followers that were behind in the last pass: what is sent only now is on its way.
    before: BTreeSet<(RaftGroupId, ReplicaId)>,
    incarnations: BTreeMap<BrokerId, Option<Uuid>>,
    speaking: BTreeMap<BrokerId, TaskTracker>,
}

impl Behind {
    pub(super) fn new(peers: Peers, stop: CancellationToken) -> Self {
        Self {
            peers,
            stop,
            before: BTreeSet::new(),
            incarnations: BTreeMap::new(),
            speaking: BTreeMap::new(),
        }
    }

    /// One pass over all replicas. Speaks beside the passes, which go on.
    pub(super) fn look(&mut self, all: &[(RaftGroupId, Arc<Replica>)], links: &LinkTable) {
        self.forget_the_restarted(all, links);
        let away = links.away();
        let mut spoken_to: BTreeMap<BrokerId, Vec<(Arc<Replica>, ReplicaId)>> = BTreeMap::new();
        let mut behind = BTreeSet::new();
        for (group, leader) in all {
            for follower in leader.engine().behind_at_rest(&away) {
                behind.insert((*group, follower));
                if self.before.contains(&(*group, follower)) {
                    let broker = spoken_to.entry(follower.broker_id).or_default();
                    broker.push((leader.clone(), follower));
                }
            }
        }
        self.before = behind;
        for (broker, leaders) in spoken_to {
            let speaking = self.speaking.entry(broker).or_default();
            if speaking.is_empty() {
                debug!(
                    peer = broker.0,
                    leaders = leaders.len(),
                    "leaders at rest speak to followers that are behind"
                );
                let speak = speak(self.peers.clone(), leaders);
                speaking.spawn(self.stop.clone().run_until_cancelled_owned(speak));
            }
        }
    }

    /// What a follower knew to be committed it may have forgotten when its broker was restarted.
    fn forget_the_restarted(&mut self, all: &[(RaftGroupId, Arc<Replica>)], links: &LinkTable) {
        let is_other = |broker: &BrokerId, incarnation: Option<Uuid>| {
            self.incarnations.get(broker) != Some(&incarnation)
        };
        let restarted: BTreeSet<BrokerId> = links
            .0
            .iter()
            .filter(|(broker, status)| !status.is_up() || is_other(broker, status.incarnation))
            .map(|(broker, _)| *broker)
            .collect();
        if restarted.is_empty() {
            return;
        }
        for (_, replica) in all {
            replica.engine().unsure_at_rest(&restarted);
        }
        let links = links.0.iter();
        self.incarnations = links
            .map(|(broker, status)| (*broker, status.incarnation))
            .collect();
    }
}

/// Each leader speaks to its follower, all of one broker. If it does not answer, the next pass tries again.
async fn speak(peers: Peers, leaders: Vec<(Arc<Replica>, ReplicaId)>) {
    let unanswered = AtomicUsize::new(0);
    let leaders = futures::stream::iter(leaders);
    let speak = leaders.for_each_concurrent(SPEAKING_MAX, |(leader, follower)| {
        let (peers, unanswered) = (&peers, &unanswered);
        async move {
            if unanswered.load(Ordering::Relaxed) < SPEAKING_MAX
                && !greet(peers, &leader, follower).await
            {
                unanswered.fetch_add(1, Ordering::Relaxed);
            }
        }
    });
    speak.await;
}
