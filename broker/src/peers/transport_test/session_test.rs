//! Sessions: appends in their order, what holds them back, and how they end.

use super::*;

type Output<'a> = BoxStream<'a, Result<StreamAppendResult<TypeConfig>, RPCError<TypeConfig>>>;

async fn session<'a>(
    client: &'a mut ReplicaClient,
) -> (
    mpsc::UnboundedSender<AppendEntriesRequest<TypeConfig>>,
    Output<'a>,
) {
    let (sender, receiver) = mpsc::unbounded_channel();
    let input = UnboundedReceiverStream::new(receiver);
    let output = client
        .stream_append(input, RPCOption::new(LIMIT))
        .await
        .unwrap();
    (sender, output)
}

async fn next(output: &mut Output<'_>) -> Result<Option<u64>, String> {
    match timeout(LIMIT, output.next())
        .await
        .expect("an answer in time")
    {
        Some(Ok(Ok(matched))) => Ok(matched.map(|id| id.index)),
        Some(Ok(Err(error))) => Err(error.to_string()),
        Some(Err(error)) => Err(error.to_string()),
        None => Err("ended".to_owned()),
    }
}

#[tokio::test]
async fn appends_are_answered_in_their_order() {
    let (one, two) = pair().await;
    two.groups.add(5, FakeReplica::new(replica(TWO)));
    let mut client = one.client(5, replica(TWO)).await;
    let (input, mut output) = session(&mut client).await;
    for index in 0..500 {
        input.send(append(index, 3_000)).unwrap();
    }
    for index in 0..500 {
        assert_eq!(next(&mut output).await, Ok(Some(index)));
    }
    drop(input);
    assert_eq!(next(&mut output).await, Err("ended".to_owned()));
}

#[tokio::test]
async fn a_replica_that_does_not_run_there_ends_the_session() {
    let (one, two) = pair().await;
    two.groups.add(5, FakeReplica::new(replica(TWO)));
    let stranger = ReplicaId {
        incarnation: 8,
        ..replica(TWO)
    };
    for (group, to) in [(6, replica(TWO)), (5, stranger)] {
        let mut client = one.client(group, to).await;
        let (input, mut output) = session(&mut client).await;
        input.send(append(0, 10)).unwrap();
        let error = next(&mut output).await.unwrap_err();
        assert!(error.contains("does not run"), "{error}");
    }
}

#[tokio::test]
async fn a_replica_that_stops_ends_the_session() {
    let (one, two) = pair().await;
    two.groups.add(
        5,
        FakeReplica {
            fails_at: Some(1),
            ..FakeReplica::new(replica(TWO))
        },
    );
    let mut client = one.client(5, replica(TWO)).await;
    let (input, mut output) = session(&mut client).await;
    input.send(append(0, 10)).unwrap();
    input.send(append(1, 10)).unwrap();
    assert_eq!(next(&mut output).await, Ok(Some(0)));
    let error = next(&mut output).await.unwrap_err();
    assert!(error.contains("as the test wants"), "{error}");
}

#[tokio::test]
async fn a_dead_peer_fails_nothing_before_there_is_something_to_send() {
    let (one, two) = (node(ONE, None).await, node(TWO, None).await);
    let address = two.address;
    drop(two);
    one.dial(TWO, address);
    one.wait_for(TWO, LinkState::Refused).await;
    let mut client = one.client(5, replica(TWO)).await;
    let (input, mut output) = session(&mut client).await;
    assert!(futures::poll!(output.next()).is_pending());
    input.send(append(0, 10)).unwrap();
    let error = next(&mut output).await.unwrap_err();
    assert!(error.contains("not connected"), "{error}");
}

#[tokio::test]
async fn a_broken_connection_ends_its_sessions_and_a_new_one_takes_over() {
    let (one, two) = pair().await;
    let replica_two = two.groups.add(5, FakeReplica::new(replica(TWO)));
    replica_two.turns.forget_permits(1_000_000);
    let mut client = one.client(5, replica(TWO)).await;
    let (input, mut output) = session(&mut client).await;
    input.send(append(0, 10)).unwrap();
    assert!(futures::poll!(output.next()).is_pending());
    let before = one.wait_for(TWO, LinkState::Up).await;

    let address = two.address;
    drop(two);
    let error = next(&mut output).await.unwrap_err();
    assert!(error.contains("broke"), "{error}");
    drop(output);
    one.wait_for(TWO, LinkState::Refused).await;

    let two = node(TWO, Some(address)).await;
    two.groups.add(5, FakeReplica::new(replica(TWO)));
    let after = one.wait_for(TWO, LinkState::Up).await;
    assert_ne!(before.incarnation, after.incarnation);
    let (input, mut output) = session(&mut client).await;
    input.send(append(0, 10)).unwrap();
    assert_eq!(next(&mut output).await, Ok(Some(0)));
}

