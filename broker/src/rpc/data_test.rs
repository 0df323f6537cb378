//! The service `Data` as a gateway uses it, over a real connection.

use std::time::{Duration, Instant};

use bytes::Bytes;
use chronik_proto::v1;
use chronik_proto::v1::PartitionError;
use chronik_proto::v1::data_client::DataClient;
use chronik_proto::v1::data_server::DataServer;
use chronik_types::id::RaftGroupId;
use chronik_types::record_batch::batches;
use tokio::net::TcpListener;
use tokio::sync::mpsc;
use tokio::time::timeout;
use tokio_stream::wrappers::{ReceiverStream, TcpListenerStream};
use tonic::Streaming;
use tonic::transport::{Channel, Server};

use super::data::DataService;
use crate::replica::test_batches::{value, with_records};
use crate::replica::test_cluster::{Cluster, LIMIT};
use crate::replicas::Replicas;
use crate::test_wait::wait_for;

const GROUP: u64 = 1;
const UNKNOWN_GROUP: u64 = 99;

/// The broker of replica `n`, serving until the test ends.
async fn serve(cluster: &Cluster, n: usize) -> DataClient<Channel> {
    let replicas = Replicas::new();
    replicas.insert(RaftGroupId(GROUP), cluster.replica(n).clone());
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let service = DataServer::new(DataService::new(
        replicas,
        cluster.storage(n),
        "/data".into(),
    ));
    let incoming = TcpListenerStream::new(listener);
    tokio::spawn(
        Server::builder()
            .add_service(service)
            .serve_with_incoming(incoming),
    );
    DataClient::connect(format!("http://{address}"))
        .await
        .unwrap()
}

/// A stream in both directions.
struct Talk<Q, A> {
    requests: mpsc::Sender<Q>,
    answers: Streaming<A>,
}

impl<Q, A> Talk<Q, A> {
    async fn send(&self, request: Q) {
        self.requests
            .send(request)
            .await
            .unwrap_or_else(|_| panic!("the stream is closed"));
    }

    async fn answer(&mut self) -> A {
        timeout(LIMIT, self.answers.message())
            .await
            .unwrap()
            .unwrap()
            .unwrap()
    }
}

async fn produce_stream(
    client: &mut DataClient<Channel>,
) -> Talk<v1::ProduceRequest, v1::ProduceResponse> {
    let (requests, receiver) = mpsc::channel(64);
    let answers = client
        .produce(ReceiverStream::new(receiver))
        .await
        .unwrap()
        .into_inner();
    Talk { requests, answers }
}

async fn fetch_stream(
    client: &mut DataClient<Channel>,
) -> Talk<v1::FetchRequest, v1::FetchResponse> {
    let (requests, receiver) = mpsc::channel(64);
    let answers = client
        .fetch(ReceiverStream::new(receiver))
        .await
        .unwrap()
        .into_inner();
    Talk { requests, answers }
}

fn produce(request_id: u64, acks: i32, group: u64, records: Vec<u8>) -> v1::ProduceRequest {
    v1::ProduceRequest {
        request_id,
        acks,
        timeout_ms: 20_000,
        partitions: vec![v1::PartitionProduce {
            raft_group_id: group,
            records: Bytes::from(records),
        }],
        traceparent: String::new(),
    }
}

struct Fetch {
    offset: i64,
    min_bytes: u32,
    max_bytes: u32,
    max_wait: Duration,
}

impl Default for Fetch {
    fn default() -> Self {
        Fetch {
            offset: 0,
            min_bytes: 1,
            max_bytes: 1 << 20,
            max_wait: LIMIT,
        }
    }
}

fn fetch(request_id: u64, fetch: Fetch) -> v1::FetchRequest {
    let start = v1::FetchStart {
        max_wait_ms: fetch.max_wait.as_millis() as u32,
        min_bytes: fetch.min_bytes,
        max_bytes: fetch.max_bytes,
        partitions: vec![v1::PartitionFetch {
            raft_group_id: GROUP,
            fetch_offset: fetch.offset,
            max_bytes: fetch.max_bytes,
            current_leader_epoch: -1,
            last_fetched_epoch: -1,
        }],
        ..Default::default()
    };
    v1::FetchRequest {
        request_id,
        kind: Some(v1::fetch_request::Kind::Start(start)),
    }
}

fn finish(request_id: u64) -> v1::FetchRequest {
    let kind = v1::fetch_request::Kind::Finish(v1::FetchFinish {});
    v1::FetchRequest {
        request_id,
        kind: Some(kind),
    }
}

fn base_offsets(result: &v1::PartitionFetchResult) -> Vec<i64> {
    let headers = result
        .records
        .iter()
        .flat_map(|bytes| batches(bytes).map(|b| b.unwrap().1));
    headers.map(|header| header.base_offset.0).collect()
}

