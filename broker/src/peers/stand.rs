//! An election without Raft, for a replica that rests: so thousands of partitions that nobody uses get other
//! leaders without thousands of instances being opened.
//!
//! Invariant: only asks and tells; what is promised by it is decided and written by the replica's engine, whose
//! rules are Raft's (dissertation, sections 3.4, 4.2.3 and 9.6). What goes another way than expected is left
//! to Raft, which is opened and goes on from what was written; who does not answer is spoken to later (`resting`).

use std::sync::Arc;
use std::time::Duration;

use chronik_types::id::ReplicaId;
use futures::StreamExt;
use futures::stream::FuturesUnordered;
use openraft::network::{NetStreamAppend, NetVote, RPCOption};
use tokio::sync::oneshot;
use tokio::time::timeout;

use super::Peers;
use super::network::GroupNetwork;
use crate::replica::Replica;
use crate::replica::engine::Candidacy;
use crate::replica::raft_config::{AppendRequest, LogId};

/// How long followers may take to answer to the first entry of a term, and to its commit. Who does not is spoken to
/// again (`resting`).
const FIRST_ENTRY_TIMEOUT: Duration = Duration::from_secs(1);
/// How long a term may take to begin, the disk included, before the campaign is over. It may begin later.
const TERM_TIMEOUT: Duration = Duration::from_secs(2);
/// What the library would wait for an answer; here whoever asks has limits of its own.
const UNLIMITED: Duration = Duration::MAX;

/// How a replica campaigns.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Campaign {
    /// Above the term of a candidate that cannot win.
    Outbid(u64),
    /// The leader before is gone for certain: its lease is not waited for.
    TakeOver,
    /// `ask_first`: a round before it asks whether it could be won (dissertation, section 9.6).
    Elect { ask_first: bool },
}

/// How an election without Raft ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stood {
    Won,
    Lost,
    /// None was held: the replica leads already.
    Leads,
    /// None was held: the replica's Raft is open, or has to be.
    LeftToRaft,
}

/// Campaigns for a replica at rest; votes are waited for up to `limit`.
pub async fn stand(
    peers: &Peers,
    replica: &Arc<Replica>,
    campaign: Campaign,
    limit: Duration,
) -> Stood {
    let network = peers.network(replica.group_id(), replica.replica_id());
    let rival = match campaign {
        Campaign::Outbid(rival) => rival,
        Campaign::TakeOver | Campaign::Elect { .. } => 0,
    };
    let engine = replica.engine();
    let not_stood = || match engine.leads_at_rest() {
        true => Stood::Leads,
        false => Stood::LeftToRaft,
    };
    // The disk may stand still, and something be written.
    if campaign == (Campaign::Elect { ask_first: true }) {
        let candidacy = match timeout(limit, engine.candidacy(rival)).await {
            Ok(Some(candidacy)) => candidacy,
            Ok(None) => return not_stood(),
            Err(_) => return Stood::Lost,
        };
        let asked = ask(&network, replica, &candidacy, Round::PreVote);
        if timeout(limit, asked).await != Ok(true) {
            return Stood::Lost;
        }
    }
    let candidacy = match timeout(limit, engine.stand(rival)).await {
        Ok(Some(candidacy)) => candidacy,
        Ok(None) => return not_stood(),
        Err(_) => return Stood::Lost,
    };
    let round = Round::Vote {
        by_force: campaign == Campaign::TakeOver,
    };
    let asked = ask(&network, replica, &candidacy, round);
    if timeout(limit, asked).await != Ok(true) {
        return Stood::Lost;
    }
    // Whoever stops waiting must not leave a leader behind whose first entry nobody sends.
    let (committed, is_committed) = oneshot::channel();
    let begin = begin_term(replica.clone(), network, candidacy, committed);
    peers.tasks().spawn(begin);
    match timeout(TERM_TIMEOUT, is_committed).await {
        Ok(Ok(())) => Stood::Won,
        Ok(Err(_)) | Err(_) => Stood::Lost,
    }
}

#[derive(Clone, Copy)]
enum Round {
    PreVote,
    Vote { by_force: bool },
}

