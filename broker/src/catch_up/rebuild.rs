//! One rebuild: the damaged files of a log here, taken anew from a replica that is in sync.
//!
//! Invariant: only whole segments of committed entries change places, in the storage and without Raft;
//! so the replica keeps its log end, its vote and what it acknowledged, and may follow or lead
//! meanwhile. It leads on only where nobody else can take over: its readers get errors.

use std::sync::Arc;
use std::time::Instant;

use chronik_proto::v1;
use chronik_types::id::{BrokerId, RaftGroupId, ReplicaId};
use tracing::{debug, info};

use super::fetch::{Copy, FetchError, Shared, blocking};
use super::source::{Description, Source, SourceError};
use crate::leadership::{hand_over_to, is_caught_up};
use crate::peers::membership::Members;
use crate::replica::Replica;

/// A peer and what it has.
type Peer = (Source, Description);

/// Rebuilds what is known to be damaged of the group's log; false: nothing is. Nothing changes where
/// it fails.
pub async fn run(shared: Arc<Shared>, group: RaftGroupId) -> Result<bool, FetchError> {
    let replica = shared.replicas.get(group).ok_or(FetchError::NoReplica)?;
    let mut failure = FetchError::NoPeer;
    // The sealed part first: every replica in sync has certainly all of it. Where that does not fit
    // together with what the others have, all that is committed.
    for all in [false, true] {
        let log = replica.log().clone();
        let upto_index = blocking(move || log.rebuild_end(all)).await??;
        let Some(upto_index) = upto_index else {
            return Ok(false);
        };
        let (peers, refusal) = describe_all(&shared, &replica, upto_index).await;
        if let Some(error) = refusal {
            failure = error.into();
        } else if peers.is_empty() {
            // Nobody can help: no reason to seal what is being written.
            break;
        }
        hand_over_first(&replica, &peers).await;
        for (source, description) in peers {
            match from_peer(&shared, &replica, source, description).await {
                Ok(is_rebuilt) => return Ok(is_rebuilt),
                Err(error) => {
                    let told = &error as &dyn std::error::Error;
                    debug!(raft_group_id = %group, error = told, "a peer's files do not do");
                    failure = error;
                }
            }
        }
    }
    Err(failure)
}

/// What the leader and the other replicas in sync have; the leader first.
async fn describe_all(
    shared: &Shared,
    replica: &Replica,
    upto_index: u64,
) -> (Vec<Peer>, Option<SourceError>) {
    let own = replica.replica_id().broker_id;
    let leader = replica.leadership().borrow().leader;
    let mut brokers: Vec<BrokerId> = leader.into_iter().map(|leader| leader.broker_id).collect();
    for broker in replica.isr() {
        if !brokers.contains(&broker) {
            brokers.push(broker);
        }
    }
    brokers.retain(|broker| *broker != own);
    let image = shared.view.borrow().image.clone();
    let asked = brokers.into_iter().map(|broker| {
        let address = image.brokers.get(&broker).map(|b| b.rpc_address.clone());
        async move {
            let source = Source::new(broker, replica.group_id(), address.as_deref())?;
            let source = source.rebuilding(v1::RebuildFor {
                broker_id: own.0,
                upto_index,
            });
            let description = source.describe().await?;
            Ok((source, description))
        }
    });
    let mut peers = Vec::new();
    let mut refusal = None;
    for answer in futures::future::join_all(asked).await {
        match answer {
            Ok(peer) => peers.push(peer),
            Err(error) => refusal = Some(error),
        }
    }
    (peers, refusal)
}

/// A leader gives its place to a replica that can serve all of the log, if there is one; tries for a while.
async fn hand_over_first(replica: &Replica, peers: &[Peer]) {
    if !replica.leadership().borrow().is_leader {
        return;
    }
    let Some(members) = Members::of(replica) else {
        return;
    };
    let voters = members.all_voters();
    let sound = peers.iter().filter(|(_, found)| !found.is_damaged);
    let successors: Vec<ReplicaId> = sound
        .filter_map(|(source, _)| voters.iter().find(|id| id.broker_id == source.broker))
        .filter(|id| is_caught_up(replica, **id))
        .copied()
        .collect();
    if successors.is_empty() {
        return;
    }
    info!(
        raft_group_id = %replica.group_id(),
        "hands a partition over since its log here is damaged"
    );
    hand_over_to(replica, &successors).await;
}

async fn from_peer(
    shared: &Arc<Shared>,
    replica: &Replica,
    source: Source,
    description: Description,
) -> Result<bool, FetchError> {
    let began = Instant::now();
    let log = replica.log().clone();
    let begun = blocking(move || log.rebuild(description.manifest)).await??;
    let Some((installer, rebuild)) = begun else {
        return Ok(false);
    };
    let (group, from) = (replica.group_id(), source.broker);
    let (segments, bytes) = {
        let manifest = installer.manifest();
        (manifest.segments.len(), manifest.total_bytes())
    };
    info!(
        raft_group_id = %group,
        from = from.0,
        segments,
        bytes,
        "fetches damaged segments of a log anew"
    );
    let copy = Copy::of_files(shared.clone(), installer, source);
    copy.fetch_all().await?;
    let installer = copy.into_installer()?;
    blocking(move || rebuild.commit(installer)).await??;
    info!(
        raft_group_id = %group,
        from = from.0,
        segments,
        bytes,
        seconds = began.elapsed().as_secs_f64(),
        "damaged segments of a log are rebuilt"
    );
    Ok(true)
}