#[tokio::test]
async fn requests_of_a_stream_enter_the_log_in_order() {
    let mut cluster = Cluster::start(1, 1).await;
    let mut client = serve(&cluster, 0).await;
    let mut stream = produce_stream(&mut client).await;
    for request_id in 0..200 {
        stream
            .send(produce(request_id, -1, GROUP, value("x")))
            .await;
    }
    let mut offsets = vec![-1; 200];
    for _ in 0..200 {
        let answer = stream.answer().await;
        assert_eq!(answer.partitions[0].error(), PartitionError::None);
        assert_eq!(answer.partitions[0].leader.unwrap().broker_id, 1);
        offsets[answer.request_id as usize] = answer.partitions[0].base_offset;
    }
    assert_eq!(offsets, (0..200).collect::<Vec<i64>>());
    cluster.stop_all().await;
}

#[tokio::test]
async fn acks_zero_has_no_answer_and_is_appended() {
    let mut cluster = Cluster::start(1, 1).await;
    let mut client = serve(&cluster, 0).await;
    let mut stream = produce_stream(&mut client).await;
    stream.send(produce(1, 0, GROUP, value("a"))).await;
    stream.send(produce(2, 1, GROUP, value("b"))).await;
    let answer = stream.answer().await;
    assert_eq!(
        (answer.request_id, answer.partitions[0].base_offset),
        (2, 1)
    );
    cluster.stop_all().await;
}

#[tokio::test]
async fn what_cannot_be_appended_is_told_per_partition() {
    let mut cluster = Cluster::start(3, 1).await;
    cluster.wait_for_leadership(1, |l| l.leader.is_some()).await;
    let mut follower = serve(&cluster, 1).await;
    let mut stream = produce_stream(&mut follower).await;
    stream.send(produce(1, -1, GROUP, value("a"))).await;
    let refused = stream.answer().await.partitions.remove(0);
    assert_eq!(refused.error(), PartitionError::NotLeader);
    assert_eq!(refused.leader.unwrap().broker_id, 1);
    assert_eq!(refused.base_offset, -1);

    let mut leader = serve(&cluster, 0).await;
    let mut stream = produce_stream(&mut leader).await;
    let mut refused = async |request| {
        stream.send(request).await;
        stream.answer().await.partitions.remove(0).error()
    };
    let unknown = refused(produce(1, -1, UNKNOWN_GROUP, value("a"))).await;
    assert_eq!(unknown, PartitionError::UnknownPartition);
    let empty = refused(produce(2, -1, GROUP, Vec::new())).await;
    assert_eq!(empty, PartitionError::InvalidBatch);
    let acks = refused(produce(3, 7, GROUP, value("a"))).await;
    assert_eq!(acks, PartitionError::InvalidBatch);
    let mut damaged = value("a");
    *damaged.last_mut().unwrap() ^= 1;
    let damaged = refused(produce(4, -1, GROUP, damaged)).await;
    assert_eq!(damaged, PartitionError::CorruptBatch);
    cluster.stop_all().await;
}

#[tokio::test]
async fn a_fetch_waits_for_records_and_hears_of_them_at_once() {
    let mut cluster = Cluster::start(1, 1).await;
    let mut client = serve(&cluster, 0).await;
    let mut stream = fetch_stream(&mut client).await;
    stream.send(fetch(1, Fetch::default())).await;
    cluster.ack(0, value("a")).await;
    let started = Instant::now();
    let answer = stream.answer().await;
    assert!(started.elapsed() < LIMIT / 2);
    assert_eq!(answer.request_id, 1);
    assert_eq!(base_offsets(&answer.partitions[0]), vec![0]);
    assert_eq!(answer.partitions[0].high_watermark, 1);
    cluster.stop_all().await;
}

#[tokio::test]
async fn a_fetch_below_min_bytes_ends_at_max_wait_or_when_told() {
    let mut cluster = Cluster::start(1, 1).await;
    cluster.ack(0, value("a")).await;
    let mut client = serve(&cluster, 0).await;
    let mut stream = fetch_stream(&mut client).await;
    let much = |max_wait| Fetch {
        min_bytes: 1_000_000,
        max_wait,
        ..Fetch::default()
    };
    stream.send(fetch(1, much(LIMIT))).await;
    stream
        .send(fetch(2, much(Duration::from_millis(200))))
        .await;
    let answer = stream.answer().await;
    assert_eq!(
        (answer.request_id, base_offsets(&answer.partitions[0])),
        (2, vec![0])
    );
    stream.send(finish(1)).await;
    // Already answered: nothing to finish.
    stream.send(finish(2)).await;
    let answer = stream.answer().await;
    assert_eq!(
        (answer.request_id, base_offsets(&answer.partitions[0])),
        (1, vec![0])
    );
    cluster.stop_all().await;
}

