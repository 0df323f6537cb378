//! What a gateway asks of the brokers.

use std::time::Duration;

use chronik_proto::v1;
use chronik_proto::v1::data_client::DataClient;
use futures::{Stream, StreamExt};
use tonic::transport::Channel;

use super::harness::Cluster;
use crate::replica::test_batches;
use crate::test_wait::wait_for;

/// One request on a stream that stays open, as a gateway's does.
fn left_open<T>(request: T) -> impl Stream<Item = T> {
    futures::stream::once(async { request }).chain(futures::stream::pending())
}

impl Cluster {
    async fn client(&self, id: i32) -> DataClient<Channel> {
        let address = format!("http://{}", self.brokers[&id].rpc_address);
        DataClient::connect(address).await.unwrap()
    }

    /// Appends one record with acks=all, wherever the leader is; the broker that took it.
    pub async fn produce(&self, group: u64, value: &str) -> i32 {
        let all: Vec<i32> = self.brokers.keys().copied().collect();
        self.produce_at(&all, group, value).await
    }

    /// The same at one of these brokers.
    pub async fn produce_at(&self, brokers: &[i32], group: u64, value: &str) -> i32 {
        let what = format!("a broker of {brokers:?} takes {value}");
        let take = async || {
            for id in brokers {
                if self.ask_to_produce(*id, group, value).await == v1::PartitionError::None {
                    return Some(*id);
                }
            }
            None
        };
        wait_for(&what, take).await
    }

    /// How the broker answers one record with acks=all.
    pub async fn ask_to_produce(&self, id: i32, group: u64, value: &str) -> v1::PartitionError {
        let limit = Duration::from_secs(2);
        self.ask_to_produce_within(limit, id, group, value).await
    }

    pub async fn ask_to_produce_within(
        &self,
        limit: Duration,
        id: i32,
        group: u64,
        value: &str,
    ) -> v1::PartitionError {
        let request = v1::ProduceRequest {
            request_id: 1,
            acks: -1,
            timeout_ms: limit.as_millis() as u32,
            partitions: vec![v1::PartitionProduce {
                raft_group_id: group,
                records: test_batches::value(value).into(),
            }],
            traceparent: String::new(),
        };
        let mut client = self.client(id).await;
        let responses = client.produce(left_open(request)).await;
        match responses.unwrap().into_inner().next().await {
            Some(Ok(response)) => response.partitions[0].error(),
            _ => v1::PartitionError::TimedOut,
        }
    }

    /// The partition from its first record on, as the broker has it; waits for it for so long.
    pub async fn fetch(&self, id: i32, group: u64, wait: Duration) -> v1::PartitionFetchResult {
        let start = v1::FetchStart {
            max_wait_ms: wait.as_millis() as u32,
            min_bytes: 1,
            max_bytes: 10_000_000,
            read_committed: false,
            partitions: vec![v1::PartitionFetch {
                raft_group_id: group,
                fetch_offset: 0,
                max_bytes: 10_000_000,
                current_leader_epoch: -1,
                last_fetched_epoch: -1,
            }],
            traceparent: String::new(),
        };
        let request = v1::FetchRequest {
            request_id: 1,
            kind: Some(v1::fetch_request::Kind::Start(start)),
        };
        let mut client = self.client(id).await;
        let responses = client.fetch(left_open(request)).await;
        let response = responses.unwrap().into_inner().next().await;
        response.unwrap().unwrap().partitions.remove(0)
    }

    /// Everything committed in the partition, as its leader has it.
    pub async fn read(&self, id: i32, group: u64, at_least: usize) -> Vec<String> {
        let partition = self.fetch(id, group, Duration::from_secs(2)).await;
        assert_eq!(
            partition.error(),
            v1::PartitionError::None,
            "{}",
            partition.error_message
        );
        let values = values(&partition.records.concat());
        assert!(values.len() >= at_least, "{values:?}");
        values
    }

    async fn list_offset(
        &self,
        id: i32,
        group: u64,
        timestamp: i64,
    ) -> v1::PartitionListOffsetsResult {
        let asked = v1::PartitionListOffsets {
            raft_group_id: group,
            current_leader_epoch: -1,
            timestamp,
        };
        let request = v1::ListOffsetsRequest {
            read_committed: false,
            partitions: vec![asked],
        };
        let mut client = self.client(id).await;
        let response = client.list_offsets(request).await.unwrap().into_inner();
        response.partitions.into_iter().next().unwrap()
    }

    /// The partition's first offset, as its leader says.
    pub async fn earliest(&self, id: i32, group: u64) -> Option<i64> {
        let found = self.list_offset(id, group, -2).await;
        (found.error() == v1::PartitionError::None).then_some(found.offset)
    }

    pub async fn replica_exists(&self, id: i32, group: u64) -> bool {
        let found = self.list_offset(id, group, -1).await;
        found.error() != v1::PartitionError::UnknownPartition
    }
}

/// The values of single-record batches made by `test_batches::value`.
pub fn values(mut bytes: &[u8]) -> Vec<String> {
    let mut values = Vec::new();
    while bytes.len() >= 12 {
        let length = 12 + i32::from_be_bytes(bytes[8..12].try_into().unwrap()) as usize;
        // Header, then length, attributes, timestamp, offset, key and value length: one byte each.
        let record = &bytes[61..length];
        values.push(String::from_utf8(record[6..record.len() - 1].to_vec()).unwrap());
        bytes = &bytes[length..];
    }
    values
}
