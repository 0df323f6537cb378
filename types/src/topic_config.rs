//! Topic configs: the closed list of keys that Chronik knows, their defaults and their validation.
//! Names, defaults and ranges are Apache Kafka's, so that its tools and documentation apply.
//!
//! Invariant: a value that `validate` accepted parses again by the typed getters.

use std::collections::BTreeMap;

/// How a config value is written, and which values it may take.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ConfigKind {
    /// A 64-bit number in a closed range.
    Long {
        min: i64,
        max: i64,
    },
    /// A 32-bit number in a closed range.
    Int {
        min: i64,
        max: i64,
    },
    /// A decimal fraction in a closed range of thousandths.
    Double {
        min_thousandths: i64,
        max_thousandths: i64,
    },
    Boolean,
    /// A comma-separated list of the given words.
    List(&'static [&'static str]),
    /// Exactly one of the given words.
    OneOf(&'static [&'static str]),
}

/// One known key.
#[derive(Debug, Clone, Copy)]
pub struct ConfigKey {
    pub name: &'static str,
    pub default: &'static str,
    pub kind: ConfigKind,
    pub documentation: &'static str,
}

pub const MIN_INSYNC_REPLICAS: &str = "min.insync.replicas";
pub const MAX_MESSAGE_BYTES: &str = "max.message.bytes";
pub const MESSAGE_TIMESTAMP_TYPE: &str = "message.timestamp.type";
pub const CLEANUP_POLICY: &str = "cleanup.policy";
pub const COMPRESSION_TYPE: &str = "compression.type";
pub const RETENTION_MS: &str = "retention.ms";
pub const RETENTION_BYTES: &str = "retention.bytes";
pub const SEGMENT_BYTES: &str = "segment.bytes";
pub const SEGMENT_MS: &str = "segment.ms";
pub const DELETE_RETENTION_MS: &str = "delete.retention.ms";
pub const MIN_COMPACTION_LAG_MS: &str = "min.compaction.lag.ms";
pub const MAX_COMPACTION_LAG_MS: &str = "max.compaction.lag.ms";
pub const MIN_CLEANABLE_DIRTY_RATIO: &str = "min.cleanable.dirty.ratio";

/// Every known topic config, by name. Defaults follow Apache Kafka 4.
pub const TOPIC_CONFIGS: &[ConfigKey] = &[
    ConfigKey {
        name: CLEANUP_POLICY,
        default: "delete",
        kind: ConfigKind::List(&["delete", "compact"]),
        documentation: "What happens to old records: removed by age and size, or compacted by key",
    },
    ConfigKey {
        name: COMPRESSION_TYPE,
        default: "producer",
        kind: ConfigKind::OneOf(&["producer"]),
        documentation: "Batches are stored as the producer compressed them",
    },
    ConfigKey {
        name: DELETE_RETENTION_MS,
        default: "86400000",
        kind: ConfigKind::Long {
            min: 0,
            max: i64::MAX,
        },
        documentation: "How long, in milliseconds, a compacted topic keeps the mark of a deleted key",
    },
    ConfigKey {
        name: MAX_COMPACTION_LAG_MS,
        default: "9223372036854775807",
        kind: ConfigKind::Long {
            min: 1,
            max: i64::MAX,
        },
        documentation: "Age in milliseconds by which a record of a compacted topic is compacted",
    },
    ConfigKey {
        name: MAX_MESSAGE_BYTES,
        default: "1048588",
        kind: ConfigKind::Int {
            min: 0,
            max: i32::MAX as i64,
        },
        documentation: "Largest record batch accepted, in bytes",
    },
    ConfigKey {
        name: MESSAGE_TIMESTAMP_TYPE,
        default: "CreateTime",
        kind: ConfigKind::OneOf(&["CreateTime", "LogAppendTime"]),
        documentation: "Whether a record keeps its producer's timestamp or gets the broker's",
    },
    ConfigKey {
        name: MIN_CLEANABLE_DIRTY_RATIO,
        default: "0.5",
        kind: ConfigKind::Double {
            min_thousandths: 0,
            max_thousandths: 1000,
        },
        documentation: "Part of a compacted log that has to be new before it is compacted again",
    },
    ConfigKey {
        name: MIN_COMPACTION_LAG_MS,
        default: "0",
        kind: ConfigKind::Long {
            min: 0,
            max: i64::MAX,
        },
        documentation: "Milliseconds for which a record of a compacted topic is left as it is",
    },
    ConfigKey {
        name: MIN_INSYNC_REPLICAS,
        default: "1",
        kind: ConfigKind::Int { min: 1, max: 1000 },
        documentation: "In-sync replicas below which acks=all is refused",
    },
    ConfigKey {
        name: RETENTION_BYTES,
        default: "-1",
        kind: ConfigKind::Long {
            min: -1,
            max: i64::MAX,
        },
        documentation: "Size of a partition above which its oldest segments go; -1: no limit",
    },
    ConfigKey {
        name: RETENTION_MS,
        default: "604800000",
        kind: ConfigKind::Long {
            min: -1,
            max: i64::MAX,
        },
        documentation: "Age in milliseconds above which segments go; -1: no limit",
    },
    ConfigKey {
        name: SEGMENT_BYTES,
        default: "1073741824",
        kind: ConfigKind::Int {
            min: 1_048_576,
            max: i32::MAX as i64,
        },
        documentation: "Size in bytes at which a segment is sealed",
    },
    ConfigKey {
        name: SEGMENT_MS,
        default: "604800000",
        kind: ConfigKind::Long {
            min: 1,
            max: i64::MAX,
        },
        documentation: "Age in milliseconds at which a segment is sealed",
    },
];

