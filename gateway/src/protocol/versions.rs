//! The closed list of APIs that the gateway implements, with their version ranges.
//!
//! Invariant: what is advertised is implemented, over the whole range; the exception is
//! Produce 0 to 2, which is advertised because librdkafka looks for it before it compresses, and
//! answered with UNSUPPORTED_VERSION, as Apache Kafka 4 does.

use super::messages as m;

macro_rules! apis {
    ($($name:ident = $key:literal, $min:literal ..= $max:literal, flexible $flexible:literal;)*) => {
        /// An API of the Kafka protocol that the gateway answers.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        pub enum Api { $($name),* }

        impl Api {
            pub const ALL: &'static [Api] = &[$(Api::$name),*];

            pub fn from_key(key: i16) -> Option<Api> {
                match key { $($key => Some(Api::$name),)* _ => None }
            }

            pub const fn key(self) -> i16 {
                match self { $(Api::$name => $key),* }
            }

            pub const fn name(self) -> &'static str {
                match self { $(Api::$name => stringify!($name)),* }
            }

            /// Name of the span of a request.
            pub const fn span_name(self) -> &'static str {
                match self { $(Api::$name => concat!("kafka.", stringify!($name))),* }
            }

            /// Oldest and newest version, both included.
            pub const fn versions(self) -> (i16, i16) {
                match self { $(Api::$name => ($min, $max)),* }
            }

            /// Whether requests and responses of that version have tagged fields.
            pub const fn is_flexible(self, version: i16) -> bool {
                version >= match self { $(Api::$name => $flexible),* }
            }
        }
    };
}

apis! {
    Produce = 0, 0..=13, flexible 9;
    Fetch = 1, 4..=18, flexible 12;
    ListOffsets = 2, 1..=11, flexible 6;
    Metadata = 3, 0..=13, flexible 9;
    OffsetCommit = 8, 2..=10, flexible 8;
    OffsetFetch = 9, 1..=10, flexible 6;
    FindCoordinator = 10, 0..=6, flexible 3;
    JoinGroup = 11, 0..=9, flexible 6;
    Heartbeat = 12, 0..=4, flexible 4;
    LeaveGroup = 13, 0..=5, flexible 4;
    SyncGroup = 14, 0..=5, flexible 4;
    DescribeGroups = 15, 0..=6, flexible 5;
    ListGroups = 16, 0..=5, flexible 3;
    ApiVersions = 18, 0..=5, flexible 3;
    CreateTopics = 19, 2..=7, flexible 5;
    DeleteTopics = 20, 1..=6, flexible 4;
    DeleteRecords = 21, 0..=2, flexible 2;
    InitProducerId = 22, 0..=5, flexible 2;
    OffsetForLeaderEpoch = 23, 2..=4, flexible 4;
    DescribeConfigs = 32, 1..=4, flexible 4;
    DescribeLogDirs = 35, 1..=5, flexible 2;
    CreatePartitions = 37, 0..=3, flexible 2;
    ElectLeaders = 43, 0..=2, flexible 2;
    IncrementalAlterConfigs = 44, 0..=1, flexible 1;
    AlterPartitionReassignments = 45, 0..=1, flexible 0;
    ListPartitionReassignments = 46, 0..=0, flexible 0;
    DescribeCluster = 60, 0..=2, flexible 0;
    UnregisterBroker = 64, 0..=0, flexible 0;
}

impl Api {
    pub const fn supports(self, version: i16) -> bool {
        let (min, max) = self.versions();
        min <= version && version <= max
    }

    /// ApiVersions is answered with the old header in every version, so that a client that does
    /// not know the server yet can read it.
    pub const fn has_flexible_response_header(self, version: i16) -> bool {
        !matches!(self, Api::ApiVersions) && self.is_flexible(version)
    }
}

/// The table as ApiVersions tells it.
pub fn advertised() -> Vec<m::api_versions_response::ApiVersion> {
    Api::ALL
        .iter()
        .map(|api| {
            let (min_version, max_version) = api.versions();
            message!(m::api_versions_response::ApiVersion {
                api_key: api.key(),
                min_version: min_version,
                max_version: max_version,
            })
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use kafka_wire::API_DESCRIPTORS;

    use super::*;

    #[test]
    fn every_advertised_version_has_a_codec() {
        for api in Api::ALL {
            let descriptor = API_DESCRIPTORS
                .iter()
                .find(|descriptor| descriptor.api_key.value() == api.key())
                .unwrap();
            assert_eq!(descriptor.request.name, format!("{}Request", api.name()));
            let (min, max) = api.versions();
            let codec = descriptor.supported_versions;
            assert!(max <= codec.max().value(), "{}", api.name());
            assert!(
                min >= codec.min().value() || *api == Api::Produce,
                "{}",
                api.name()
            );
            for version in min..=max {
                let flexible = descriptor
                    .flexible_versions
                    .is_some_and(|range| version >= range.min().value());
                assert_eq!(
                    api.is_flexible(version),
                    flexible,
                    "{} {version}",
                    api.name()
                );
            }
        }
    }
}
