//! Who should campaign for a partition, and when. Raft's own ticks are off: a resting group costs
//! nothing, and whether its leader lives is known per broker, not per group.
//!
//! Invariant: every decision here is safe to be wrong. Raft still counts votes and compares logs; a
//! wrong guess costs a moment without a leader, never a record. Decisions are pure functions; the
//! driver carries them out.

mod campaigns;
mod driver;
mod hand_over;
mod progress;
mod reporter;

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use chronik_types::cluster_image::{ClusterImage, Partition};
use chronik_types::epoch::{LeaderEpoch, PartitionEpoch};
use chronik_types::id::{BrokerId, PartitionIndex, RaftGroupId, ReplicaId, TopicId};

pub use driver::{DriverOptions, run as run_driver};
pub use hand_over::{Successors, hand_over_all, hand_over_to, is_caught_up};
pub use progress::{FollowerState, Followers};
pub use reporter::{ReporterOptions, run as run_reporter};

use crate::peers::{HeardLeader, LinkState, LinkTable};
use crate::replica::Replica;

/// A group's replicas as assigned, preferred leader first.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Assigned {
    pub group: RaftGroupId,
    pub place: Place,
    pub replicas: Vec<ReplicaId>,
    /// Those of them that shall vote in the end.
    pub voters: Vec<ReplicaId>,
    pub moving: Option<Moving>,
}

/// The image of a partition whose replicas are being moved.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Moving {
    pub partition_epoch: PartitionEpoch,
    pub leader: Option<BrokerId>,
    pub leader_epoch: LeaderEpoch,
}

/// Which partition a group is, in the cluster image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Place {
    pub topic_id: TopicId,
    pub partition: PartitionIndex,
}

impl Place {
    /// The partition there, if the image has it and it is still that group.
    pub fn find(self, image: &ClusterImage, group: RaftGroupId) -> Option<&Partition> {
        let partition = image.topic(self.topic_id)?.partition(self.partition)?;
        (partition.raft_group_id == group).then_some(partition)
    }
}

/// What `reconcile` tells the driver.
pub enum GroupEvent {
    Opened(Assigned, Arc<Replica>),
    Assigned(Assigned),
    Closed(RaftGroupId),
}

/// Delays of campaigns.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CampaignTiming {
    /// Each next candidate waits so much longer.
    pub stagger: Duration,
    /// Added to the stagger, since candidates of the same rank have other campaigns to run.
    pub extra: Duration,
    /// The leader of record is connected but has not spoken since this process started.
    pub unconfirmed: Duration,
    /// The leader's link is silent or broken for a reason that does not prove its death.
    pub lost: Duration,
    /// The controllers fenced the leader's broker, which may be handing over by itself.
    pub fenced: Duration,
    /// Before the second attempt; doubles up to `retry_max`.
    pub retry_min: Duration,
    pub retry_max: Duration,
    /// Same, for a group that never had a leader.
    pub retry_new_max: Duration,
}

impl CampaignTiming {
    pub fn new(stagger: Duration) -> Self {
        Self {
            stagger,
            extra: Duration::ZERO,
            unconfirmed: Duration::from_millis(400),
            lost: Duration::from_millis(300),
            fenced: Duration::from_millis(1_000),
            retry_min: Duration::from_millis(40),
            retry_max: Duration::from_secs(2),
            retry_new_max: Duration::from_millis(100),
        }
    }
}

/// One replica's view of its group.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GroupView<'a> {
    pub me: ReplicaId,
    /// Those that vote, preferred leader first.
    pub replicas: &'a [ReplicaId],
    pub leader: Option<ReplicaId>,
    pub is_leader: bool,
    pub term: u64,
    /// Whom this replica voted for last.
    pub voted_for: ReplicaId,
    /// It has campaigned since it last knew a living leader.
    pub attempts: u32,
    /// Its log cannot be read everywhere: any other replica is a better leader.
    pub is_damaged: bool,
}

/// What this broker knows of the others.
#[derive(Debug, Clone, Copy)]
pub struct World<'a> {
    pub links: &'a LinkTable,
    /// Brokers that the controllers fenced; empty while no controller is connected.
    pub fenced: &'a BTreeSet<BrokerId>,
    /// The group's leader that last spoke to this process.
    pub heard: Option<HeardLeader>,
}

