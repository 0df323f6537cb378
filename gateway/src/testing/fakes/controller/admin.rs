//! A fake controller's `Admin` service: topics are made, deleted and configured in its image; all
//! else gets an answer that follows from the request alone.

use std::sync::Arc;

use chronik_proto::v1;
use tonic::{Request, Response, Status};

use super::{ControllerService, add_topic};
use crate::testing::fakes::Answer;

#[tonic::async_trait]
impl v1::admin_server::Admin for ControllerService {
    async fn create_topics(
        &self,
        request: Request<v1::CreateTopicsRequest>,
    ) -> Answer<v1::CreateTopicsResponse> {
        let request = request.into_inner();
        let mut topics = Vec::new();
        for topic in request.topics {
            let mut created = v1::CreatedTopic {
                name: topic.name.clone(),
                partition_count: 2,
                replication_factor: 1,
                configs: topic.configs,
                ..Default::default()
            };
            if self.image.borrow().topic_by_name(&topic.name).is_some() {
                created.error = v1::AdminError::TopicAlreadyExists.into();
            } else if topic.name.contains(' ') {
                created.error = v1::AdminError::InvalidTopicName.into();
            } else if !request.validate_only {
                let (revision, leader) = {
                    let image = self.image.borrow();
                    (image.revision, image.brokers.keys().next().map(|id| id.0))
                };
                let leaders = [leader, leader];
                let id = add_topic(&self.image, &topic.name, 1000 * revision, &leaders);
                created.topic_id = chronik_proto::uuid_bytes(id);
            }
            topics.push(created);
        }
        Ok(Response::new(v1::CreateTopicsResponse { topics }))
    }

    async fn delete_topics(
        &self,
        request: Request<v1::DeleteTopicsRequest>,
    ) -> Answer<v1::TopicResults> {
        let mut topics = Vec::new();
        for topic in request.into_inner().topics {
            let known = self
                .image
                .borrow()
                .topic_by_name(&topic.name)
                .map(|t| t.topic_id);
            let error = match known {
                Some(id) => {
                    self.image.send_modify(|image| {
                        image.remove_topic(id);
                        image.revision += 1;
                    });
                    v1::AdminError::None
                }
                None => v1::AdminError::UnknownTopic,
            };
            topics.push(v1::TopicResult {
                name: topic.name,
                topic_id: topic.topic_id,
                error: error.into(),
                ..Default::default()
            });
        }
        Ok(Response::new(v1::TopicResults { topics }))
    }

    async fn create_partitions(
        &self,
        request: Request<v1::CreatePartitionsRequest>,
    ) -> Answer<v1::TopicResults> {
        let topics = request
            .into_inner()
            .topics
            .into_iter()
            .map(|topic| v1::TopicResult {
                name: topic.name,
                error: v1::AdminError::InvalidPartitions.into(),
                error_message: "too few".to_owned(),
                ..Default::default()
            });
        Ok(Response::new(v1::TopicResults {
            topics: topics.collect(),
        }))
    }

    async fn alter_topic_configs(
        &self,
        request: Request<v1::AlterTopicConfigsRequest>,
    ) -> Answer<v1::TopicResults> {
        let mut topics = Vec::new();
        for change in request.into_inner().topics {
            self.image.send_modify(|image| {
                let mut topic = image.topic_by_name(&change.name).unwrap().as_ref().clone();
                for change in &change.changes {
                    topic
                        .configs
                        .insert(change.name.clone(), change.value.clone());
                }
                image.put_topic(Arc::new(topic));
                image.revision += 1;
            });
            topics.push(v1::TopicResult {
                name: change.name,
                ..Default::default()
            });
        }
        Ok(Response::new(v1::TopicResults { topics }))
    }

    async fn allocate_producer_ids(
        &self,
        request: Request<v1::AllocateProducerIdsRequest>,
    ) -> Answer<v1::AllocateProducerIdsResponse> {
        let count = request.into_inner().count;
        Ok(Response::new(v1::AllocateProducerIdsResponse {
            first: 5000,
            count,
        }))
    }

    async fn alter_reassignments(
        &self,
        request: Request<v1::AlterReassignmentsRequest>,
    ) -> Answer<v1::PartitionResults> {
        let request = request.into_inner();
        let results = request.changes.into_iter().map(|change| {
            let error = match &change.target {
                None => v1::AdminError::NoReassignmentInProgress,
                Some(target) if request.keep_replication_factor && target.broker_ids.len() != 3 => {
                    v1::AdminError::InvalidReplicationFactor
                }
                Some(_) => v1::AdminError::None,
            };
            v1::PartitionResult {
                topic: change.topic,
                partition: change.partition,
                error: error.into(),
                error_message: "because".to_owned(),
            }
        });
        let partitions = results.collect();
        Ok(Response::new(v1::PartitionResults { partitions }))
    }

    async fn list_reassignments(
        &self,
        request: Request<v1::ListReassignmentsRequest>,
    ) -> Answer<v1::ListReassignmentsResponse> {
        let mut named = request.into_inner().partitions;
        if named.is_empty() {
            named = (0..2)
                .map(|partition| v1::PartitionRef {
                    topic: "t".to_owned(),
                    partition,
                })
                .collect();
        }
        let states = named.into_iter().map(|named| v1::ReassignmentState {
            topic: named.topic,
            partition: named.partition,
            replicas: vec![1, 2, 3],
            adding: vec![1],
            removing: vec![3],
            ..Default::default()
        });
        Ok(Response::new(v1::ListReassignmentsResponse {
            reassignments: states.collect(),
        }))
    }

    async fn elect_leaders(
        &self,
        request: Request<v1::ElectLeadersRequest>,
    ) -> Answer<v1::PartitionResults> {
        let request = request.into_inner();
        let results = request.partitions.into_iter().map(|named| {
            let error = match (request.unclean, named.partition) {
                (true, _) => v1::AdminError::UncleanElectionUnsupported,
                (false, 0) => v1::AdminError::None,
                (false, _) => v1::AdminError::ElectionNotNeeded,
            };
            v1::PartitionResult {
                topic: named.topic,
                partition: named.partition,
                error: error.into(),
                error_message: "because".to_owned(),
            }
        });
        let partitions = results.collect();
        Ok(Response::new(v1::PartitionResults { partitions }))
    }

    async fn set_broker_drain(
        &self,
        _: Request<v1::SetBrokerDrainRequest>,
    ) -> Answer<v1::BrokerResult> {
        Err(Status::unimplemented("no gateway asks for it"))
    }

    async fn unregister_broker(
        &self,
        request: Request<v1::UnregisterBrokerRequest>,
    ) -> Answer<v1::BrokerResult> {
        let error = match request.into_inner().broker_id {
            9 => v1::AdminError::UnknownBroker,
            _ => v1::AdminError::BrokerNeeded,
        };
        Ok(Response::new(v1::BrokerResult {
            error: error.into(),
            error_message: "because".to_owned(),
        }))
    }

    async fn alter_cluster_settings(
        &self,
        _: Request<v1::AlterClusterSettingsRequest>,
    ) -> Answer<v1::ClusterSettings> {
        Err(Status::unimplemented("no gateway asks for it"))
    }
}
