//! The gRPC service for what Kafka clients and REST ask for: thin over `admin`.

use std::pin::Pin;
use std::time::Duration;

use chronik_proto::v1::admin_client::AdminClient;
use chronik_proto::v1::admin_server::Admin;
use chronik_proto::{MESSAGE_SIZE_MAX, v1};
use chronik_telemetry::rpc::server_span;
use tonic::{Request, Response, Status};

use crate::admin;
use crate::controller::{Controller, Route};

#[derive(Clone)]
pub struct AdminRpc {
    controller: Controller,
}

impl AdminRpc {
    pub fn new(controller: Controller) -> Self {
        Self { controller }
    }
}

type Answer<'b, T> = Pin<Box<dyn Future<Output = Result<Response<T>, Status>> + Send + 'b>>;

/// The handler of one call: here where this controller leads, else at the leader.
macro_rules! decided_by_leader {
    ($name:ident, $here:path, $request:ty, $response:ty, $span:literal, $timeout:expr) => {
        // What `async_trait` would make of an `async fn`; it does not look into macros.
        fn $name<'a, 'b>(&'a self, mut request: Request<$request>) -> Answer<'b, $response>
        where
            'a: 'b,
            Self: 'b,
        {
            Box::pin(async move {
                let _span = server_span(&mut request, $span);
                let timeout: fn(&$request) -> u32 = $timeout;
                let extra = Duration::from_millis(u64::from(timeout(request.get_ref())));
                match self.controller.route(&request, extra).await? {
                    Route::Local => {
                        let response = $here(&self.controller, request.into_inner()).await?;
                        Ok(self.controller.respond(response))
                    }
                    Route::Remote(remote) => {
                        remote
                            .call(request, |channel, request| async move {
                                AdminClient::new(channel)
                                    .max_encoding_message_size(MESSAGE_SIZE_MAX)
                                    .max_decoding_message_size(MESSAGE_SIZE_MAX)
                                    .$name(request)
                                    .await
                            })
                            .await
                    }
                }
            })
        }
    };
}

#[tonic::async_trait]
impl Admin for AdminRpc {
    decided_by_leader!(
        create_topics,
        admin::create_topics,
        v1::CreateTopicsRequest,
        v1::CreateTopicsResponse,
        "controller.create_topics",
        |request| request.timeout_ms
    );
    decided_by_leader!(
        delete_topics,
        admin::delete_topics,
        v1::DeleteTopicsRequest,
        v1::TopicResults,
        "controller.delete_topics",
        |request| request.timeout_ms
    );
    decided_by_leader!(
        create_partitions,
        admin::create_partitions,
        v1::CreatePartitionsRequest,
        v1::TopicResults,
        "controller.create_partitions",
        |request| request.timeout_ms
    );
    decided_by_leader!(
        alter_topic_configs,
        admin::alter_topic_configs,
        v1::AlterTopicConfigsRequest,
        v1::TopicResults,
        "controller.alter_topic_configs",
        |_| 0
    );
    decided_by_leader!(
        allocate_producer_ids,
        admin::allocate_producer_ids,
        v1::AllocateProducerIdsRequest,
        v1::AllocateProducerIdsResponse,
        "controller.allocate_producer_ids",
        |_| 0
    );
    decided_by_leader!(
        alter_reassignments,
        admin::alter_reassignments,
        v1::AlterReassignmentsRequest,
        v1::PartitionResults,
        "controller.alter_reassignments",
        |_| 0
    );
    decided_by_leader!(
        list_reassignments,
        admin::list_reassignments,
        v1::ListReassignmentsRequest,
        v1::ListReassignmentsResponse,
        "controller.list_reassignments",
        |_| 0
    );
    decided_by_leader!(
        elect_leaders,
        admin::elect_leaders,
        v1::ElectLeadersRequest,
        v1::PartitionResults,
        "controller.elect_leaders",
        |request| request.timeout_ms
    );
    decided_by_leader!(
        set_broker_drain,
        admin::set_broker_drain,
        v1::SetBrokerDrainRequest,
        v1::BrokerResult,
        "controller.set_broker_drain",
        |_| 0
    );
    decided_by_leader!(
        unregister_broker,
        admin::unregister_broker,
        v1::UnregisterBrokerRequest,
        v1::BrokerResult,
        "controller.unregister_broker",
        |_| 0
    );
    decided_by_leader!(
        alter_cluster_settings,
        admin::alter_cluster_settings,
        v1::AlterClusterSettingsRequest,
        v1::ClusterSettings,
        "controller.alter_cluster_settings",
        |_| 0
    );
}