/// What is known of a group's leader.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LeaderStatus {
    /// This replica leads.
    Me,
    /// It is connected and has spoken to this process.
    Live,
    /// Nobody is known to lead.
    None,
    /// It is of record and connected, but has not spoken yet.
    Unconfirmed,
    /// Its process was restarted since it spoke: a restarted replica never leads on.
    Restarted,
    /// Its process is dead.
    Dead,
    /// It cannot be heard, for reasons unknown.
    Lost,
    /// The controllers fenced its broker, though it is connected here.
    Fenced,
}

impl LeaderStatus {
    /// Whether the leader certainly does not lead any more, or shall not.
    fn is_certainly_gone(self) -> bool {
        matches!(self, Self::Restarted | Self::Dead | Self::Fenced)
    }
}

pub fn leader_status(view: &GroupView<'_>, world: &World<'_>) -> LeaderStatus {
    if view.is_leader {
        return LeaderStatus::Me;
    }
    let Some(leader) = view.leader.filter(|leader| *leader != view.me) else {
        return LeaderStatus::None;
    };
    let link = world.links.status(leader.broker_id);
    let fenced = world.fenced.contains(&leader.broker_id);
    let Some(process) = link.speaks_as() else {
        return match link.state {
            LinkState::Refused => LeaderStatus::Dead,
            LinkState::Connecting | LinkState::Silent | LinkState::Unreachable if fenced => {
                LeaderStatus::Dead
            }
            // A leader that does not reach us cannot lead us, though it lives.
            LinkState::Connecting
            | LinkState::Silent
            | LinkState::Unreachable
            | LinkState::OneWay
            | LinkState::Up => LeaderStatus::Lost,
        };
    };
    match world.heard {
        Some(heard) if heard.broker == leader.broker_id && heard.term == view.term => {
            if process != heard.incarnation {
                LeaderStatus::Restarted
            } else if fenced {
                LeaderStatus::Fenced
            } else {
                LeaderStatus::Live
            }
        }
        _ if fenced => LeaderStatus::Fenced,
        _ => LeaderStatus::Unconfirmed,
    }
}

/// Whether this broker reaches enough voters to win an election at all.
pub fn reaches_majority(view: &GroupView<'_>, links: &LinkTable) -> bool {
    let reached = view
        .replicas
        .iter()
        .filter(|replica| **replica == view.me || links.status(replica.broker_id).is_answered())
        .count();
    reached > view.replicas.len() / 2
}

/// This replica's place among those that can campaign now; 0 goes first. None: it is not one.
pub fn rank(view: &GroupView<'_>, world: &World<'_>, status: LeaderStatus) -> Option<u32> {
    let gone = view.leader.filter(|_| status.is_certainly_gone());
    // One that is being connected keeps its place: at a start, links come up one after the other.
    let may_campaign = |broker: BrokerId| {
        matches!(
            world.links.status(broker).state,
            LinkState::Up | LinkState::Connecting
        ) && !world.fenced.contains(&broker)
    };
    let candidates = view.replicas.iter().filter(|replica| {
        **replica == view.me || (Some(**replica) != gone && may_campaign(replica.broker_id))
    });
    let place = candidates
        .into_iter()
        .position(|replica| *replica == view.me)?;
    u32::try_from(place).ok()
}

