//! Who campaigns for a partition, and when: what `leadership` decides, put into timers and a queue.
//!
//! Invariant: each group is looked at as it is at that moment, before its campaign is queued and again
//! before it starts.

use std::cmp::Reverse;
use std::time::Duration;

use chronik_types::epoch::LeaderEpoch;
use chronik_types::id::{RaftGroupId, ReplicaId};
use rand::Rng;
use tokio::time::{Instant, timeout};
use tokio_util::sync::CancellationToken;
use tracing::{debug, info};

use super::voters::electorate;
use super::{Driver, Group, TaskEvent, has_leader};
use crate::leadership::{GroupView, LeaderStatus, World};
use crate::leadership::{campaign_delay, leader_status, reaches_majority};
use crate::peers::campaign::{elect, held_vote, outbid, take_over};
use crate::peers::stand::{Campaign, Stood, stand};
use crate::peers::{LinkTable, Nudge};

/// How long one campaign is waited for before the next attempt is considered.
const CAMPAIGN_TIMEOUT: Duration = Duration::from_millis(150);
const CAMPAIGN_TIMEOUT_MAX: Duration = Duration::from_secs(1);
/// Same, for a new group: the others may not have opened their replicas yet.
const NEW_TIMEOUT: Duration = Duration::from_millis(40);
/// How long a rival that may win without this replica's vote is left alone.
const RIVAL_WINS: Duration = Duration::from_millis(50);
/// The second candidate of each partition waits longer the more partitions have no leader, since the
/// first one has as many campaigns to run. One that cannot win says so, and is not waited for.
const STAGGER_PER_GROUP: Duration = Duration::from_millis(3);
const STAGGER_EXTRA_MAX: Duration = Duration::from_secs(20);
/// A campaign is waited for longer the more of them run.
const TIMEOUT_PER_CAMPAIGN: Duration = Duration::from_millis(10);
/// A partition that was used so recently counts as in use.
const IN_USE: Duration = Duration::from_secs(10);

impl Driver {
    pub(super) fn links_changed(&mut self, table: LinkTable) {
        let before = std::mem::replace(&mut self.links, table);
        let mut came_up = Vec::new();
        for (broker, status) in &self.links.0 {
            let was = before.status(*broker);
            if was == *status {
                continue;
            }
            info!(peer = broker.0, state = ?status.state, "the link to a peer changed");
            let answers = status.is_answered() && !was.is_answered();
            let is_open = status.is_up() && !was.is_up();
            if answers || is_open || (status.is_up() && was.incarnation != status.incarnation) {
                came_up.push(*broker);
            }
        }
        for broker in came_up {
            self.greet(broker);
        }
        // The first of them to be looked at shall wait for their turn as the last.
        self.leaderless_soon = self.about_to_lose_leader();
        self.evaluate_all();
        self.leaderless_soon = 0;
        self.check_unsettled();
    }

    /// Topic by topic: what then changes in them is told together, and each image differs from the one
    /// before in few topics.
    pub(super) fn evaluate_all(&mut self) {
        let mut groups: Vec<RaftGroupId> = self.groups.keys().copied().collect();
        groups.sort_unstable();
        for group in groups {
            self.evaluate(group);
        }
    }

    /// Second candidates wait for the campaigns of others: less when half of those are over.
    pub(super) fn wait_less(&mut self) {
        self.staggered_for = self.staggered_for.max(self.leaderless);
        if self.leaderless > self.staggered_for / 2 {
            return;
        }
        self.staggered_for = self.leaderless;
        if self.leaderless == 0 {
            return;
        }
        let waiting = self.groups.iter();
        let waiting = waiting.filter(|(_, group)| !has_leader(group.status));
        let mut waiting: Vec<RaftGroupId> = waiting.map(|(id, _)| *id).collect();
        waiting.sort_unstable();
        for group in waiting {
            self.evaluate(group);
        }
    }

