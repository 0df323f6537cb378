//! Single decisions, and a model in which disks are lost while the group is being founded.

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use super::*;

fn standing(disk: u128) -> Standing {
    Standing {
        identity: Identity::of_new_disk(Uuid::from_u128(disk)),
        base: String::new(),
        group: [1, 2, 3].into(),
    }
}

fn member(disk: u128, node_id: NodeId, founders: &[(u64, u128)]) -> Standing {
    let mut standing = standing(disk);
    standing.identity.node_id = Some(node_id);
    standing.identity.founders = founders
        .iter()
        .map(|(controller_id, disk)| Founder {
            controller_id: *controller_id,
            disk_id: Uuid::from_u128(*disk),
        })
        .collect();
    standing
}

fn conflict_of(decision: Decision) -> String {
    match decision {
        Decision::Wait(Obstacle::Conflict(why)) => why,
        other => panic!("expected a conflict, got {other:?}"),
    }
}

#[test]
fn a_node_id_holds_controller_and_incarnation() {
    let id = NodeId::new(3, 7).unwrap();
    assert_eq!((id.controller_id(), id.incarnation()), (3, 7));
    assert_eq!(NodeId::of_raft(id.to_raft()), id);
    assert_eq!(NodeId::new(3, 0).unwrap(), NodeId::founder(3));
    assert_eq!(
        NodeId::founder(3).to_raft(),
        3,
        "as before there were incarnations"
    );
    assert!(NodeId::new(CONTROLLER_ID_MAX + 1, 0).is_none());
    assert!(NodeId::new(1, INCARNATION_END).is_none());
    let largest = NodeId::new(CONTROLLER_ID_MAX, INCARNATION_END - 1).unwrap();
    assert!(i64::try_from(largest.to_raft()).is_ok());
}

#[test]
fn a_group_is_founded_when_all_have_answered_that_they_are_empty() {
    let mut answers = BTreeMap::from([(2, standing(2))]);
    let missing = decide(1, &standing(1), &answers);
    assert_eq!(missing, Decision::Wait(Obstacle::Missing(vec![3])));
    answers.insert(3, standing(3));
    let Decision::Found(founders) = decide(1, &standing(1), &answers) else {
        panic!("all are there");
    };
    assert_eq!(
        founders,
        member(1, NodeId::founder(1), &[(1, 1), (2, 2), (3, 3)])
            .identity
            .founders
    );
}

#[test]
fn who_is_of_the_founding_disks_founds_and_another_disk_is_a_new_member() {
    let founders = [(1, 1), (2, 2), (3, 3)];
    let mut answers = BTreeMap::from([(1, member(1, NodeId::founder(1), &founders))]);
    let ours = answers[&1].identity.founders.clone();
    let replace = Decision::Replace(ours.clone());
    assert_eq!(decide(2, &standing(22), &answers), replace);
    // The third may know of another group, so it has to be asked too.
    let missing = Decision::Wait(Obstacle::Missing(vec![3]));
    assert_eq!(decide(2, &standing(2), &answers), missing);
    let mut with_third = |third: Standing| {
        answers.insert(3, third);
        decide(2, &standing(2), &answers)
    };
    let found = Decision::Found(ours);
    assert_eq!(with_third(standing(3)), found);
    let let_in = member(33, NodeId::new(3, 9).unwrap(), &founders);
    assert_eq!(with_third(let_in), found);
    let others = member(3, NodeId::founder(3), &[(1, 1), (2, 20), (3, 3)]);
    assert!(matches!(with_third(others), Decision::Replace(_)));
    // A group from before founders were recorded.
    let old = BTreeMap::from([(1, member(1, NodeId::founder(1), &[]))]);
    assert_eq!(decide(2, &standing(2), &old), Decision::Replace(Vec::new()));
}

#[test]
fn what_does_not_go_together_is_a_conflict() {
    let mut other = standing(2);
    other.group = [1, 2, 4].into();
    let why = conflict_of(decide(1, &standing(1), &BTreeMap::from([(2, other)])));
    assert!(
        why.contains("controller 2 has controllers {1, 2, 4}"),
        "{why}"
    );
    let mut restored = standing(2);
    restored.base = "b".to_owned();
    let answers = BTreeMap::from([(2, restored.clone())]);
    let why = conflict_of(decide(1, &standing(1), &answers));
    assert!(
        why.contains("from nothing, controller 2 from backup b"),
        "{why}"
    );
    let answers = BTreeMap::from([(1, member(1, NodeId::founder(1), &[]))]);
    let why = conflict_of(decide(2, &restored, &answers));
    assert!(why.contains("belongs to a group already"), "{why}");
}

/// A controller of the model: its disk, and the answers it has collected since its process started.
struct Node {
    standing: Standing,
    answers: BTreeMap<u64, Standing>,
}

/// Answers may be as old as one likes, processes restart and disks are lost at any moment; a commit
/// is a majority of founders' disks. While fewer than a majority of disks are lost, any two commits
/// share a disk: what was committed is seen by whoever is elected later.
#[test]
fn no_two_commits_without_a_common_disk() {
    let mut founded = 0;
    for (seed, count) in (0..20_000).map(|seed| (seed, if seed % 2 == 0 { 3 } else { 5 })) {
        let mut random = StdRng::seed_from_u64(seed);
        let group: BTreeSet<u64> = (1..=count).collect();
        let majority = group.len() / 2 + 1;
        let mut next_disk = 100_u128;
        let mut fresh = || {
            next_disk += 1;
            let mut fresh = standing(next_disk);
            fresh.group = group.clone();
            Node {
                standing: fresh,
                answers: BTreeMap::new(),
            }
        };
        let mut nodes: BTreeMap<u64, Node> = group.iter().map(|id| (*id, fresh())).collect();
        let mut lost = 0;
        let mut commits: Vec<BTreeSet<Uuid>> = Vec::new();
        for _ in 0..60 {
            let id = random.random_range(1..=count);
            let peer = random.random_range(1..=count);
            match random.random_range(0..10) {
                0 if lost + 1 < majority => {
                    lost += 1;
                    nodes.insert(id, fresh());
                }
                1 => nodes.get_mut(&id).unwrap().answers.clear(),
                2..=6 if peer != id => {
                    let answer = nodes[&peer].standing.clone();
                    nodes.get_mut(&id).unwrap().answers.insert(peer, answer);
                }
                7..=8 => {
                    let node = nodes.get_mut(&id).unwrap();
                    if node.standing.identity.node_id.is_none() {
                        let (node_id, founders) = match decide(id, &node.standing, &node.answers) {
                            Decision::Found(founders) => (NodeId::founder(id), founders),
                            Decision::Replace(founders) => (NodeId::new(id, 1).unwrap(), founders),
                            Decision::Wait(_) => continue,
                        };
                        node.standing.identity.node_id = Some(node_id);
                        node.standing.identity.founders = founders;
                    }
                }
                _ => {
                    let founders: Vec<Uuid> = nodes
                        .values()
                        .map(|node| &node.standing.identity)
                        .filter(|identity| identity.node_id.is_some_and(|n| n.incarnation() == 0))
                        .map(|identity| identity.disk_id)
                        .collect();
                    if founders.len() >= majority {
                        commits.push(founders.into_iter().take(majority).collect());
                    }
                }
            }
        }
        founded += usize::from(!commits.is_empty());
        for one in &commits {
            for other in &commits {
                assert!(
                    !one.is_disjoint(other),
                    "seed {seed}: {one:?} and {other:?}"
                );
            }
        }
    }
    assert!(founded > 0, "no group was ever founded");
}
