//! How a controller comes into the Raft group: asks its peers, does what `founding` decides, and as a
//! new disk of a known controller asks the leader until it votes.
//!
//! Invariant: what was decided is on disk before the controller takes part, and is never decided again.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use anyhow::{anyhow, bail};
use tokio::sync::watch;
use tracing::{error, info, warn};

use crate::config::Config;
use crate::db::{Contents, Db};
use crate::founding::{Decision, INCARNATION_END, Identity, NodeId, Obstacle, Standing, decide};
use crate::image_feed::ImageFeed;
use crate::peers::Peers;
use crate::raft::{self, Admission, RaftNode, Unstarted};
use crate::state::PendingRestore;

/// Between two rounds of questions, growing. A peer that comes up asks by itself, so this is only for
/// what goes wrong.
const ASK_RETRY_MIN: Duration = Duration::from_millis(20);
const ASK_RETRY_MAX: Duration = Duration::from_secs(1);
/// Between two requests to be let in.
const JOIN_RETRY: Duration = Duration::from_millis(100);
/// What a controller waits for is logged after so long, and again as often as this.
const PATIENCE: Duration = Duration::from_secs(3);
const REMINDER_INTERVAL: Duration = Duration::from_secs(60);

/// Why a new member is not ready.
const NO_VOTER: &str = "this controller's disk is new, and it does not vote yet";

/// A controller on its way into the group.
pub struct Joining {
    config: Config,
    db: Db,
    node: RaftNode,
    peers: Peers,
    /// None: it takes part.
    unstarted: Option<Unstarted>,
    obstacle: watch::Sender<Option<String>>,
}

impl Joining {
    /// Recovers from the database. A controller that is alone, or has taken part before, does so at
    /// once.
    pub async fn prepare(
        config: &Config,
        peers: Peers,
        db: Db,
        contents: Contents,
    ) -> anyhow::Result<(Self, ImageFeed)> {
        let identity = contents.identity.clone();
        let has_raft_data = contents.has_raft_data();
        let pending = contents
            .state
            .as_ref()
            .and_then(|state| state.pending_restore.as_ref());
        let base = pending.map(PendingRestore::base).unwrap_or_default();
        let is_restored = !base.is_empty();
        let (unstarted, feed) =
            RaftNode::prepare(config, peers.clone(), db.clone(), contents, base)?;
        let mut joining = Self {
            config: config.clone(),
            db,
            node: unstarted.node().clone(),
            peers,
            unstarted: Some(unstarted),
            obstacle: watch::Sender::new(None),
        };
        match identity.node_id {
            Some(node_id) if node_id.controller_id() != config.controller_id => {
                let own_id = config.controller_id;
                bail!(
                    "the data folder belongs to controller {}, controller-id is {own_id}",
                    node_id.controller_id()
                );
            }
            Some(_) => joining.take_part(identity).await?,
            // From before controllers knew their disks: it has taken part as a founder.
            None if has_raft_data && !is_restored => {
                let node_id = Some(NodeId::founder(config.controller_id));
                joining
                    .decided(Identity {
                        node_id,
                        ..identity
                    })
                    .await?;
            }
            None if config.group().len() == 1 => {
                let own = joining.node.standing();
                let decision = decide(config.controller_id, &own, &BTreeMap::new());
                joining.act_on(decision).await?;
            }
            None => {}
        }
        Ok((joining, feed))
    }

    pub fn node(&self) -> &RaftNode {
        &self.node
    }

    /// Why the controller is not ready, where that is because it is on its way.
    pub fn obstacle(&self) -> watch::Receiver<Option<String>> {
        self.obstacle.subscribe()
    }

    /// Returns when there is nothing left to do.
    pub async fn run(mut self) -> anyhow::Result<()> {
        let is_new = self.unstarted.is_some();
        if is_new {
            let decision = self.ask_until_decided().await;
            self.act_on(decision).await?;
        }
        self.obstacle.send_replace(None);
        let identity = self.node.standing().identity;
        let node_id = identity
            .node_id
            .ok_or_else(|| anyhow!("nothing was decided"))?;
        if node_id.incarnation() == 0 {
            if is_new {
                self.node.campaign_first(&self.config).await;
            }
        } else {
            self.ask_to_be_let_in(node_id).await;
        }
        Ok(())
    }