    /// How many groups lose their leader with the links as they are now.
    pub(super) fn about_to_lose_leader(&self) -> u32 {
        let loses = |group: &&Group| {
            let leader = group.leadership.leader;
            let is_gone = leader.is_some_and(|l| !self.links.status(l.broker_id).is_up());
            group.status == LeaderStatus::Live && is_gone
        };
        let count = self.groups.values().filter(loses).count();
        u32::try_from(count).unwrap_or(u32::MAX)
    }

    /// Another replica with a shorter log tries to take over and cannot win: go ahead of it. Otherwise
    /// the two could take the same terms, one after the other, for very long.
    pub(super) fn nudged(&mut self, nudge: Nudge) {
        let Some(group) = self.groups.get_mut(&nudge.group) else {
            return;
        };
        if let Some(campaign) = &group.running {
            if held_vote(&group.replica).term > nudge.term {
                // The candidate is about to hear of it.
                return;
            }
            campaign.cancel();
        }
        group.rival_term = group.rival_term.max(Some(nudge.term));
        self.go_ahead(nudge.group);
    }

    /// Starts the campaign that a rival makes necessary, if none runs and it still is.
    pub(super) fn go_ahead(&mut self, id: RaftGroupId) {
        let waits = |group: &Group| group.rival_term.is_some() && group.running.is_none();
        if !self.groups.get(&id).is_some_and(waits) {
            return;
        }
        self.evaluate(id);
        let draining = *self.options.draining.borrow();
        let Some(group) = self.groups.get_mut(&id) else {
            return;
        };
        // Whom this broker reaches: all of them together may be a majority with the rival among them.
        let me = group.replica.replica_id();
        let voters = voters(group);
        let is_reached = |voter: &&ReplicaId| self.links.status(voter.broker_id).is_answered();
        let others = voters
            .iter()
            .filter(|voter| **voter != me)
            .filter(is_reached);
        let (others, half) = (others.count(), voters.len() / 2);
        if draining || !voters.contains(&me) || others < half {
            group.rival_term = None;
            return;
        }
        if has_leader(group.status) {
            return;
        }
        group.leader_gone = true;
        if others > half {
            let at = Instant::now() + RIVAL_WINS;
            group.due = Some(at);
            self.due.push(Reverse((at, id)));
            return;
        }
        group.campaigning = true;
        match self.campaigns.is_full() {
            true => self.campaigns.push(id, true),
            false => self.campaign(id),
        }
    }

    /// A client asks for a partition that has no leader here: it does not wait behind others.
    pub(super) fn missed(&mut self, id: RaftGroupId) {
        let Some(group) = self.groups.get_mut(&id) else {
            return;
        };
        if has_leader(group.status) || std::mem::replace(&mut group.missed, true) {
            return;
        }
        if group.campaigning {
            self.campaigns.push(id, true);
            self.start_campaigns();
        } else {
            group.due = None;
            self.evaluate(id);
        }
    }

