//! Draining and unregistering brokers, and the settings of the cluster.

use chronik_proto::v1;
use chronik_types::cluster_image::{ClusterImage, ClusterSettings, Drain, ReassignmentCause};
use chronik_types::id::BrokerId;
use tonic::Status;

use super::Refused;
use crate::command::{BrokerRefusal, Command, Outcome, ReassignmentChange};
use crate::controller::Controller;
use crate::rebalance::partitions;
use crate::rpc::error;

type E = v1::AdminError;

/// Partitions that may be moved at once, at most.
const PARALLEL_MAX: u32 = 100_000;

impl From<BrokerRefusal> for Refused {
    fn from(refusal: BrokerRefusal) -> Self {
        let error = match refusal {
            BrokerRefusal::Unknown(_) => E::UnknownBroker,
            BrokerRefusal::Active(_) | BrokerRefusal::HoldsReplicas { .. } => E::BrokerNeeded,
        };
        Self::new(error, refusal.to_string())
    }
}

/// Begins, changes or ends a drain. Its end takes back what the drain had asked for.
pub async fn set_broker_drain(
    controller: &Controller,
    request: v1::SetBrokerDrainRequest,
) -> Result<v1::BrokerResult, Status> {
    let broker_id = BrokerId(request.broker_id);
    let drain = Drain::from(request.drain());
    let image = controller.image();
    if let Err(refused) = can_spare(&image, broker_id, drain) {
        return Ok(broker_result(Err(refused)));
    }
    let command = Command::SetBrokerDrain { broker_id, drain };
    let result = propose(controller, command).await?;
    if result.is_ok() && drain != Drain::Replicas {
        take_back(controller, broker_id).await?;
    }
    if result.is_ok() {
        tracing::info!(
            broker_id = broker_id.0,
            ?drain,
            "the drain of a broker is set"
        );
    }
    Ok(broker_result(result))
}

pub async fn unregister_broker(
    controller: &Controller,
    request: v1::UnregisterBrokerRequest,
) -> Result<v1::BrokerResult, Status> {
    let broker_id = BrokerId(request.broker_id);
    let result = propose(controller, Command::UnregisterBroker { broker_id }).await?;
    if result.is_ok() {
        tracing::info!(broker_id = broker_id.0, "broker unregistered");
    }
    Ok(broker_result(result))
}

pub async fn alter_cluster_settings(
    controller: &Controller,
    request: v1::AlterClusterSettingsRequest,
) -> Result<v1::ClusterSettings, Status> {
    let mut settings: ClusterSettings = controller.image().settings.clone();
    if let Some(max) = request.reassignment_parallel_max {
        if !(1..=PARALLEL_MAX).contains(&max) {
            return Err(error::invalid(format!(
                "reassignment_parallel_max must be 1 to {PARALLEL_MAX}"
            )));
        }
        settings.reassignment_parallel_max = max;
    }
    if let Some(rate) = request.reassignment_bytes_per_second {
        settings.reassignment_bytes_per_second = (rate > 0).then_some(rate);
    }
    if let Some(enable) = request.leader_balance_enable {
        settings.leader_balance_enable = enable;
    }
    let command = Command::SetClusterSettings {
        settings: settings.clone(),
    };
    controller.propose(command).await.map_err(error::proposal)?;
    Ok((&settings).into())
}

/// Whether the others can take over what the broker is to give up.
fn can_spare(image: &ClusterImage, broker_id: BrokerId, drain: Drain) -> Result<(), Refused> {
    if !image.brokers.contains_key(&broker_id) {
        return Err(BrokerRefusal::Unknown(broker_id).into());
    }
    let others = image.brokers.values().filter(|broker| {
        let is_drained = match drain {
            Drain::None => false,
            Drain::Leaders => broker.drain != Drain::None,
            Drain::Replicas => broker.drain == Drain::Replicas,
        };
        broker.broker_id != broker_id && !broker.fenced && !is_drained
    });
    let left = others.count();
    let refused = |why: String| Err(Refused::new(E::BrokerNeeded, why));
    match drain {
        Drain::None => Ok(()),
        Drain::Leaders if left == 0 => refused("no other live broker is left to lead".to_owned()),
        Drain::Leaders => Ok(()),
        Drain::Replicas => {
            let held = image.topics.values().flat_map(|topic| {
                let touched = topic.partitions.iter();
                let touched = touched.filter(|p| p.replica_on(broker_id).is_some());
                touched.map(move |p| (topic, p.target_replicas().len()))
            });
            match held.max_by_key(|(_, count)| *count) {
                Some((topic, count)) if count > left => refused(format!(
                    "topic '{}' has {count} replicas per partition, and only {left} other live \
                     brokers would be left",
                    topic.name
                )),
                _ => Ok(()),
            }
        }
    }
}

/// Cancels the moves off the broker that its drain had asked for.
async fn take_back(controller: &Controller, broker_id: BrokerId) -> Result<(), Status> {
    let image = controller.image();
    let of_drain = partitions(&image).into_iter().filter(|(_, partition)| {
        let moving = partition.reassignment.as_deref();
        moving.is_some_and(|moving| {
            moving.cause == ReassignmentCause::Drain
                && moving.original.contains(&broker_id)
                && !moving.target.contains(&broker_id)
        })
    });
    let changes: Vec<_> = of_drain
        .map(|(topic_id, partition)| ReassignmentChange {
            topic_id,
            partition: partition.partition,
            target: None,
            cause: ReassignmentCause::Drain,
        })
        .collect();
    if !changes.is_empty() {
        let command = Command::AlterReassignments { changes };
        controller.propose(command).await.map_err(error::proposal)?;
    }
    Ok(())
}

async fn propose(controller: &Controller, command: Command) -> Result<Result<(), Refused>, Status> {
    match controller.propose(command).await.map_err(error::proposal)? {
        Outcome::Broker(result) => Ok(result.map_err(Refused::from)),
        _ => Err(error::unexpected("broker")),
    }
}

fn broker_result(result: Result<(), Refused>) -> v1::BrokerResult {
    match result {
        Ok(()) => v1::BrokerResult::default(),
        Err(refused) => v1::BrokerResult {
            error: refused.error.into(),
            error_message: refused.message,
        },
    }
}
