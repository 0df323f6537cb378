//! DescribeConfigs, versions 1 to 4: topics from the image and the table of defaults, brokers with
//! what of Kafka's broker configs is true here.

use chronik_types::cluster_image::Topic;
use chronik_types::id::BrokerId;
use chronik_types::topic_config::{ConfigKey, ConfigKind, TOPIC_CONFIGS, effective};

use crate::error::ErrorCode;
use crate::metadata_cache::Snapshot;
use crate::protocol::messages as m;
use crate::protocol::messages::StrBytes;
use crate::protocol::messages::describe_configs_response::{
    DescribeConfigsResourceResult, DescribeConfigsResult, DescribeConfigsSynonym,
};
use crate::services::{Context, Services};

/// Resource types.
pub const TOPIC: i8 = 2;
pub const BROKER: i8 = 4;
/// Where a value comes from.
pub const TOPIC_SOURCE: i8 = 1;
pub const STATIC_BROKER_SOURCE: i8 = 4;
pub const DEFAULT_SOURCE: i8 = 5;
/// Types of values.
const BOOLEAN: i8 = 1;
const STRING: i8 = 2;
const INT: i8 = 3;
const LONG: i8 = 5;
const DOUBLE: i8 = 6;
const LIST: i8 = 7;

/// Kafka's broker-level names of topic configs.
const SYNONYMS: [(&str, &str); 13] = [
    ("cleanup.policy", "log.cleanup.policy"),
    ("compression.type", "compression.type"),
    ("delete.retention.ms", "log.cleaner.delete.retention.ms"),
    ("max.compaction.lag.ms", "log.cleaner.max.compaction.lag.ms"),
    ("max.message.bytes", "message.max.bytes"),
    ("message.timestamp.type", "log.message.timestamp.type"),
    (
        "min.cleanable.dirty.ratio",
        "log.cleaner.min.cleanable.ratio",
    ),
    ("min.compaction.lag.ms", "log.cleaner.min.compaction.lag.ms"),
    ("min.insync.replicas", "min.insync.replicas"),
    ("retention.bytes", "log.retention.bytes"),
    ("retention.ms", "log.retention.ms"),
    ("segment.bytes", "log.segment.bytes"),
    ("segment.ms", "log.roll.ms"),
];

pub async fn handle(
    context: Context,
    request: m::DescribeConfigsRequest,
) -> m::DescribeConfigsResponse {
    let snapshot = context.services.cache.load();
    let show = Show {
        synonyms: request.include_synonyms,
        documentation: request.include_documentation && context.version >= 3,
        types: context.version >= 3,
    };
    let results = request
        .resources
        .into_iter()
        .map(|resource| {
            let keys = resource.configuration_keys;
            let configs = match resource.resource_type {
                TOPIC => topic_configs(&snapshot, &resource.resource_name, &show),
                BROKER => {
                    broker_configs(&context.services, &snapshot, &resource.resource_name, &show)
                }
                _ => Err((
                    ErrorCode::InvalidRequest,
                    "this type of resource has no configs",
                )),
            };
            let mut result = message!(DescribeConfigsResult {
                resource_type: resource.resource_type,
                resource_name: resource.resource_name,
            });
            match configs {
                Ok(mut configs) => {
                    if let Some(keys) = keys {
                        configs.retain(|config| keys.contains(&config.name));
                    }
                    result.configs = configs;
                }
                Err((code, why)) => {
                    result.error_code = code.code();
                    result.error_message = Some(why.into());
                }
            }
            result
        })
        .collect();
    message!(m::DescribeConfigsResponse { results: results })
}

/// What of each config the client can and wants to see.
struct Show {
    synonyms: bool,
    documentation: bool,
    types: bool,
}