    /// Looks at one group as it is now, and sets when it is to campaign.
    pub(super) fn evaluate(&mut self, id: RaftGroupId) {
        let Some(group) = self.groups.get_mut(&id) else {
            return;
        };
        let vote = held_vote(&group.replica);
        let voters = voters(group);
        let view = GroupView {
            me: group.replica.replica_id(),
            replicas: &voters,
            leader: group.leadership.leader,
            is_leader: group.leadership.is_leader,
            term: vote.term,
            voted_for: vote.voted_for,
            attempts: group.attempts,
            is_damaged: group.replica.log().is_damaged(),
        };
        let heard = self.options.peers.heard().leader(id);
        let world = World {
            links: &self.links,
            fenced: &self.fenced,
            heard,
        };
        let status = leader_status(&view, &world);
        let mut timing = self.options.timing;
        if !group.missed {
            let extra = STAGGER_PER_GROUP
                .saturating_mul(self.leaderless.max(self.leaderless_soon))
                .min(STAGGER_EXTRA_MAX);
            timing.extra = extra;
        }
        let delay = campaign_delay(&view, &world, status, &timing);
        let before = std::mem::replace(&mut group.status, status);
        let changed = status != before;
        match (has_leader(before), has_leader(status)) {
            (true, false) => self.leaderless = self.leaderless.saturating_add(1),
            (false, true) => self.leaderless = self.leaderless.saturating_sub(1),
            _ => {}
        }
        if has_leader(status) {
            group.attempts = 0;
            group.leader_gone = false;
            group.missed = false;
            let epoch = u64::try_from(group.leadership.leader_epoch.0).ok();
            group.rival_term = group.rival_term.filter(|term| Some(*term) > epoch);
        }
        let cut_off = status == LeaderStatus::Me && !reaches_majority(&view, &self.links);
        match group.step_down_at {
            None if cut_off => {
                let at = Instant::now() + self.options.step_down_after;
                group.step_down_at = Some(at);
                self.due.push(Reverse((at, id)));
            }
            Some(_) if !cut_off => group.step_down_at = None,
            _ => {}
        }
        group.leader_gone |= status.is_certainly_gone();
        let Some(delay) = delay.filter(|_| !group.campaigning && !*self.options.draining.borrow())
        else {
            group.due = None;
            return;
        };
        let yields = group
            .yields_until
            .map(|until| until.saturating_duration_since(Instant::now()));
        let delay = delay.max(yields.unwrap_or_default());
        // Jitter only where it matters: two replicas that failed against each other.
        let jitter = match group.attempts {
            0 => Duration::ZERO,
            _ => delay.mul_f64(rand::rng().random_range(0.0..0.5)),
        };
        let at = Instant::now() + delay + jitter;
        if !changed && group.due.is_some_and(|due| due <= at) {
            return;
        }
        group.due = Some(at);
        self.due.push(Reverse((at, id)));
    }

    pub(super) fn timers(&mut self, now: Instant) {
        while let Some(Reverse((at, id))) = self.due.peek().copied()
            && at <= now
        {
            self.due.pop();
            let Some(group) = self.groups.get(&id) else {
                continue;
            };
            if group.step_down_at == Some(at) {
                self.step_down(id);
            } else if group.due == Some(at) {
                // It may have become unnecessary without an event, as when a leader spoke.
                let before = group.status;
                self.evaluate(id);
                if let Some(group) = self.groups.get_mut(&id)
                    && group.due == Some(at)
                    && group.status == before
                {
                    group.due = None;
                    group.campaigning = true;
                    let in_use = group.missed || group.replica.engine().idle_for() < IN_USE;
                    self.campaigns.push(id, in_use);
                }
            }
        }
        self.start_campaigns();
        if self.next_hand_back.is_some_and(|at| at <= now) {
            self.next_hand_back = None;
            self.hand_back(now);
        }
        self.summary.tell(now);
    }

    /// Starts as many campaigns as may run, each only if it is still needed.
    pub(super) fn start_campaigns(&mut self) {
        while let Some(id) = self.campaigns.pop() {
            // It may have been asked for twice, and run already.
            let waits = |group: &Group| group.campaigning && group.running.is_none();
            if !self.groups.get(&id).is_some_and(waits) {
                continue;
            }
            self.evaluate(id);
            let draining = *self.options.draining.borrow();
            let Some(group) = self.groups.get_mut(&id) else {
                continue;
            };
            if has_leader(group.status) || draining {
                group.campaigning = false;
                continue;
            }
            self.campaign(id);
        }
    }

    /// How long a campaign of the group is waited for.
    fn campaign_limit(&self, group: &Group) -> Duration {
        let limit = match held_vote(&group.replica).term {
            0 => NEW_TIMEOUT,
            _ => CAMPAIGN_TIMEOUT,
        };
        let limit = limit + TIMEOUT_PER_CAMPAIGN.saturating_mul(self.campaigns.running());
        // One that was too short, on a busy machine, is not too short for ever: the next attempt
        // takes a new term, and would undo what this one is about to win.
        limit
            .saturating_mul(1 << group.attempts.min(3))
            .min(CAMPAIGN_TIMEOUT_MAX)
    }

