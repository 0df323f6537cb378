//! Settings of consumer groups. Names and defaults are Apache Kafka's broker settings
//! (`group.*`, `offset*`), so that its documentation applies.

use std::time::Duration;

use serde::{Deserialize, Serialize};

/// The `consumer-groups` table of the broker's configuration.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields, default)]
pub struct GroupConfig {
    /// How long an empty group waits for more members before its first rebalance
    /// (`group.initial.rebalance.delay.ms`).
    pub initial_rebalance_delay_ms: u64,
    /// Smallest session timeout that a member may ask for (`group.min.session.timeout.ms`).
    pub session_timeout_min_ms: u64,
    /// Largest session timeout that a member may ask for (`group.max.session.timeout.ms`).
    pub session_timeout_max_ms: u64,
    /// Most members of one group (`group.max.size`). Kafka's default sets no bound.
    pub members_max: usize,
    /// Largest sum of the subscriptions, or of the assignments, of one group, in bytes. A group is
    /// one record, so this must stay below `max.message.bytes` of `__consumer_offsets`.
    pub group_size_max_bytes: usize,
    /// Longest metadata of one committed offset, in bytes (`offset.metadata.max.bytes`).
    pub offset_metadata_max_bytes: usize,
    /// How long offsets are kept after the group became empty, or after the commit where no
    /// member ever joined the group (`offsets.retention.minutes`, in seconds here).
    pub offsets_retention_seconds: u64,
    /// How often expired offsets are looked for (`offsets.retention.check.interval.ms`).
    pub offsets_retention_check_interval_ms: u64,
    /// How long a write to the log may take before its outcome is told as unknown
    /// (`offsets.commit.timeout.ms`).
    pub write_timeout_ms: u64,
    /// Most bytes of offset commits that wait for the log, per partition; above it commits are
    /// refused.
    pub write_queue_max_bytes: usize,
}

impl Default for GroupConfig {
    fn default() -> Self {
        Self {
            initial_rebalance_delay_ms: 3_000,
            session_timeout_min_ms: 6_000,
            session_timeout_max_ms: 30 * 60 * 1_000,
            members_max: 10_000,
            group_size_max_bytes: 448 * 1024,
            offset_metadata_max_bytes: 4_096,
            offsets_retention_seconds: 7 * 24 * 60 * 60,
            offsets_retention_check_interval_ms: 10 * 60 * 1_000,
            write_timeout_ms: 5_000,
            write_queue_max_bytes: 16 * 1024 * 1024,
        }
    }
}

/// Why the settings contradict each other.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum InvalidGroupConfig {
    #[error("session-timeout-min-ms {min} is above session-timeout-max-ms {max}")]
    SessionTimeouts { min: u64, max: u64 },
    #[error("{0} must be above 0")]
    Zero(&'static str),
}

impl GroupConfig {
    /// Checks relations between settings.
    pub fn validate(&self) -> Result<(), InvalidGroupConfig> {
        if self.session_timeout_min_ms > self.session_timeout_max_ms {
            return Err(InvalidGroupConfig::SessionTimeouts {
                min: self.session_timeout_min_ms,
                max: self.session_timeout_max_ms,
            });
        }
        for (name, zero) in [
            ("members-max", self.members_max == 0),
            ("group-size-max-bytes", self.group_size_max_bytes == 0),
            ("write-timeout-ms", self.write_timeout_ms == 0),
            ("write-queue-max-bytes", self.write_queue_max_bytes == 0),
            (
                "offsets-retention-seconds",
                self.offsets_retention_seconds == 0,
            ),
            (
                "offsets-retention-check-interval-ms",
                self.offsets_retention_check_interval_ms == 0,
            ),
        ] {
            if zero {
                return Err(InvalidGroupConfig::Zero(name));
            }
        }
        Ok(())
    }

    pub fn initial_rebalance_delay(&self) -> Duration {
        Duration::from_millis(self.initial_rebalance_delay_ms)
    }

    pub fn write_timeout(&self) -> Duration {
        Duration::from_millis(self.write_timeout_ms)
    }

    pub fn offsets_retention_check_interval(&self) -> Duration {
        Duration::from_millis(self.offsets_retention_check_interval_ms)
    }

    pub fn offsets_retention_ms(&self) -> i64 {
        i64::try_from(self.offsets_retention_seconds.saturating_mul(1_000)).unwrap_or(i64::MAX)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn defaults_are_valid_and_contradictions_are_refused() {
        assert_eq!(GroupConfig::default().validate(), Ok(()));
        let crossed = GroupConfig {
            session_timeout_min_ms: u64::MAX,
            ..GroupConfig::default()
        };
        assert!(matches!(
            crossed.validate(),
            Err(InvalidGroupConfig::SessionTimeouts { .. })
        ));
        let nobody = GroupConfig {
            members_max: 0,
            ..GroupConfig::default()
        };
        assert_eq!(
            nobody.validate(),
            Err(InvalidGroupConfig::Zero("members-max"))
        );
    }
}