/// How long to wait before this replica campaigns. None: it should not.
pub fn campaign_delay(
    view: &GroupView<'_>,
    world: &World<'_>,
    status: LeaderStatus,
    timing: &CampaignTiming,
) -> Option<Duration> {
    if !view.replicas.contains(&view.me) {
        // It learns, or was dropped: it has no vote.
        return None;
    }
    let base = match status {
        LeaderStatus::Me | LeaderStatus::Live => return None,
        LeaderStatus::None | LeaderStatus::Dead | LeaderStatus::Restarted => Duration::ZERO,
        LeaderStatus::Unconfirmed => timing.unconfirmed,
        LeaderStatus::Lost => timing.lost,
        LeaderStatus::Fenced => timing.fenced,
    };
    if !reaches_majority(view, world.links) {
        return None;
    }
    let rank = rank(view, world, status)?;
    let last = u32::try_from(view.replicas.len()).unwrap_or(u32::MAX);
    let rank = if view.is_damaged { last } else { rank };
    if view.attempts > 0 {
        let doubled = timing
            .retry_min
            .saturating_mul(1 << (view.attempts - 1).min(16));
        return Some(
            doubled
                .min(timing.retry_max)
                .saturating_add(timing.stagger / 4 * rank)
                .saturating_add(timing.extra * rank),
        );
    }
    // It led before its process was restarted: the others still believe in it, and wait.
    let led_last = status == LeaderStatus::None && view.term > 0 && view.voted_for == view.me;
    let rank = if led_last && !view.is_damaged {
        0
    } else {
        rank
    };
    let stagger = timing.stagger.saturating_add(timing.extra);
    Some(base.saturating_add(stagger * rank))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use uuid::Uuid;

    use super::*;
    use crate::peers::LinkStatus;

    const MS: Duration = Duration::from_millis(1);

    fn replica(broker: i32) -> ReplicaId {
        ReplicaId {
            broker_id: BrokerId(broker),
            incarnation: 1,
        }
    }

    fn incarnation(number: u128) -> Uuid {
        Uuid::from_u128(number)
    }

    fn links(states: &[(i32, LinkState)]) -> LinkTable {
        let status = |state| LinkStatus {
            state,
            incarnation: Some(incarnation(1)),
            inbound: None,
        };
        let links = states
            .iter()
            .map(|(broker, state)| (BrokerId(*broker), status(*state)));
        LinkTable(links.collect::<BTreeMap<_, _>>())
    }

    fn heard(broker: i32, process: u128) -> Option<HeardLeader> {
        let incarnation = incarnation(process);
        Some(HeardLeader {
            term: 5,
            broker: BrokerId(broker),
            incarnation,
        })
    }

    struct Case {
        me: i32,
        leader: Option<i32>,
        links: LinkTable,
        heard: Option<HeardLeader>,
        fenced: BTreeSet<BrokerId>,
        attempts: u32,
        is_damaged: bool,
    }

    impl Case {
        fn new(me: i32, leader: Option<i32>, states: &[(i32, LinkState)]) -> Self {
            let heard = leader.and_then(|leader| heard(leader, 1));
            let (links, fenced) = (links(states), BTreeSet::new());
            Self {
                me,
                leader,
                links,
                heard,
                fenced,
                attempts: 0,
                is_damaged: false,
            }
        }

        fn decide(&self) -> (LeaderStatus, Option<Duration>) {
            let replicas = [replica(1), replica(2), replica(3)];
            let view = GroupView {
                me: replica(self.me),
                replicas: &replicas,
                leader: self.leader.map(replica),
                is_leader: self.leader == Some(self.me),
                term: 5,
                voted_for: replica(self.leader.unwrap_or(9)),
                attempts: self.attempts,
                is_damaged: self.is_damaged,
            };
            let world = World {
                links: &self.links,
                fenced: &self.fenced,
                heard: self.heard,
            };
            let status = leader_status(&view, &world);
            let timing = CampaignTiming::new(150 * MS);
            (status, campaign_delay(&view, &world, status, &timing))
        }
    }

    use LinkState::{Refused, Silent, Up};

    #[test]
    fn survivors_of_a_dead_leader_campaign_in_order_of_preference() {
        let first = Case::new(2, Some(1), &[(1, Refused), (3, Up)]);
        assert_eq!(first.decide(), (LeaderStatus::Dead, Some(Duration::ZERO)));
        let second = Case::new(3, Some(1), &[(1, Refused), (2, Up)]);
        assert_eq!(second.decide(), (LeaderStatus::Dead, Some(150 * MS)));
        let again = Case {
            attempts: 3,
            ..first
        };
        assert_eq!(again.decide().1, Some(160 * MS));
    }

    #[test]
    fn nobody_campaigns_against_a_living_leader_or_without_a_majority() {
        assert_eq!(
            Case::new(2, Some(1), &[(1, Up), (3, Up)]).decide(),
            (LeaderStatus::Live, None)
        );
        assert_eq!(
            Case::new(1, Some(1), &[(2, Refused)]).decide(),
            (LeaderStatus::Me, None)
        );
        let alone = Case::new(2, Some(1), &[(1, Refused), (3, Refused)]);
        assert_eq!(alone.decide(), (LeaderStatus::Dead, None));
    }

    #[test]
    fn a_damaged_replica_leads_only_if_nobody_else_does() {
        let up = [(1, Up), (2, Up), (3, Up)];
        let damaged = Case {
            is_damaged: true,
            ..Case::new(1, None, &up)
        };
        assert_eq!(damaged.decide().1, Some(450 * MS));
        let again = Case {
            attempts: 1,
            ..damaged
        };
        assert!(
            again.decide().1
                > Case {
                    is_damaged: false,
                    ..again
                }
                .decide()
                .1
        );
    }

    #[test]
    fn a_silent_leader_gets_a_moment() {
        let case = Case::new(2, Some(1), &[(1, Silent), (3, Up)]);
        assert_eq!(case.decide(), (LeaderStatus::Lost, Some(300 * MS)));
    }

    #[test]
    fn a_leader_that_does_not_reach_us_is_replaced_though_it_lives() {
        use LinkState::OneWay;
        let case = Case::new(2, Some(1), &[(1, OneWay), (3, Up)]);
        assert_eq!(case.decide(), (LeaderStatus::Lost, Some(300 * MS)));
        // What it asks of others is answered, so that one alone keeps a majority for it.
        let case = Case::new(2, Some(1), &[(1, OneWay)]);
        assert_eq!(case.decide(), (LeaderStatus::Lost, Some(300 * MS)));
    }

    #[test]
    fn a_leader_that_reaches_us_leads_though_we_do_not_reach_it() {
        use LinkState::{Connecting, Unreachable};
        for state in [Silent, Connecting, Unreachable] {
            let mut case = Case::new(2, Some(1), &[(1, state), (3, Up)]);
            let link = case.links.0.get_mut(&BrokerId(1)).unwrap();
            link.inbound = Some(incarnation(1));
            assert_eq!(case.decide(), (LeaderStatus::Live, None));
            let link = case.links.0.get_mut(&BrokerId(1)).unwrap();
            link.inbound = Some(incarnation(2));
            assert_eq!(
                case.decide(),
                (LeaderStatus::Restarted, Some(Duration::ZERO))
            );
        }
        let mut case = Case::new(2, Some(1), &[(1, Refused), (3, Up)]);
        let link = case.links.0.get_mut(&BrokerId(1)).unwrap();
        link.inbound = Some(incarnation(1));
        assert_eq!(case.decide().0, LeaderStatus::Dead);
    }

    #[test]
    fn fencing_decides_what_the_link_does_not_know() {
        let fenced = BTreeSet::from([BrokerId(1)]);
        let silent = Case::new(2, Some(1), &[(1, Silent), (3, Up)]);
        let silent = Case {
            fenced: fenced.clone(),
            ..silent
        };
        assert_eq!(silent.decide(), (LeaderStatus::Dead, Some(Duration::ZERO)));
        let up = Case {
            fenced,
            ..Case::new(2, Some(1), &[(1, Up), (3, Up)])
        };
        assert_eq!(up.decide(), (LeaderStatus::Fenced, Some(1_000 * MS)));
    }

    #[test]
    fn a_restarted_leader_leads_no_more() {
        let restarted = Case::new(2, Some(1), &[(1, Up), (3, Up)]);
        let restarted = Case {
            heard: heard(1, 77),
            ..restarted
        };
        assert_eq!(
            restarted.decide(),
            (LeaderStatus::Restarted, Some(Duration::ZERO))
        );
        // After our own restart, the leader of record is given time to speak.
        let unheard = Case {
            heard: None,
            ..restarted
        };
        assert_eq!(
            unheard.decide(),
            (LeaderStatus::Unconfirmed, Some(550 * MS))
        );
    }

    #[test]
    fn a_leaderless_group_is_led_by_the_first_that_can() {
        let up = [(1, Up), (2, Up), (3, Up)];
        assert_eq!(
            Case::new(1, None, &up).decide(),
            (LeaderStatus::None, Some(Duration::ZERO))
        );
        assert_eq!(
            Case::new(3, None, &up).decide(),
            (LeaderStatus::None, Some(300 * MS))
        );
        // Broker 1 keeps its place while it is not known to be dead.
        assert_eq!(Case::new(2, None, &[(3, Up)]).decide().1, Some(150 * MS));
        let first_dead = [(1, Refused), (2, Up), (3, Up)];
        assert_eq!(
            Case::new(2, None, &first_dead).decide().1,
            Some(Duration::ZERO)
        );
    }

    #[test]
    fn who_led_before_its_restart_goes_first() {
        let replicas = [replica(1), replica(2), replica(3)];
        let links = links(&[(1, Up), (2, Up)]);
        let fenced = BTreeSet::new();
        let view = GroupView {
            me: replica(3),
            replicas: &replicas,
            leader: None,
            is_leader: false,
            term: 5,
            voted_for: replica(3),
            attempts: 0,
            is_damaged: false,
        };
        let world = World {
            links: &links,
            fenced: &fenced,
            heard: None,
        };
        let timing = CampaignTiming::new(150 * MS);
        assert_eq!(
            campaign_delay(&view, &world, LeaderStatus::None, &timing),
            Some(Duration::ZERO)
        );
    }
}