/// Why a config was refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum InvalidConfig {
    #[error("unknown topic config '{0}'")]
    UnknownKey(String),
    #[error("invalid value '{value}' for '{name}': expected {expected}")]
    InvalidValue {
        name: &'static str,
        value: String,
        expected: String,
    },
}

/// The known key of that name.
pub fn key(name: &str) -> Option<&'static ConfigKey> {
    TOPIC_CONFIGS.iter().find(|key| key.name == name)
}

/// Checks one key and value.
pub fn validate(name: &str, value: &str) -> Result<(), InvalidConfig> {
    let key = key(name).ok_or_else(|| InvalidConfig::UnknownKey(name.to_owned()))?;
    let invalid = |expected: String| {
        Err(InvalidConfig::InvalidValue {
            name: key.name,
            value: value.to_owned(),
            expected,
        })
    };
    let in_range = |min: i64, max: i64| match value.trim().parse::<i64>() {
        Ok(number) if (min..=max).contains(&number) => Ok(()),
        _ => invalid(format!("a number from {min} to {max}")),
    };
    match key.kind {
        ConfigKind::Long { min, max } | ConfigKind::Int { min, max } => in_range(min, max),
        ConfigKind::Double {
            min_thousandths,
            max_thousandths,
        } => {
            let (min, max) = (
                min_thousandths as f64 / 1000.0,
                max_thousandths as f64 / 1000.0,
            );
            match value.trim().parse::<f64>() {
                Ok(number) if (min..=max).contains(&number) => Ok(()),
                _ => invalid(format!("a fraction from {min} to {max}")),
            }
        }
        ConfigKind::Boolean => match value.trim() {
            "true" | "false" => Ok(()),
            _ => invalid("true or false".to_owned()),
        },
        ConfigKind::List(words) => {
            let known = |word: &str| words.contains(&word.trim());
            if !value.is_empty() && value.split(',').all(known) {
                Ok(())
            } else {
                invalid(format!("a comma-separated list of {}", words.join(", ")))
            }
        }
        ConfigKind::OneOf(words) => {
            if words.contains(&value.trim()) {
                Ok(())
            } else {
                invalid(format!("one of {}", words.join(", ")))
            }
        }
    }
}

/// The value in force: the topic's own, or the default. Empty for an unknown key.
pub fn effective<'a>(configs: &'a BTreeMap<String, String>, name: &str) -> &'a str {
    match configs.get(name) {
        Some(value) => value.trim(),
        None => key(name).map_or("", |key| key.default),
    }
}

/// A numeric config in force. Falls back to the default where a stored value does not parse,
/// which `validate` rules out for values that came through the controller.
pub fn effective_number(configs: &BTreeMap<String, String>, name: &str) -> i64 {
    let default = || {
        key(name)
            .and_then(|key| key.default.parse().ok())
            .unwrap_or(0)
    };
    effective(configs, name)
        .parse()
        .unwrap_or_else(|_| default())
}

/// A fraction in force, in thousandths, rounded down; as `effective_number` otherwise.
pub fn effective_thousandths(configs: &BTreeMap<String, String>, name: &str) -> i64 {
    let parse = |value: &str| {
        let fraction: f64 = value.parse().ok()?;
        // A float is cast saturating, and what is not a number becomes 0.
        Some((fraction * 1000.0) as i64)
    };
    let default = || {
        key(name)
            .and_then(|key| parse(key.default))
            .unwrap_or_default()
    };
    parse(effective(configs, name)).unwrap_or_else(default)
}

/// Whether a topic's cleanup.policy has `word` (`delete` or `compact`).
pub fn has_cleanup(configs: &BTreeMap<String, String>, word: &str) -> bool {
    effective(configs, CLEANUP_POLICY)
        .split(',')
        .any(|policy| policy.trim() == word)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_default_is_valid() {
        for key in TOPIC_CONFIGS {
            assert_eq!(validate(key.name, key.default), Ok(()), "{}", key.name);
        }
    }

    #[test]
    fn policies_and_fractions_are_read() {
        let mut configs = BTreeMap::new();
        assert!(has_cleanup(&configs, "delete"));
        assert!(!has_cleanup(&configs, "compact"));
        assert_eq!(
            effective_thousandths(&configs, MIN_CLEANABLE_DIRTY_RATIO),
            500
        );
        configs.insert(CLEANUP_POLICY.to_owned(), "compact, delete".to_owned());
        configs.insert(MIN_CLEANABLE_DIRTY_RATIO.to_owned(), "0.01".to_owned());
        assert!(has_cleanup(&configs, "delete") && has_cleanup(&configs, "compact"));
        assert_eq!(
            effective_thousandths(&configs, MIN_CLEANABLE_DIRTY_RATIO),
            10
        );
    }

    #[test]
    fn values_out_of_range_and_unknown_keys_are_refused() {
        assert!(validate(MIN_INSYNC_REPLICAS, "0").is_err());
        assert!(validate(MIN_INSYNC_REPLICAS, "two").is_err());
        assert!(validate(CLEANUP_POLICY, "shred").is_err());
        assert_eq!(validate(CLEANUP_POLICY, "compact,delete"), Ok(()));
        assert_eq!(
            validate("no.such.key", "1"),
            Err(InvalidConfig::UnknownKey("no.such.key".to_owned()))
        );
    }
}
