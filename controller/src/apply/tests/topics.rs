//! Topics: their names, their groups and incarnations, and changes of configs and partition counts.

use super::*;
use crate::command::{PartitionsPlan, SetTopicConfigs, TopicRefusal};

#[test]
fn a_new_topic_has_fresh_groups_and_incarnations_and_no_leader() {
    let mut state = three_brokers();
    let first = partition(&state);
    assert_eq!(first.replicas[0].incarnation, state.image.revision);
    assert_eq!((first.leader, isr(&state)), (None, vec![1, 2, 3]));
    apply(
        &mut state,
        Command::DeleteTopics {
            topic_ids: vec![topic_id(1)],
        },
    );
    assert!(state.groups.is_empty());
    create(&mut state, 2, "t", &[&[1, 2, 3]]);
    let second = &state.image.topic_by_name("t").unwrap().partitions[0];
    assert_eq!(
        second.raft_group_id,
        RaftGroupId(2),
        "group ids are never used again"
    );
    assert!(second.replicas[0].incarnation > first.replicas[0].incarnation);
}

#[test]
fn names_that_exist_or_collide_are_refused() {
    let mut state = three_brokers();
    let refused = |refusal| Outcome::Topics(vec![Err(refusal)]);
    assert_eq!(
        create(&mut state, 2, "t", &[&[1]]),
        refused(TopicRefusal::NameExists)
    );
    create(&mut state, 3, "a.b", &[&[1]]);
    let collision = TopicRefusal::NameCollides("a.b".to_owned());
    assert_eq!(create(&mut state, 4, "a_b", &[&[1]]), refused(collision));
    let unknown = TopicRefusal::UnknownBroker(BrokerId(9));
    assert_eq!(create(&mut state, 5, "c", &[&[1, 9]]), refused(unknown));
}

#[test]
fn configs_and_partitions_change_only_what_was_looked_at() {
    let mut state = three_brokers();
    let configs: BTreeMap<_, _> = [("retention.ms".to_owned(), "1".to_owned())].into();
    let set = |expected: &BTreeMap<String, String>| {
        Command::SetTopicConfigs(SetTopicConfigs {
            topic_id: topic_id(1),
            expected: expected.clone(),
            configs: configs.clone(),
        })
    };
    apply(&mut state, set(&BTreeMap::new()));
    assert_eq!(state.image.topic_by_name("t").unwrap().configs, configs);
    let changed = Outcome::Topics(vec![Err(TopicRefusal::Changed)]);
    assert_eq!(
        apply(&mut state, set(&BTreeMap::new())),
        (changed.clone(), None)
    );
    let grow = || Command::CreatePartitions {
        topics: vec![PartitionsPlan {
            topic_id: topic_id(1),
            present_count: 1,
            assignments: vec![vec![BrokerId(2)]; 2],
        }],
    };
    apply(&mut state, grow());
    assert_eq!(state.image.topic_by_name("t").unwrap().partitions.len(), 3);
    assert_eq!(apply(&mut state, grow()), (changed, None));
}