/// Whether a majority says yes.
async fn ask(
    network: &GroupNetwork,
    replica: &Replica,
    candidacy: &Candidacy,
    round: Round,
) -> bool {
    let me = replica.replica_id();
    let others = candidacy.voters.iter().filter(|voter| **voter != me);
    let mut answers: FuturesUnordered<_> = others
        .map(|voter| {
            let mut client = network.client(*voter, false);
            async move {
                let option = RPCOption::new(UNLIMITED);
                match round {
                    Round::PreVote => client.pre_vote(candidacy.request(false), option).await,
                    Round::Vote { by_force } => {
                        client.vote(candidacy.request(by_force), option).await
                    }
                }
            }
        })
        .collect();
    let majority = candidacy.voters.len() / 2 + 1;
    let mut granted = 1;
    while granted < majority {
        match answers.next().await {
            Some(Ok(answer)) if answer.vote_granted => granted += 1,
            Some(Ok(answer)) => {
                // Or the next attempt would ask with a term that is too low once more.
                if answer.vote > replica.vote() {
                    replica.engine().outvoted(answer.vote).await;
                    if let Round::Vote { .. } = round {
                        return false;
                    }
                }
            }
            Some(Err(_)) => {}
            None => return false,
        }
    }
    true
}

/// Begins the term, and has the others take its first entry. Tells `committed` when a majority has it; never if
/// that does not come about.
async fn begin_term(
    replica: Arc<Replica>,
    network: GroupNetwork,
    candidacy: Candidacy,
    committed: oneshot::Sender<()>,
) {
    let engine = replica.engine();
    let Some(message) = engine.win(&candidacy).await else {
        return;
    };
    let Some(first) = message.entries.first().map(|entry| entry.log_id) else {
        return;
    };
    let mut committed = Some(committed);
    let me = replica.replica_id();
    let others = candidacy.voters.iter().filter(|voter| **voter != me);
    let mut answers: FuturesUnordered<_> = others
        .map(|voter| {
            let sent = send(&network, *voter, message.clone());
            async move { (*voter, timeout(FIRST_ENTRY_TIMEOUT, sent).await) }
        })
        .collect();
    let majority = candidacy.voters.len() / 2 + 1;
    let (mut have_it, mut is_committed, mut all_told) = (1, false, true);
    let mut have_first = Vec::new();
    loop {
        if have_it >= majority && !is_committed {
            is_committed = engine.commit_at_rest(first).await;
            if !is_committed {
                // Something else was asked of the replica meanwhile.
                break;
            }
            // Whoever campaigned need not wait for the slowest.
            if let Some(committed) = committed.take() {
                let _ = committed.send(());
            }
        }
        match answers.next().await {
            None => break,
            Some((voter, Ok(Told::Has(matched)))) if matched >= first => {
                engine.matched_at_rest(voter, matched, false);
                have_it += 1;
                have_first.push(voter);
            }
            Some((_, Ok(Told::Nothing) | Err(_))) => {}
            Some((_, Ok(Told::Has(_) | Told::Otherwise))) => all_told = false,
        }
    }
    if !is_committed || !all_told {
        // Raft goes on with those that did not answer as expected; or the replica leads no more.
        let _ = replica.wake().await;
        return;
    }
    let told = have_first.into_iter().map(|follower| {
        let speak = speak(&network, &replica, follower);
        timeout(FIRST_ENTRY_TIMEOUT, speak)
    });
    // Who does not hear of it now hears of it later (`resting`).
    futures::future::join_all(told).await;
}

/// What a follower said to a leader's message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Told {
    /// Its log is the same up to there.
    Has(LogId),
    /// It lacks entries, or knows a newer leader.
    Otherwise,
    /// No answer came.
    Nothing,
}

/// A leader at rest says that it leads, and that all entries are committed. None: it is no leader at rest.
pub(super) async fn speak(
    network: &GroupNetwork,
    replica: &Replica,
    to: ReplicaId,
) -> Option<Told> {
    let engine = replica.engine();
    let message = engine.speak_at_rest()?;
    let last = message.prev_log_id;
    Some(match send(network, to, message).await {
        Told::Has(matched) if Some(matched) == last => {
            engine.matched_at_rest(to, matched, true);
            Told::Has(matched)
        }
        Told::Nothing => Told::Nothing,
        Told::Has(_) | Told::Otherwise => Told::Otherwise,
    })
}

async fn send(network: &GroupNetwork, to: ReplicaId, message: AppendRequest) -> Told {
    let is_heartbeat = message.entries.is_empty();
    let mut client = network.client(to, is_heartbeat);
    let input = futures::stream::iter([message]);
    let option = RPCOption::new(UNLIMITED);
    let answer = match client.stream_append(input, option).await {
        Ok(mut answers) => answers.next().await,
        Err(_) => None,
    };
    match answer {
        Some(Ok(Ok(Some(matched)))) => Told::Has(matched),
        Some(Ok(Ok(None) | Err(_))) => Told::Otherwise,
        Some(Err(_)) | None => Told::Nothing,
    }
}