#[tokio::test]
async fn a_slow_group_is_held_back_and_holds_up_no_other() {
    let (one, two) = pair().await;
    let slow = two.groups.add(5, FakeReplica::new(replica(TWO)));
    slow.turns.forget_permits(1_000_000);
    two.groups.add(6, FakeReplica::new(replica(TWO)));
    let (mut slow_client, mut quick_client) = (
        one.client(5, replica(TWO)).await,
        one.client(6, replica(TWO)).await,
    );

    let taken = Arc::new(Mutex::new(0));
    let counter = taken.clone();
    let endless = futures::stream::iter(0..).map(move |index| {
        *counter.lock().unwrap() += 1;
        append(index, 10)
    });
    let mut slow_output = slow_client
        .stream_append(endless, RPCOption::new(LIMIT))
        .await
        .unwrap();
    let (input, mut quick_output) = session(&mut quick_client).await;
    for index in 0..200 {
        input.send(append(index, 50_000)).unwrap();
        assert!(futures::poll!(slow_output.next()).is_pending());
        assert_eq!(next(&mut quick_output).await, Ok(Some(index)));
    }
    // The window, and the one that waits for room in it.
    assert_eq!(*taken.lock().unwrap(), SESSION_APPENDS_MAX + 1);
    slow.turns.add_permits(1);
    assert_eq!(next(&mut slow_output).await, Ok(Some(0)));
}

#[tokio::test]
async fn a_replica_that_begins_to_vote_is_held_back_no_more() {
    let (one, two) = pair().await;
    let leader = one.groups.add(5, FakeReplica::new(replica(ONE)));
    leader.others_vote.store(false, Ordering::Relaxed);
    two.groups.add(5, FakeReplica::new(replica(TWO)));
    let mut client = one.client(5, replica(TWO)).await;
    let (input, mut output) = session(&mut client).await;
    for index in 0..2 {
        input.send(append(index, 100_000)).unwrap();
    }
    assert_eq!(next(&mut output).await, Ok(Some(0)));
    // A quarter of an hour's worth has passed.
    let early = timeout(Duration::from_millis(300), output.next()).await;
    assert!(early.is_err(), "the limit holds");
    leader.others_vote.store(true, Ordering::Relaxed);
    assert_eq!(next(&mut output).await, Ok(Some(1)));
}

#[tokio::test]
async fn what_holds_no_records_passes_a_budget_that_is_used_up() {
    const MIB: usize = 1 << 20;
    let (one, two) = pair().await;
    let mut clients = Vec::new();
    // More than enough.
    for group in 1..=2 * LINK_BYTES_MAX / SESSION_BYTES_MAX {
        // As while its disk is full.
        let full = two.groups.add(group as u64, FakeReplica::new(replica(TWO)));
        full.turns.forget_permits(1_000_000);
        clients.push(one.client(group as u64, replica(TWO)).await);
    }
    let mut held = Vec::new();
    for client in &mut clients {
        let appends = futures::stream::iter(0..).map(|index| append(index, MIB));
        let output = client.stream_append(appends, RPCOption::new(LIMIT)).await;
        held.push(output.unwrap());
    }
    for output in &mut held {
        assert!(futures::poll!(output.next()).is_pending());
    }
    two.groups.add(1_000, FakeReplica::new(replica(TWO)));
    let mut client = one.client(1_000, replica(TWO)).await;
    let (input, mut output) = session(&mut client).await;
    let mut blank = append(0, 0);
    blank.entries[0].payload = EntryPayload::Blank;
    input.send(blank).unwrap();
    assert_eq!(next(&mut output).await, Ok(Some(0)));
    input.send(append(1, MIB)).unwrap();
    let early = timeout(Duration::from_millis(300), output.next()).await;
    assert!(early.is_err(), "the budget is used up");
    drop(held);
    assert_eq!(next(&mut output).await, Ok(Some(1)));
}