#[tokio::test]
async fn a_fetch_is_cut_by_bytes_but_never_below_one_batch() {
    let mut cluster = Cluster::start(1, 1).await;
    let body = "x".repeat(1000);
    for _ in 0..5 {
        cluster.ack(0, value(&body)).await;
    }
    let mut client = serve(&cluster, 0).await;
    let mut stream = fetch_stream(&mut client).await;
    stream
        .send(fetch(
            1,
            Fetch {
                max_bytes: 10,
                ..Fetch::default()
            },
        ))
        .await;
    assert_eq!(base_offsets(&stream.answer().await.partitions[0]), vec![0]);
    stream
        .send(fetch(
            2,
            Fetch {
                max_bytes: 2500,
                offset: 1,
                ..Fetch::default()
            },
        ))
        .await;
    assert_eq!(
        base_offsets(&stream.answer().await.partitions[0]),
        vec![1, 2]
    );
    stream
        .send(fetch(
            3,
            Fetch {
                offset: 6,
                ..Fetch::default()
            },
        ))
        .await;
    let answer = stream.answer().await.partitions.remove(0);
    assert_eq!(answer.error(), PartitionError::OffsetOutOfRange);
    assert_eq!((answer.log_start_offset, answer.high_watermark), (0, 5));
    cluster.stop_all().await;
}

#[tokio::test]
async fn a_leader_that_was_replaced_unawares_sends_no_consumer_elsewhere() {
    let mut cluster = Cluster::start(3, 2).await;
    cluster.ack(0, value("a")).await;
    let mut client = serve(&cluster, 0).await;
    let mut stream = fetch_stream(&mut client).await;
    let mut fetch_beyond = async || {
        let offset = 2;
        let beyond = Fetch {
            offset,
            ..Fetch::default()
        };
        stream.send(fetch(1, beyond)).await;
        stream.answer().await.partitions.remove(0).error()
    };
    let refused = async || match fetch_beyond().await {
        // On a busy machine a majority may not answer in time.
        PartitionError::NotLeader => None,
        error => Some(error),
    };
    let refused = wait_for("the leader refuses for good", refused).await;
    assert_eq!(refused, PartitionError::OffsetOutOfRange);
    cluster.wait_for_followers(0).await;
    cluster.router.cut(cluster.nodes[0].id);
    cluster.elect(1).await;
    cluster.ack(1, value("b")).await;
    // The old leader's log ends before what a consumer has read since.
    assert!(cluster.replica(0).leadership().borrow().ready);
    assert_eq!(fetch_beyond().await, PartitionError::NotLeader);
    assert!(cluster.replica(0).leadership().borrow().is_leader);
    cluster.stop_all().await;
}

#[tokio::test]
async fn a_waiting_fetch_is_told_when_leadership_moves() {
    let mut cluster = Cluster::start(3, 2).await;
    cluster.ack(0, value("a")).await;
    let mut client = serve(&cluster, 0).await;
    let mut stream = fetch_stream(&mut client).await;
    stream
        .send(fetch(
            1,
            Fetch {
                offset: 1,
                ..Fetch::default()
            },
        ))
        .await;
    let started = Instant::now();
    let to = cluster.nodes[1].id;
    cluster.replica(0).transfer_leadership(to).await.unwrap();
    let answer = stream.answer().await.partitions.remove(0);
    assert!(started.elapsed() < LIMIT / 2);
    assert_eq!(answer.error(), PartitionError::NotLeader);
    cluster.stop_all().await;
}

#[tokio::test]
async fn offsets_by_time_and_by_epoch() {
    let mut cluster = Cluster::start(1, 1).await;
    cluster
        .ack(0, with_records(&[(1_000, b"a"), (2_000, b"b")]))
        .await;
    let mut client = serve(&cluster, 0).await;
    let mut list = async |group, timestamp| {
        let asked = v1::PartitionListOffsets {
            raft_group_id: group,
            current_leader_epoch: -1,
            timestamp,
        };
        let request = v1::ListOffsetsRequest {
            read_committed: false,
            partitions: vec![asked],
        };
        let answer = client
            .list_offsets(request)
            .await
            .unwrap()
            .into_inner()
            .partitions
            .remove(0);
        (answer.error(), answer.offset, answer.timestamp)
    };
    assert_eq!(list(GROUP, -1).await, (PartitionError::None, 2, -1));
    assert_eq!(list(GROUP, 1_500).await, (PartitionError::None, 1, 2_000));
    assert_eq!(list(GROUP, 9_000).await, (PartitionError::None, -1, -1));
    assert_eq!(
        list(UNKNOWN_GROUP, -1).await,
        (PartitionError::UnknownPartition, -1, -1)
    );
    let epoch = cluster.replica(0).leadership().borrow().leader_epoch.0;
    let mut end = async |leader_epoch| {
        let asked = v1::PartitionLeaderEpoch {
            raft_group_id: GROUP,
            current_leader_epoch: -1,
            leader_epoch,
        };
        let request = v1::OffsetForLeaderEpochRequest {
            partitions: vec![asked],
        };
        let answer = client
            .offset_for_leader_epoch(request)
            .await
            .unwrap()
            .into_inner();
        let end = answer.partitions[0].end.unwrap();
        (end.leader_epoch, end.end_offset)
    };
    assert_eq!(end(epoch).await, (epoch, 2));
    assert_eq!(end(epoch + 1).await, (-1, -1));
    cluster.stop_all().await;
}