type Configs = Result<Vec<DescribeConfigsResourceResult>, (ErrorCode, &'static str)>;

fn topic_configs(snapshot: &Snapshot, name: &str, show: &Show) -> Configs {
    let topic = snapshot.image.topic_by_name(name).ok_or((
        ErrorCode::UnknownTopicOrPartition,
        "this topic does not exist",
    ))?;
    Ok(TOPIC_CONFIGS
        .iter()
        .map(|key| topic_config(topic, key, show))
        .collect())
}

fn topic_config(topic: &Topic, key: &ConfigKey, show: &Show) -> DescribeConfigsResourceResult {
    let own = topic.configs.get(key.name);
    let mut config = message!(DescribeConfigsResourceResult {
        name: key.name.into(),
        value: Some(effective(&topic.configs, key.name).into()),
        config_source: if own.is_some() {
            TOPIC_SOURCE
        } else {
            DEFAULT_SOURCE
        },
    });
    if show.types {
        config.config_type = type_of(key.kind);
    }
    if show.documentation {
        config.documentation = Some(key.documentation.into());
    }
    if show.synonyms {
        if let Some(value) = own {
            config.synonyms.push(synonym(key.name, value, TOPIC_SOURCE));
        }
        config
            .synonyms
            .push(synonym(broker_name(key.name), key.default, DEFAULT_SOURCE));
    }
    config
}

fn broker_name(topic_config: &'static str) -> &'static str {
    SYNONYMS
        .iter()
        .find(|(topic, _)| *topic == topic_config)
        .map_or(topic_config, |(_, b)| *b)
}

fn synonym(name: &str, value: &str, source: i8) -> DescribeConfigsSynonym {
    message!(DescribeConfigsSynonym {
        name: name.into(),
        value: Some(value.into()),
        source: source,
    })
}

fn type_of(kind: ConfigKind) -> i8 {
    match kind {
        ConfigKind::Long { .. } => LONG,
        ConfigKind::Int { .. } => INT,
        ConfigKind::Double { .. } => DOUBLE,
        ConfigKind::Boolean => BOOLEAN,
        ConfigKind::List(_) => LIST,
        ConfigKind::OneOf(_) => STRING,
    }
}

/// Configs of one broker. The empty name means the cluster-wide dynamic defaults: there are none.
fn broker_configs(services: &Services, snapshot: &Snapshot, name: &str, show: &Show) -> Configs {
    if name.is_empty() {
        return Ok(Vec::new());
    }
    let unknown = (ErrorCode::InvalidRequest, "this broker does not exist");
    let broker_id = name.parse().map(BrokerId).map_err(|_| unknown)?;
    let broker = snapshot.image.brokers.get(&broker_id).ok_or(unknown)?;
    let limits = &services.config.limits;
    let rack = broker.rack.clone().unwrap_or_default();
    let set = [
        ("broker.id", broker_id.to_string(), INT),
        ("node.id", broker_id.to_string(), INT),
        ("broker.rack", rack, STRING),
        (
            "auto.create.topics.enable",
            services.config.auto_create_topics_enable.to_string(),
            BOOLEAN,
        ),
        (
            "connections.max.idle.ms",
            limits.connections_max_idle_ms.to_string(),
            LONG,
        ),
        ("fetch.max.bytes", limits.fetch_max_bytes.to_string(), INT),
        ("max.connections", limits.max_connections.to_string(), INT),
        (
            "socket.request.max.bytes",
            limits.socket_request_max_bytes.to_string(),
            INT,
        ),
        ("delete.topic.enable", "true".to_owned(), BOOLEAN),
        (
            "unclean.leader.election.enable",
            "false".to_owned(),
            BOOLEAN,
        ),
    ];
    let set = set
        .into_iter()
        .map(|(name, value, kind)| broker_config(name, value, kind, STATIC_BROKER_SOURCE, show));
    let defaults = TOPIC_CONFIGS.iter().map(|key| {
        let value = key.default.to_owned();
        broker_config(
            broker_name(key.name),
            value,
            type_of(key.kind),
            DEFAULT_SOURCE,
            show,
        )
    });
    Ok(set.chain(defaults).collect())
}

fn broker_config(
    name: &str,
    value: String,
    kind: i8,
    source: i8,
    show: &Show,
) -> DescribeConfigsResourceResult {
    let mut config = message!(DescribeConfigsResourceResult {
        name: name.into(),
        read_only: true,
        config_source: source,
    });
    if show.types {
        config.config_type = kind;
    }
    if show.synonyms {
        config.synonyms.push(synonym(name, &value, source));
    }
    config.value = Some(StrBytes::from(value));
    config
}
