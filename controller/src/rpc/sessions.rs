//! Registration, heartbeats and reports of brokers and gateways.
//!
//! Invariant: a heartbeat touches the leader's memory only. What it is checked against is the
//! applied image.

use std::pin::Pin;
use std::time::Duration;

use chronik_proto::v1::sessions_client::SessionsClient;
use chronik_proto::v1::sessions_server::Sessions;
use chronik_proto::{MESSAGE_SIZE_MAX, uuid, v1};
use chronik_types::cluster_image::Gateway;
use chronik_types::epoch::{BrokerEpoch, LeaderEpoch, PartitionEpoch};
use chronik_types::id::{BrokerId, RaftGroupId};
use tonic::{Request, Response, Status};

use super::error;
use crate::command::{
    BrokerSession, Command, GatewaySession, HeldReplica, Outcome, PartitionReport, RegisterBroker,
    ReportOutcome, ReportPartitions,
};
use crate::controller::{Controller, Route, now};

const NAME_LENGTH_MAX: usize = 255;
const GATEWAY_ENDPOINTS_MAX: usize = 1000;
/// Brokers, and gateways, that may be registered.
const MEMBERS_MAX: usize = 10_000;
/// Reports that go into one command.
const REPORTS_PER_COMMAND: usize = 5000;

pub struct SessionsRpc {
    controller: Controller,
}

impl SessionsRpc {
    pub fn new(controller: Controller) -> Self {
        Self { controller }
    }

    async fn register_broker_here(
        &self,
        request: v1::RegisterBrokerRequest,
    ) -> Result<v1::RegisterBrokerResponse, Status> {
        let image = self.controller.image();
        if !request.cluster_id.is_empty() && request.cluster_id != image.cluster_id {
            return Err(Status::failed_precondition(format!(
                "the broker's data belongs to cluster {}, this is cluster {}",
                request.cluster_id, image.cluster_id
            )));
        }
        let broker_id = BrokerId(request.broker_id);
        if broker_id.0 < 0 {
            return Err(error::invalid(format!("broker id {broker_id} is below 0")));
        }
        if !image.brokers.contains_key(&broker_id) && image.brokers.len() >= MEMBERS_MAX {
            return Err(Status::resource_exhausted("too many brokers"));
        }
        check_length("rpc_address", &request.rpc_address)?;
        check_length("rack", request.rack.as_deref().unwrap_or("none"))?;
        // Only a state that is older than the brokers has to be told what they hold.
        let known = image.brokers.get(&broker_id);
        let is_older = known.is_some_and(|known| image.is_from_before_restore(known));
        let held = (request.names_held_replicas && is_older).then(|| {
            let replicas = request.held_replicas.iter();
            replicas
                .map(|held| HeldReplica {
                    raft_group_id: RaftGroupId(held.raft_group_id),
                    incarnation: held.incarnation,
                })
                .collect()
        });
        let command = Command::RegisterBroker(RegisterBroker {
            broker_id,
            incarnation_id: uuid("incarnation_id", &request.incarnation_id)
                .map_err(error::invalid)?,
            rpc_address: request.rpc_address,
            rack: request.rack.filter(|rack| !rack.is_empty()),
            storage_id: uuid("storage_id", &request.storage_id).map_err(error::invalid)?,
            held,
        });
        match self
            .controller
            .propose(command)
            .await
            .map_err(error::proposal)?
        {
            Outcome::BrokerRegistered(broker_epoch) => {
                let session = BrokerSession {
                    broker_id,
                    broker_epoch,
                };
                self.controller.liveness().renew_broker(session, now());
                tracing::info!(
                    broker_id = broker_id.0,
                    broker_epoch = broker_epoch.0,
                    "broker registered"
                );
                let config = self.controller.config();
                Ok(v1::RegisterBrokerResponse {
                    broker_epoch: broker_epoch.0,
                    session_timeout_ms: config.session_timeout_ms,
                    heartbeat_interval_ms: config.session_heartbeat_interval_ms,
                    cluster_id: self.controller.image().cluster_id.clone(),
                })
            }
            Outcome::BrokerIdInUse => Err(Status::already_exists(format!(
                "broker id {broker_id} is held by another process with another data folder"
            ))),
            _ => Err(error::unexpected("RegisterBroker")),
        }
    }

