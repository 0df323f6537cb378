//! Conversions of the cluster image between wire and `chronik_types`.
//! Invariant: what was converted to the wire converts back to an equal value.

use std::sync::Arc;

use bytes::Bytes;
use chronik_types::cluster_image as image;
use chronik_types::epoch::{BrokerEpoch, LeaderEpoch, PartitionEpoch};
use chronik_types::id::{BrokerId, ControllerId, PartitionIndex, RaftGroupId, ReplicaId, TopicId};
use uuid::Uuid;

use crate::v1;

/// A message that another service sent and that makes no sense.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum InvalidMessage {
    #[error("{field} has {length} bytes, a UUID has 16")]
    InvalidUuid { field: &'static str, length: usize },
    #[error("{0} is missing")]
    Missing(&'static str),
    #[error("port {0} is out of range")]
    InvalidPort(u32),
}

/// A UUID from its 16 bytes.
pub fn uuid(field: &'static str, bytes: &[u8]) -> Result<Uuid, InvalidMessage> {
    Uuid::from_slice(bytes).map_err(|_| InvalidMessage::InvalidUuid {
        field,
        length: bytes.len(),
    })
}

/// A UUID as its 16 bytes.
pub fn uuid_bytes(uuid: Uuid) -> Bytes {
    Bytes::copy_from_slice(uuid.as_bytes())
}

impl From<ReplicaId> for v1::ReplicaId {
    fn from(id: ReplicaId) -> Self {
        Self {
            broker_id: id.broker_id.0,
            incarnation: id.incarnation,
        }
    }
}

impl From<v1::ReplicaId> for ReplicaId {
    fn from(id: v1::ReplicaId) -> Self {
        Self {
            broker_id: BrokerId(id.broker_id),
            incarnation: id.incarnation,
        }
    }
}

impl From<&image::Controller> for v1::Controller {
    fn from(controller: &image::Controller) -> Self {
        Self {
            controller_id: controller.controller_id.0,
            rpc_address: controller.rpc_address.clone(),
            rest_address: controller.rest_address.clone(),
        }
    }
}

impl From<v1::Controller> for image::Controller {
    fn from(controller: v1::Controller) -> Self {
        Self {
            controller_id: ControllerId(controller.controller_id),
            rpc_address: controller.rpc_address,
            rest_address: controller.rest_address,
        }
    }
}

impl From<&image::Broker> for v1::Broker {
    fn from(broker: &image::Broker) -> Self {
        Self {
            broker_id: broker.broker_id.0,
            incarnation_id: uuid_bytes(broker.incarnation_id),
            broker_epoch: broker.broker_epoch.0,
            rpc_address: broker.rpc_address.clone(),
            rack: broker.rack.clone(),
            fenced: broker.fenced,
            drain: v1::Drain::from(broker.drain).into(),
        }
    }
}

impl TryFrom<v1::Broker> for image::Broker {
    type Error = InvalidMessage;

    fn try_from(broker: v1::Broker) -> Result<Self, InvalidMessage> {
        Ok(Self {
            broker_id: BrokerId(broker.broker_id),
            incarnation_id: uuid("incarnation_id", &broker.incarnation_id)?,
            broker_epoch: BrokerEpoch(broker.broker_epoch),
            drain: broker.drain().into(),
            rpc_address: broker.rpc_address,
            rack: broker.rack,
            fenced: broker.fenced,
        })
    }
}

impl From<image::Drain> for v1::Drain {
    fn from(drain: image::Drain) -> Self {
        match drain {
            image::Drain::None => Self::None,
            image::Drain::Leaders => Self::Leaders,
            image::Drain::Replicas => Self::Replicas,
        }
    }
}

impl From<v1::Drain> for image::Drain {
    fn from(drain: v1::Drain) -> Self {
        match drain {
            v1::Drain::None => Self::None,
            v1::Drain::Leaders => Self::Leaders,
            v1::Drain::Replicas => Self::Replicas,
        }
    }
}

impl From<&image::ClusterSettings> for v1::ClusterSettings {
    fn from(settings: &image::ClusterSettings) -> Self {
        Self {
            reassignment_parallel_max: settings.reassignment_parallel_max,
            reassignment_bytes_per_second: settings.reassignment_bytes_per_second,
            leader_balance_enable: settings.leader_balance_enable,
        }
    }
}

impl From<v1::ClusterSettings> for image::ClusterSettings {
    fn from(settings: v1::ClusterSettings) -> Self {
        Self {
            reassignment_parallel_max: settings.reassignment_parallel_max,
            reassignment_bytes_per_second: settings.reassignment_bytes_per_second,
            leader_balance_enable: settings.leader_balance_enable,
        }
    }
}

impl From<&image::Reassignment> for v1::Reassignment {
    fn from(moving: &image::Reassignment) -> Self {
        use v1::reassignment::Cause;
        let cause = match moving.cause {
            image::ReassignmentCause::Request => Cause::Request,
            image::ReassignmentCause::Drain => Cause::Drain,
            image::ReassignmentCause::Balance => Cause::Balance,
        };
        Self {
            target: moving.target.iter().map(|id| id.0).collect(),
            original: moving.original.iter().map(|id| id.0).collect(),
            active: moving.active,
            cause: cause.into(),
        }
    }
}

impl From<v1::Reassignment> for image::Reassignment {
    fn from(moving: v1::Reassignment) -> Self {
        use v1::reassignment::Cause;
        let cause = match moving.cause() {
            Cause::Request => image::ReassignmentCause::Request,
            Cause::Drain => image::ReassignmentCause::Drain,
            Cause::Balance => image::ReassignmentCause::Balance,
        };
        Self {
            target: moving.target.into_iter().map(BrokerId).collect(),
            original: moving.original.into_iter().map(BrokerId).collect(),
            active: moving.active,
            cause,
        }
    }
}

impl From<&image::Endpoint> for v1::Endpoint {
    fn from(endpoint: &image::Endpoint) -> Self {
        Self {
            host: endpoint.host.clone(),
            port: u32::from(endpoint.port),
        }
    }
}

impl TryFrom<v1::Endpoint> for image::Endpoint {
    type Error = InvalidMessage;

    fn try_from(endpoint: v1::Endpoint) -> Result<Self, InvalidMessage> {
        let port =
            u16::try_from(endpoint.port).map_err(|_| InvalidMessage::InvalidPort(endpoint.port))?;
        Ok(Self {
            host: endpoint.host,
            port,
        })
    }
}

impl From<&image::Gateway> for v1::Gateway {
    fn from(gateway: &image::Gateway) -> Self {
        Self {
            gateway_id: gateway.gateway_id.clone(),
            incarnation_id: uuid_bytes(gateway.incarnation_id),
            rack: gateway.rack.clone(),
            endpoints: gateway.endpoints.iter().map(Into::into).collect(),
        }
    }
}

impl TryFrom<v1::Gateway> for image::Gateway {
    type Error = InvalidMessage;

    fn try_from(gateway: v1::Gateway) -> Result<Self, InvalidMessage> {
        Ok(Self {
            gateway_id: gateway.gateway_id,
            incarnation_id: uuid("incarnation_id", &gateway.incarnation_id)?,
            rack: gateway.rack,
            endpoints: try_all(gateway.endpoints)?,
        })
    }
}

impl From<&image::Partition> for v1::Partition {
    fn from(partition: &image::Partition) -> Self {
        Self {
            partition: partition.partition.0,
            raft_group_id: partition.raft_group_id.0,
            replicas: partition.replicas.iter().map(|id| (*id).into()).collect(),
            isr: partition.isr.iter().map(|id| id.0).collect(),
            leader: partition.leader.map(|id| id.0),
            leader_epoch: partition.leader_epoch.0,
            partition_epoch: partition.partition_epoch.0,
            reassignment: partition.reassignment.as_deref().map(Into::into),
            wanted_leader: partition.wanted_leader.map(|id| id.0),
        }
    }
}

impl From<v1::Partition> for image::Partition {
    fn from(partition: v1::Partition) -> Self {
        Self {
            partition: PartitionIndex(partition.partition),
            raft_group_id: RaftGroupId(partition.raft_group_id),
            replicas: partition.replicas.into_iter().map(Into::into).collect(),
            isr: partition.isr.into_iter().map(BrokerId).collect(),
            leader: partition.leader.map(BrokerId),
            leader_epoch: LeaderEpoch(partition.leader_epoch),
            partition_epoch: PartitionEpoch(partition.partition_epoch),
            reassignment: partition.reassignment.map(|moving| Box::new(moving.into())),
            wanted_leader: partition.wanted_leader.map(BrokerId),
        }
    }
}

impl From<&image::Topic> for v1::Topic {
    fn from(topic: &image::Topic) -> Self {
        Self {
            topic_id: uuid_bytes(topic.topic_id.0),
            name: topic.name.to_string(),
            configs: topic.configs.clone().into_iter().collect(),
            partitions: topic.partitions.iter().map(Into::into).collect(),
        }
    }
}

impl TryFrom<v1::Topic> for image::Topic {
    type Error = InvalidMessage;

    fn try_from(topic: v1::Topic) -> Result<Self, InvalidMessage> {
        Ok(Self {
            topic_id: TopicId(uuid("topic_id", &topic.topic_id)?),
            name: topic.name.into(),
            configs: topic.configs.into_iter().collect(),
            partitions: topic.partitions.into_iter().map(Into::into).collect(),
        })
    }
}

impl From<&image::ClusterImage> for v1::ClusterImage {
    fn from(image: &image::ClusterImage) -> Self {
        Self {
            cluster_id: image.cluster_id.clone(),
            revision: image.revision,
            controller_leader: image.controller_leader.map(|id| id.0),
            controllers: image.controllers.values().map(Into::into).collect(),
            brokers: image.brokers.values().map(Into::into).collect(),
            gateways: image.gateways.values().map(Into::into).collect(),
            topics: image
                .topics
                .values()
                .map(|topic| (&**topic).into())
                .collect(),
            settings: Some((&image.settings).into()),
            restores: image
                .restores
                .iter()
                .map(|restore| v1::Restore {
                    backup_revision: restore.backup_revision,
                    revision: restore.revision,
                })
                .collect(),
        }
    }
}

impl TryFrom<v1::ClusterImage> for image::ClusterImage {
    type Error = InvalidMessage;

    fn try_from(wire: v1::ClusterImage) -> Result<Self, InvalidMessage> {
        let mut image = image::ClusterImage {
            cluster_id: wire.cluster_id,
            revision: 0,
            controller_leader: None,
            restores: wire
                .restores
                .iter()
                .map(|restore| image::Restore {
                    backup_revision: restore.backup_revision,
                    revision: restore.revision,
                })
                .collect(),
            ..Default::default()
        };
        let topics: Vec<image::Topic> = try_all(wire.topics)?;
        image.apply(image::ImageChange {
            revision: wire.revision,
            controller_leader: Some(wire.controller_leader.map(ControllerId)),
            controllers: wire.controllers.into_iter().map(Into::into).collect(),
            brokers: try_all(wire.brokers)?,
            gateways: try_all(wire.gateways)?,
            topics: topics.into_iter().map(Arc::new).collect(),
            settings: wire.settings.map(Into::into),
            ..Default::default()
        });
        Ok(image)
    }
}

impl From<&image::ImageChange> for v1::ImageChange {
    fn from(change: &image::ImageChange) -> Self {
        Self {
            revision: change.revision,
            controller_leader: change
                .controller_leader
                .map(|leader| v1::ControllerLeaderChange {
                    controller_leader: leader.map(|id| id.0),
                }),
            controllers: change.controllers.iter().map(Into::into).collect(),
            brokers: change.brokers.iter().map(Into::into).collect(),
            removed_brokers: change.removed_brokers.iter().map(|id| id.0).collect(),
            gateways: change.gateways.iter().map(Into::into).collect(),
            removed_gateways: change.removed_gateways.clone(),
            topics: change
                .topics
                .iter()
                .map(|topic| (&**topic).into())
                .collect(),
            removed_topics: change
                .removed_topics
                .iter()
                .map(|id| uuid_bytes(id.0))
                .collect(),
            partitions: change
                .partitions
                .iter()
                .map(|(topic_id, partition)| v1::TopicPartitionChange {
                    topic_id: uuid_bytes(topic_id.0),
                    partition: Some(partition.into()),
                })
                .collect(),
            settings: change.settings.as_ref().map(Into::into),
        }
    }
}

impl TryFrom<v1::ImageChange> for image::ImageChange {
    type Error = InvalidMessage;

    fn try_from(wire: v1::ImageChange) -> Result<Self, InvalidMessage> {
        let topics: Vec<image::Topic> = try_all(wire.topics)?;
        let partition = |change: v1::TopicPartitionChange| {
            let topic_id = TopicId(uuid("topic_id", &change.topic_id)?);
            let partition = change
                .partition
                .ok_or(InvalidMessage::Missing("partition"))?;
            Ok((topic_id, partition.into()))
        };
        Ok(Self {
            revision: wire.revision,
            controller_leader: wire
                .controller_leader
                .map(|change| change.controller_leader.map(ControllerId)),
            controllers: wire.controllers.into_iter().map(Into::into).collect(),
            brokers: try_all(wire.brokers)?,
            removed_brokers: wire.removed_brokers.into_iter().map(BrokerId).collect(),
            gateways: try_all(wire.gateways)?,
            removed_gateways: wire.removed_gateways,
            topics: topics.into_iter().map(Arc::new).collect(),
            removed_topics: wire
                .removed_topics
                .iter()
                .map(|id| uuid("removed_topics", id).map(TopicId))
                .collect::<Result<_, _>>()?,
            partitions: wire
                .partitions
                .into_iter()
                .map(partition)
                .collect::<Result<_, _>>()?,
            settings: wire.settings.map(Into::into),
        })
    }
}

fn try_all<T, U>(items: Vec<T>) -> Result<Vec<U>, InvalidMessage>
where
    U: TryFrom<T, Error = InvalidMessage>,
{
    items.into_iter().map(U::try_from).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> image::ClusterImage {
        let mut image = image::ClusterImage {
            cluster_id: "c".to_owned(),
            restores: vec![image::Restore {
                backup_revision: 3,
                revision: 6,
            }],
            ..Default::default()
        };
        let partition = image::Partition {
            partition: PartitionIndex(0),
            raft_group_id: RaftGroupId(9),
            replicas: vec![ReplicaId {
                broker_id: BrokerId(1),
                incarnation: 4,
            }],
            isr: vec![BrokerId(1)],
            leader: Some(BrokerId(1)),
            leader_epoch: LeaderEpoch(3),
            partition_epoch: PartitionEpoch(5),
            reassignment: Some(Box::new(image::Reassignment {
                target: vec![BrokerId(2)],
                original: vec![BrokerId(1)],
                active: true,
                cause: image::ReassignmentCause::Drain,
            })),
            wanted_leader: Some(BrokerId(2)),
        };
        image.apply(image::ImageChange {
            revision: 7,
            controller_leader: Some(Some(ControllerId(2))),
            controllers: vec![image::Controller {
                controller_id: ControllerId(2),
                rpc_address: "a:1".to_owned(),
                rest_address: "a:2".to_owned(),
            }],
            brokers: vec![image::Broker {
                broker_id: BrokerId(1),
                incarnation_id: Uuid::from_u128(8),
                broker_epoch: BrokerEpoch(6),
                rpc_address: "b:1".to_owned(),
                rack: Some("r".to_owned()),
                fenced: true,
                drain: image::Drain::Replicas,
            }],
            gateways: vec![image::Gateway {
                gateway_id: "g".to_owned(),
                incarnation_id: Uuid::from_u128(9),
                rack: None,
                endpoints: vec![image::Endpoint {
                    host: "h".to_owned(),
                    port: 9092,
                }],
            }],
            topics: vec![Arc::new(image::Topic {
                topic_id: TopicId(Uuid::from_u128(1)),
                name: "t".into(),
                configs: [("retention.ms".to_owned(), "1".to_owned())].into(),
                partitions: vec![partition],
            })],
            settings: Some(image::ClusterSettings {
                reassignment_parallel_max: 3,
                reassignment_bytes_per_second: Some(4),
                leader_balance_enable: false,
            }),
            ..Default::default()
        });
        image
    }

    #[test]
    fn an_image_survives_the_wire() {
        let image = sample();
        assert_eq!(
            image::ClusterImage::try_from(v1::ClusterImage::from(&image)),
            Ok(image)
        );
    }

    #[test]
    fn a_change_survives_the_wire() {
        let image = sample();
        let topic = image.topic_by_name("t").unwrap();
        let change = image::ImageChange {
            revision: 8,
            controller_leader: Some(None),
            removed_brokers: vec![BrokerId(1)],
            removed_gateways: vec!["g".to_owned()],
            removed_topics: vec![TopicId(Uuid::from_u128(3))],
            topics: vec![topic.clone()],
            partitions: vec![(topic.topic_id, topic.partitions[0].clone())],
            settings: Some(image::ClusterSettings::default()),
            ..Default::default()
        };
        assert_eq!(
            image::ImageChange::try_from(v1::ImageChange::from(&change)),
            Ok(change)
        );
    }
}
