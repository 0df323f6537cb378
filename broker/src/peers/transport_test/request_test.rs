//! Requests: heartbeats, votes, copies, and who is at an address.

use super::*;

#[tokio::test]
async fn a_heartbeat_takes_one_request_and_ends() {
    let (one, two) = pair().await;
    two.groups.add(5, FakeReplica::new(replica(TWO)));
    let mut network = one.peers.network(RaftGroupId(5), replica(ONE));
    let mut client = network.new_heartbeat_client(replica(TWO), &()).await;
    for (index, good) in [(40, true), (400, false)] {
        let request = AppendEntriesRequest::<TypeConfig> {
            prev_log_id: Some(log_id(3, index)),
            entries: Vec::new(),
            ..append(1, 0)
        };
        let input = futures::stream::iter(vec![request; 3]);
        let mut output = client
            .stream_append(input, RPCOption::new(LIMIT))
            .await
            .unwrap();
        let first = timeout(LIMIT, output.next())
            .await
            .unwrap()
            .unwrap()
            .unwrap();
        assert_eq!(first.is_ok(), good);
        assert!(timeout(LIMIT, output.next()).await.unwrap().is_none());
    }
    assert_eq!(
        two.peers.heard().leader(RaftGroupId(5)).unwrap().broker,
        ONE
    );
}

#[tokio::test]
async fn votes_are_counted_and_a_longer_log_is_nudged() {
    let (one, mut two) = pair().await;
    two.groups.add(5, FakeReplica::new(replica(TWO)));
    let mut client = one.client(5, replica(TWO)).await;
    let option = || RPCOption::new(LIMIT);
    let mut request = VoteRequest::<TypeConfig>::new(vote(4, ONE), Some(log_id(3, 60)));
    assert!(
        client
            .vote(request.clone(), option())
            .await
            .unwrap()
            .vote_granted
    );
    assert!(
        client
            .pre_vote(request.clone(), option())
            .await
            .unwrap()
            .vote_granted
    );
    assert!(two.nudged.try_recv().is_err());

    request.last_log_id = Some(log_id(3, 10));
    // It may be the only one to try: whoever only asks first must not be in vain for ever either.
    let asked = client.pre_vote(request.clone(), option()).await.unwrap();
    assert!(!asked.vote_granted);
    let nudge = |term| {
        let group = RaftGroupId(5);
        Some(Nudge { group, term })
    };
    assert_eq!(two.nudged.recv().await, nudge(3), "4 is only asked for");
    assert!(!client.vote(request, option()).await.unwrap().vote_granted);
    assert_eq!(two.nudged.recv().await, nudge(4));

    let mut client = one.client(99, replica(TWO)).await;
    let request = VoteRequest::<TypeConfig>::new(vote(4, ONE), None);
    assert!(client.vote(request, option()).await.is_err());
}

#[tokio::test]
async fn a_replica_that_lacks_what_a_log_begins_after_is_named() {
    let (one, mut two) = pair().await;
    two.groups.add(5, FakeReplica::new(replica(TWO)));
    let mut client = one.client(5, replica(TWO)).await;
    let mut ask = async |index| {
        let snapshot = crate::replica::raft_config::PartitionSnapshot {
            meta: crate::replica::raft_config::SnapshotMeta {
                last_log_id: Some(log_id(3, index)),
                last_membership: Default::default(),
            },
            snapshot: bytes::Bytes::new(),
        };
        let never = std::future::pending();
        let leader = vote(3, ONE);
        client
            .full_snapshot(leader, snapshot, never, RPCOption::new(LIMIT))
            .await
    };
    assert_eq!(ask(HAS_UP_TO).await.unwrap().vote, vote(3, ONE));
    assert!(two.behind.try_recv().is_err());
    assert!(ask(HAS_UP_TO + 1).await.is_err());
    let behind = Behind {
        group: RaftGroupId(5),
        leader: replica(ONE),
        vote: vote(3, ONE),
    };
    assert_eq!(two.behind.recv().await, Some(behind));
}

#[tokio::test]
async fn a_resting_leader_whose_broker_is_connected_is_not_voted_out() {
    let (one, two) = pair().await;
    // Node two follows a leader on broker 3, which has spoken and is connected.
    let three = BrokerId(3);
    let follower = FakeReplica {
        vote: vote(3, three),
        ..FakeReplica::new(replica(TWO))
    };
    let follower = two.groups.add(5, follower);
    let node_three = node(three, None).await;
    two.dial(three, node_three.address);
    let status = two.wait_for(three, LinkState::Up).await;
    let mut client = one.client(5, replica(TWO)).await;
    let request = VoteRequest::<TypeConfig>::new(vote(4, ONE), Some(log_id(3, 60)));
    let granted = client
        .pre_vote(request.clone(), RPCOption::new(LIMIT))
        .await
        .unwrap();
    assert!(granted.vote_granted, "it has not spoken yet");

    two.peers.heard().record(
        RaftGroupId(5),
        &*follower,
        three,
        status.incarnation.unwrap(),
    );
    let refused = client
        .pre_vote(request.clone(), RPCOption::new(LIMIT))
        .await
        .unwrap();
    assert!(!refused.vote_granted);

    drop(node_three);
    two.wait_for(three, LinkState::Refused).await;
    let granted = client
        .pre_vote(request, RPCOption::new(LIMIT))
        .await
        .unwrap();
    assert!(granted.vote_granted);
}

#[tokio::test]
async fn another_broker_at_the_address_is_not_taken_for_the_peer() {
    let (one, two) = (node(ONE, None).await, node(TWO, None).await);
    one.dial(BrokerId(9), two.address);
    let status = one.wait_for(BrokerId(9), LinkState::Unreachable).await;
    assert_eq!(status.incarnation, None);
}