    async fn broker_heartbeat_here(
        &self,
        request: v1::BrokerHeartbeatRequest,
    ) -> Result<v1::BrokerHeartbeatResponse, Status> {
        self.controller.metrics().broker_heartbeat();
        let session = BrokerSession {
            broker_id: BrokerId(request.broker_id),
            broker_epoch: BrokerEpoch(request.broker_epoch),
        };
        let image = self.controller.image();
        let live = image
            .brokers
            .get(&session.broker_id)
            .is_some_and(|b| !b.fenced && b.broker_epoch == session.broker_epoch);
        if live && request.shutting_down {
            let command = Command::FenceBrokers {
                brokers: vec![session],
            };
            self.controller
                .propose(command)
                .await
                .map_err(error::proposal)?;
            self.controller.liveness().end_broker(session);
            tracing::info!(broker_id = session.broker_id.0, "broker shuts down: fenced");
            return Ok(v1::BrokerHeartbeatResponse { fenced: true });
        }
        if live {
            self.controller.liveness().renew_broker(session, now());
        }
        Ok(v1::BrokerHeartbeatResponse { fenced: !live })
    }

    async fn report_partitions_here(
        &self,
        request: v1::ReportPartitionsRequest,
    ) -> Result<v1::ReportPartitionsResponse, Status> {
        let session = BrokerSession {
            broker_id: BrokerId(request.broker_id),
            broker_epoch: BrokerEpoch(request.broker_epoch),
        };
        let mut response = v1::ReportPartitionsResponse::default();
        let image = self.controller.image();
        let current = image
            .brokers
            .get(&session.broker_id)
            .is_some_and(|b| !b.fenced && b.broker_epoch == session.broker_epoch);
        if current {
            let mut moves = self.controller.moves();
            moves.take(request.progress, now());
            moves.take_copies(session.broker_id, &request.copies, now());
        } else if request.reports.is_empty() {
            response.fenced = true;
        }
        for reports in request.reports.chunks(REPORTS_PER_COMMAND) {
            let command = Command::ReportPartitions(ReportPartitions {
                session,
                reports: reports.iter().map(report_from_wire).collect(),
            });
            let outcome = self
                .controller
                .propose(command)
                .await
                .map_err(error::proposal)?;
            match outcome {
                Outcome::Reported(outcomes) => {
                    let results = reports.iter().zip(outcomes).map(|(report, outcome)| {
                        v1::PartitionReportResult {
                            raft_group_id: report.raft_group_id,
                            outcome: outcome_to_wire(outcome).into(),
                        }
                    });
                    response.results.extend(results);
                }
                Outcome::Fenced => {
                    response.fenced = true;
                    return Ok(response);
                }
                _ => return Err(error::unexpected("ReportPartitions")),
            }
        }
        Ok(response)
    }

    async fn register_gateway_here(
        &self,
        request: v1::RegisterGatewayRequest,
    ) -> Result<v1::RegisterGatewayResponse, Status> {
        check_length("gateway_id", &request.gateway_id)?;
        check_length("rack", request.rack.as_deref().unwrap_or("none"))?;
        if request.endpoints.len() > GATEWAY_ENDPOINTS_MAX {
            return Err(error::invalid("too many endpoints"));
        }
        let image = self.controller.image();
        let known = image.gateways.contains_key(&request.gateway_id);
        if !known && image.gateways.len() >= MEMBERS_MAX {
            return Err(Status::resource_exhausted("too many gateways"));
        }
        let mut gateway = Gateway::try_from(v1::Gateway {
            gateway_id: request.gateway_id,
            incarnation_id: request.incarnation_id,
            rack: request.rack,
            endpoints: request.endpoints,
        })
        .map_err(error::invalid)?;
        gateway.rack = gateway.rack.filter(|rack| !rack.is_empty());
        for endpoint in &gateway.endpoints {
            check_length("endpoint host", &endpoint.host)?;
        }
        let session = GatewaySession {
            gateway_id: gateway.gateway_id.clone(),
            incarnation_id: gateway.incarnation_id,
        };
        let command = Command::RegisterGateway { gateway };
        self.controller
            .propose(command)
            .await
            .map_err(error::proposal)?;
        self.controller.liveness().renew_gateway(&session, now());
        tracing::info!(gateway_id = session.gateway_id, "gateway registered");
        let config = self.controller.config();
        Ok(v1::RegisterGatewayResponse {
            session_timeout_ms: config.session_timeout_ms,
            heartbeat_interval_ms: config.session_heartbeat_interval_ms,
            cluster_id: self.controller.image().cluster_id.clone(),
        })
    }