    /// Of a group that is marked as campaigning.
    fn campaign(&mut self, id: RaftGroupId) {
        let now = Instant::now();
        let Some(limit) = self.groups.get(&id).map(|group| self.campaign_limit(group)) else {
            return;
        };
        let Some(group) = self.groups.get_mut(&id) else {
            return;
        };
        let cannot_win = CancellationToken::new();
        group.running = Some(cannot_win.clone());
        group.due = None;
        self.campaigns.started();
        let (replica, by_force) = (group.replica.clone(), group.leader_gone);
        let rival_term = group.rival_term.take();
        debug!(raft_group_id = id.0, status = ?group.status, by_force, ?rival_term, "campaigns for a partition");
        self.options.metrics.campaigns.inc();
        let events = self.events.clone();
        let (metrics, peers) = (self.options.metrics.clone(), self.options.peers.clone());
        let campaign = async move {
            let how = match rival_term {
                Some(rival) => Campaign::Outbid(rival),
                None if by_force => Campaign::TakeOver,
                // One that never voted can disturb nobody: there is no need to ask first.
                None => Campaign::Elect {
                    ask_first: held_vote(&replica).term > 0,
                },
            };
            match stand(&peers, &replica, how, limit).await {
                Stood::Won => {
                    let took = now.elapsed().as_secs_f64();
                    metrics.election_seconds.observe(took);
                    return;
                }
                Stood::Lost | Stood::Leads => return,
                Stood::LeftToRaft => {}
            }
            let mut leadership = replica.leadership();
            let known = *leadership.borrow_and_update();
            let mut own_epoch = known.leader_epoch;
            match how {
                Campaign::Outbid(rival) => {
                    let taken = outbid(&replica, rival).await;
                    own_epoch = own_epoch.max(LeaderEpoch::try_from(taken).unwrap_or(own_epoch));
                }
                Campaign::TakeOver => take_over(&replica, limit.min(CAMPAIGN_TIMEOUT)).await,
                Campaign::Elect { ask_first } => elect(&replica, ask_first).await,
            }
            let decided = leadership.wait_for(|current| {
                // After its own, any other term is one that a rival has taken: try again with the next.
                let is_lost = own_epoch > known.leader_epoch && current.leader_epoch > own_epoch;
                own_epoch = own_epoch.max(current.leader_epoch);
                is_lost || (current.leader.is_some() && current.leader_epoch > known.leader_epoch)
            });
            if let Ok(Ok(current)) = timeout(limit, decided).await
                && current.is_leader
            {
                metrics
                    .election_seconds
                    .observe(now.elapsed().as_secs_f64());
            }
        };
        self.tasks.spawn(async move {
            cannot_win.run_until_cancelled(campaign).await;
            events.send(TaskEvent::Campaigned(id)).ok();
        });
    }

    /// A leader that no majority hears refuses what it cannot commit, and lets the others be.
    pub(super) fn step_down(&mut self, id: RaftGroupId) {
        let Some(group) = self.groups.get_mut(&id) else {
            return;
        };
        group.step_down_at = None;
        self.evaluate(id);
        let Some(group) = self.groups.get_mut(&id) else {
            return;
        };
        if group.step_down_at.take().is_none() {
            return;
        }
        self.summary.stepped_down();
        let replica = group.replica.clone();
        self.tasks.spawn(async move { replica.step_down().await });
    }
}

/// Who votes. Where nothing is moved, all of the assignment do.
fn voters(group: &Group) -> Vec<ReplicaId> {
    match group.moving {
        Some(_) => electorate(group),
        None => group.replicas.clone(),
    }
}
