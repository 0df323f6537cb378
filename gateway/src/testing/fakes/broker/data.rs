//! A fake broker's `Data` service: produce as its mode says, fetch from the records it was given.

use std::collections::BTreeMap;
use std::time::Duration;

use chronik_proto::v1::{self, PartitionError};
use futures::StreamExt;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Streaming};

use super::{BrokerService, ProduceMode};
use crate::testing::fakes::{Answer, Outgoing};

impl BrokerService {
    fn produced(&self, request: &v1::ProduceRequest) -> v1::ProduceResponse {
        let (error, leader) = match &*self.state.mode.lock().unwrap() {
            ProduceMode::Refuse(error, leader) => (*error, *leader),
            _ => (PartitionError::None, None),
        };
        let partitions = request
            .partitions
            .iter()
            .map(|p| v1::PartitionProduceResult {
                raft_group_id: p.raft_group_id,
                error: error.into(),
                base_offset: request.request_id as i64,
                log_append_time_ms: -1,
                leader,
                ..Default::default()
            });
        v1::ProduceResponse {
            request_id: request.request_id,
            partitions: partitions.collect(),
        }
    }

    fn fetched(&self, request_id: u64, start: &v1::FetchStart) -> v1::FetchResponse {
        let records = self.state.records.lock().unwrap();
        let partitions = start.partitions.iter().map(|p| {
            let (error, leader) = self.leadership(p.raft_group_id);
            v1::PartitionFetchResult {
                raft_group_id: p.raft_group_id,
                error: error.into(),
                high_watermark: 10,
                last_stable_offset: 10,
                records: records.get(&p.raft_group_id).cloned().into_iter().collect(),
                leader,
                ..Default::default()
            }
        });
        v1::FetchResponse {
            request_id,
            partitions: partitions.collect(),
        }
    }

    /// The error of a partition that another broker leads, with that leader.
    fn leadership(&self, raft_group_id: u64) -> (PartitionError, Option<v1::Leader>) {
        match self.state.not_leader_of.lock().unwrap().get(&raft_group_id) {
            Some(leader) => (PartitionError::NotLeader, Some(*leader)),
            None => (PartitionError::None, None),
        }
    }
}

#[tonic::async_trait]
impl v1::data_server::Data for BrokerService {
    type ProduceStream = Outgoing<v1::ProduceResponse>;
    type FetchStream = Outgoing<v1::FetchResponse>;

    async fn produce(
        &self,
        request: Request<Streaming<v1::ProduceRequest>>,
    ) -> Answer<Self::ProduceStream> {
        let mut incoming = request.into_inner();
        let (sender, receiver) = mpsc::channel(16);
        let service = self.clone();
        tokio::spawn(async move {
            let mut held = Vec::new();
            while let Some(Ok(request)) = incoming.next().await {
                service.state.produced.lock().unwrap().push(request.clone());
                service.state.changed.notify_waiters();
                let mode = service.state.mode.lock().unwrap().clone();
                match mode {
                    _ if request.acks == 0 => {}
                    ProduceMode::Answer | ProduceMode::Refuse(..) => {
                        let _ = sender.send(Ok(service.produced(&request))).await;
                    }
                    ProduceMode::Reverse(count) => {
                        held.push(request);
                        if held.len() == count {
                            for request in held.drain(..).rev() {
                                let _ = sender.send(Ok(service.produced(&request))).await;
                            }
                        }
                    }
                    ProduceMode::Silent => {}
                    ProduceMode::Hold => {
                        let (service, sender) = (service.clone(), sender.clone());
                        tokio::spawn(async move {
                            service.state.released.cancelled().await;
                            let _ = sender.send(Ok(service.produced(&request))).await;
                        });
                    }
                    ProduceMode::Break => return,
                }
            }
        });
        Ok(Response::new(ReceiverStream::new(receiver).boxed()))
    }