    async fn gateway_heartbeat_here(
        &self,
        request: v1::GatewayHeartbeatRequest,
    ) -> Result<v1::GatewayHeartbeatResponse, Status> {
        self.controller.metrics().gateway_heartbeat();
        let session = GatewaySession {
            incarnation_id: uuid("incarnation_id", &request.incarnation_id)
                .map_err(error::invalid)?,
            gateway_id: request.gateway_id,
        };
        let image = self.controller.image();
        let present = image.gateways.get(&session.gateway_id);
        let live = present.is_some_and(|g| g.incarnation_id == session.incarnation_id);
        if live && request.leaving {
            let command = Command::RemoveGateways {
                gateways: vec![session.clone()],
            };
            self.controller
                .propose(command)
                .await
                .map_err(error::proposal)?;
            self.controller.liveness().end_gateway(&session);
            tracing::info!(gateway_id = session.gateway_id, "gateway left");
            return Ok(v1::GatewayHeartbeatResponse { expired: true });
        }
        if live {
            self.controller.liveness().renew_gateway(&session, now());
        }
        Ok(v1::GatewayHeartbeatResponse { expired: !live })
    }
}

fn check_length(field: &'static str, text: &str) -> Result<(), Status> {
    if (1..=NAME_LENGTH_MAX).contains(&text.len()) {
        return Ok(());
    }
    Err(error::invalid(format!(
        "{field} must have 1 to {NAME_LENGTH_MAX} bytes"
    )))
}

fn report_from_wire(report: &v1::PartitionReport) -> PartitionReport {
    let caught_up = report
        .replicas
        .iter()
        .filter(|replica| replica.state() == v1::replica_progress::State::CaughtUp)
        .map(|replica| BrokerId(replica.broker_id))
        .collect();
    PartitionReport {
        raft_group_id: RaftGroupId(report.raft_group_id),
        leader_epoch: LeaderEpoch(report.leader_epoch),
        partition_epoch: PartitionEpoch(report.partition_epoch),
        caught_up,
        voters: report.voters.iter().map(|id| (*id).into()).collect(),
    }
}

fn outcome_to_wire(outcome: ReportOutcome) -> v1::partition_report_result::Outcome {
    use v1::partition_report_result::Outcome;
    match outcome {
        ReportOutcome::Accepted => Outcome::Accepted,
        ReportOutcome::StalePartitionEpoch => Outcome::StalePartitionEpoch,
        ReportOutcome::StaleLeaderEpoch => Outcome::StaleLeaderEpoch,
        ReportOutcome::UnknownPartition => Outcome::UnknownPartition,
    }
}

type Answer<'b, T> = Pin<Box<dyn Future<Output = Result<Response<T>, Status>> + Send + 'b>>;

/// The handler of one call: here where this controller leads, else at the leader.
macro_rules! decided_by_leader {
    ($name:ident, $here:ident, $request:ty, $response:ty) => {
        // What `async_trait` would make of an `async fn`; it does not look into macros.
        fn $name<'a, 'b>(&'a self, request: Request<$request>) -> Answer<'b, $response>
        where
            'a: 'b,
            Self: 'b,
        {
            Box::pin(async move {
                match self.controller.route(&request, Duration::ZERO).await? {
                    Route::Local => {
                        let response = self.$here(request.into_inner()).await?;
                        Ok(self.controller.respond(response))
                    }
                    Route::Remote(remote) => {
                        remote
                            .call(request, |channel, request| async move {
                                SessionsClient::new(channel)
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
impl Sessions for SessionsRpc {
    decided_by_leader!(
        register_broker,
        register_broker_here,
        v1::RegisterBrokerRequest,
        v1::RegisterBrokerResponse
    );
    decided_by_leader!(
        broker_heartbeat,
        broker_heartbeat_here,
        v1::BrokerHeartbeatRequest,
        v1::BrokerHeartbeatResponse
    );
    decided_by_leader!(
        report_partitions,
        report_partitions_here,
        v1::ReportPartitionsRequest,
        v1::ReportPartitionsResponse
    );
    decided_by_leader!(
        register_gateway,
        register_gateway_here,
        v1::RegisterGatewayRequest,
        v1::RegisterGatewayResponse
    );
    decided_by_leader!(
        gateway_heartbeat,
        gateway_heartbeat_here,
        v1::GatewayHeartbeatRequest,
        v1::GatewayHeartbeatResponse
    );
}