    async fn ask_until_decided(&self) -> Decision {
        let began = Instant::now();
        let mut told: Option<(Instant, Obstacle)> = None;
        let mut retry = ASK_RETRY_MIN;
        let mut missing: BTreeSet<u64> = self.peer_ids().collect();
        loop {
            self.node.expect(missing);
            let answers = self.ask_all().await;
            missing = self
                .peer_ids()
                .filter(|id| !answers.contains_key(id))
                .collect();
            let own = self.node.standing();
            let obstacle = match decide(self.config.controller_id, &own, &answers) {
                Decision::Wait(obstacle) => obstacle,
                decided => return decided,
            };
            let why = format!("the controllers' group is not founded yet: {obstacle}");
            self.obstacle.send_replace(Some(why));
            let is_news = told
                .as_ref()
                .is_none_or(|(at, known)| *known != obstacle || at.elapsed() >= REMINDER_INTERVAL);
            if is_news && began.elapsed() >= PATIENCE {
                tell(&obstacle);
                told = Some((Instant::now(), obstacle));
            }
            tokio::select! {
                () = self.node.awaited_came() => {}
                () = tokio::time::sleep(retry) => retry = (retry * 2).min(ASK_RETRY_MAX),
            }
        }
    }

    async fn ask_all(&self) -> BTreeMap<u64, Standing> {
        let own_id = self.config.controller_id;
        let asked = self.peer_ids().map(async |peer| {
            let channel = self.peers.channel(peer)?;
            match raft::describe(channel, own_id, peer).await {
                Ok(answer) => Some((peer, answer.standing)),
                Err(status) => {
                    tracing::debug!(
                        peer,
                        error = status.message(),
                        "a controller does not answer"
                    );
                    None
                }
            }
        });
        let answers = futures::future::join_all(asked).await;
        answers.into_iter().flatten().collect()
    }

    async fn act_on(&mut self, decision: Decision) -> anyhow::Result<()> {
        let own_id = self.config.controller_id;
        let (incarnation, founders) = match decision {
            Decision::Found(founders) => (0, founders),
            Decision::Replace(founders) => {
                warn!(
                    "this controller's data folder was empty and its group exists: it takes the \
                     place of the one that was there before, as a new member"
                );
                (rand::random_range(1..INCARNATION_END), founders)
            }
            Decision::Wait(obstacle) => bail!("{obstacle}"),
        };
        let node_id = NodeId::new(own_id, incarnation)
            .ok_or_else(|| anyhow!("controller-id {own_id} is out of range"))?;
        let disk_id = self.node.standing().identity.disk_id;
        self.decided(Identity {
            disk_id,
            node_id: Some(node_id),
            founders,
        })
        .await
    }

    /// Makes it last, then takes part.
    async fn decided(&mut self, identity: Identity) -> anyhow::Result<()> {
        self.db.save_identity(identity.clone()).await?;
        self.take_part(identity).await
    }

    async fn take_part(&mut self, identity: Identity) -> anyhow::Result<()> {
        let Some(unstarted) = self.unstarted.take() else {
            return Ok(());
        };
        let is_founder = identity.node_id.is_some_and(|id| id.incarnation() == 0);
        unstarted.start(identity).await?;
        if is_founder {
            self.node.found_group(&self.config).await?;
        }
        Ok(())
    }

    /// Asks whoever leads until this node votes in place of the one before.
    async fn ask_to_be_let_in(&self, node_id: NodeId) {
        if self.node.is_settled() {
            return;
        }
        let began = Instant::now();
        let mut told: Option<Instant> = None;
        self.obstacle.send_replace(Some(NO_VOTER.to_owned()));
        while !self.node.is_settled() {
            let mut refusal = None;
            for peer in self.peer_ids() {
                let Some(channel) = self.peers.channel(peer) else {
                    continue;
                };
                match raft::join(channel, peer, node_id).await {
                    Ok(Admission::Done | Admission::UnderWay) => break,
                    Ok(Admission::Refused(why)) => refusal = Some(why),
                    Ok(Admission::NotLeader) | Err(_) => {}
                }
            }
            let is_due = told.is_none_or(|at| at.elapsed() >= REMINDER_INTERVAL);
            if is_due && began.elapsed() >= PATIENCE {
                told = Some(Instant::now());
                warn!(
                    node = %node_id,
                    refusal,
                    "not a voter yet: that takes a majority of the controllers with their disks"
                );
            }
            tokio::time::sleep(JOIN_RETRY).await;
        }
        self.obstacle.send_replace(None);
        info!(node = %node_id, "votes among the controllers");
    }

    fn peer_ids(&self) -> impl Iterator<Item = u64> + use<> {
        let own_id = self.config.controller_id;
        let group = self.config.group().into_iter();
        group.map(|peer| peer.id).filter(move |id| *id != own_id)
    }
}

fn tell(obstacle: &Obstacle) {
    match obstacle {
        Obstacle::Missing(missing) => warn!(
            ?missing,
            "waits for controllers: a group is founded when all of `controllers` are there once"
        ),
        Obstacle::Conflict(why) => error!(why, "the controllers' group cannot be founded"),
    }
}