    async fn fetch(
        &self,
        request: Request<Streaming<v1::FetchRequest>>,
    ) -> Answer<Self::FetchStream> {
        let mut incoming = request.into_inner();
        let (sender, receiver) = mpsc::channel(16);
        let service = self.clone();
        tokio::spawn(async move {
            let mut polls: BTreeMap<u64, CancellationToken> = BTreeMap::new();
            while let Some(Ok(request)) = incoming.next().await {
                let id = request.request_id;
                match request.kind.unwrap() {
                    v1::fetch_request::Kind::Finish(_) => {
                        *service.state.finished.lock().unwrap() += 1;
                        if let Some(poll) = polls.remove(&id) {
                            poll.cancel();
                        }
                    }
                    v1::fetch_request::Kind::Start(start) => {
                        service.state.fetches.lock().unwrap().push(start.clone());
                        let finish = CancellationToken::new();
                        polls.insert(id, finish.clone());
                        let (service, sender) = (service.clone(), sender.clone());
                        tokio::spawn(async move {
                            let answer = service.fetched(id, &start);
                            let news = |p: &v1::PartitionFetchResult| {
                                p.error() != PartitionError::None || !p.records.is_empty()
                            };
                            if !answer.partitions.iter().any(news) {
                                let wait = Duration::from_millis(u64::from(start.max_wait_ms));
                                let _ = tokio::time::timeout(wait, finish.cancelled()).await;
                            }
                            let _ = sender.send(Ok(answer)).await;
                        });
                    }
                }
            }
        });
        Ok(Response::new(ReceiverStream::new(receiver).boxed()))
    }

    async fn list_offsets(
        &self,
        request: Request<v1::ListOffsetsRequest>,
    ) -> Answer<v1::ListOffsetsResponse> {
        let partitions = request.into_inner().partitions.into_iter().map(|p| {
            let (error, leader) = self.leadership(p.raft_group_id);
            v1::PartitionListOffsetsResult {
                raft_group_id: p.raft_group_id,
                error: error.into(),
                offset: 100 + i64::from(self.broker_id),
                timestamp: -1,
                leader_epoch: 3,
                leader,
                ..Default::default()
            }
        });
        Ok(Response::new(v1::ListOffsetsResponse {
            partitions: partitions.collect(),
        }))
    }

    async fn offset_for_leader_epoch(
        &self,
        request: Request<v1::OffsetForLeaderEpochRequest>,
    ) -> Answer<v1::OffsetForLeaderEpochResponse> {
        let partitions =
            request
                .into_inner()
                .partitions
                .into_iter()
                .map(|p| v1::PartitionEpochEndOffset {
                    raft_group_id: p.raft_group_id,
                    end: Some(v1::EpochEndOffset {
                        leader_epoch: p.leader_epoch,
                        end_offset: 9,
                    }),
                    ..Default::default()
                });
        Ok(Response::new(v1::OffsetForLeaderEpochResponse {
            partitions: partitions.collect(),
        }))
    }

    async fn describe_logs(
        &self,
        _request: Request<v1::DescribeLogsRequest>,
    ) -> Answer<v1::DescribeLogsResponse> {
        Ok(Response::new(v1::DescribeLogsResponse {
            folder: "/data".to_owned(),
            total_bytes: 1000,
            available_bytes: 400,
            // The second is of no topic that the gateway knows of.
            logs: [11, 999]
                .map(|raft_group_id| v1::LogDescription {
                    raft_group_id,
                    size_bytes: 70,
                    offset_lag: 2,
                })
                .to_vec(),
        }))
    }

    /// Every log ends at offset 50.
    async fn delete_records(
        &self,
        request: Request<v1::DeleteRecordsRequest>,
    ) -> Answer<v1::DeleteRecordsResponse> {
        const END: i64 = 50;
        let partitions = request.into_inner().partitions.into_iter().map(|p| {
            let error = if p.before_offset > END {
                PartitionError::OffsetOutOfRange
            } else {
                PartitionError::None
            };
            v1::PartitionDeleteRecordsResult {
                raft_group_id: p.raft_group_id,
                error: error.into(),
                log_start_offset: if p.before_offset == -1 {
                    END
                } else {
                    p.before_offset
                },
                ..Default::default()
            }
        });
        Ok(Response::new(v1::DeleteRecordsResponse {
            partitions: partitions.collect(),
        }))
    }
}
