//! What all handlers share, and what a handler knows about the request it answers.

use std::sync::Arc;
use std::time::Duration;

use chronik_proto::v1;
use chronik_telemetry::trace::Sampler;
use chronik_types::cluster_image::Endpoint;
use tokio::sync::Semaphore;
use tokio::time::timeout;
use tracing::{debug, info};

use crate::config::Config;
use crate::controller_client::ControllerClient;
use crate::error::{CallError, ErrorCode, admin_call_error, admin_error};
use crate::leader_router::LeaderRouter;
use crate::log_limit::LogLimit;
use crate::metadata_cache::{MetadataCache, Snapshot};
use crate::metrics::Metrics;
use crate::producer_ids::ProducerIds;

pub const OFFSETS_TOPIC: &str = "__consumer_offsets";
/// Topics created for clients at the same time.
const CREATIONS_MAX: usize = 16;
/// How long a client waits for a topic that is created on the way.
const CREATION_WAIT: Duration = Duration::from_secs(5);
/// The image follows what a controller answered within milliseconds; this is the bound.
const IMAGE_WAIT: Duration = Duration::from_secs(2);

/// One per process.
pub struct Services {
    pub config: Config,
    pub cache: Arc<MetadataCache>,
    pub router: Arc<LeaderRouter>,
    pub controllers: Arc<ControllerClient>,
    pub producer_ids: ProducerIds,
    pub sampler: Sampler,
    pub metrics: Arc<Metrics>,
    pub malformed_log: LogLimit,
    creations: Semaphore,
}

/// Where a request came from.
#[derive(Debug, Clone)]
pub struct Origin {
    /// The endpoint that the client connected to.
    pub endpoint: Endpoint,
    pub client_host: Arc<str>,
}

/// A request apart from its body.
#[derive(Clone)]
pub struct Context {
    pub services: Arc<Services>,
    pub origin: Arc<Origin>,
    pub client_id: String,
    pub version: i16,
    pub correlation_id: i32,
}

impl Services {
    pub fn new(
        config: Config,
        cache: Arc<MetadataCache>,
        router: Arc<LeaderRouter>,
        controllers: Arc<ControllerClient>,
        metrics: Arc<Metrics>,
    ) -> Self {
        let sampler = Sampler::new(config.telemetry.trace_sample_ratio);
        Self {
            config,
            cache,
            router,
            controllers,
            producer_ids: ProducerIds::new(),
            sampler,
            metrics,
            malformed_log: LogLimit::default(),
            creations: Semaphore::new(CREATIONS_MAX),
        }
    }

    /// Creates a topic that a client asked for by name, with the cluster's defaults, and waits
    /// until the image shows it.
    pub async fn auto_create(&self, name: &str) -> Result<Arc<Snapshot>, ErrorCode> {
        let topic = v1::NewTopic {
            name: name.to_owned(),
            partition_count: -1,
            replication_factor: -1,
            ..Default::default()
        };
        self.create(topic).await
    }

    /// Creates `__consumer_offsets` where it does not exist yet.
    pub async fn ensure_offsets_topic(&self) -> Result<Arc<Snapshot>, ErrorCode> {
        let snapshot = self.cache.load();
        if snapshot.image.topic_by_name(OFFSETS_TOPIC).is_some() {
            return Ok(snapshot);
        }
        let settings = &self.config.offsets_topic;
        // As Apache Kafka's offsets.topic.segment.bytes: only sealed segments are compacted.
        let configs = [
            ("cleanup.policy", "compact"),
            ("segment.bytes", "104857600"),
        ];
        let configs = configs.map(|(name, value)| (name.to_owned(), value.to_owned()));
        let topic = v1::NewTopic {
            name: OFFSETS_TOPIC.to_owned(),
            partition_count: settings.partitions,
            replication_factor: settings.replication_factor,
            configs: configs.into(),
            ..Default::default()
        };
        self.create(topic).await
    }

    /// Waits, within bounds, until the image shows what a controller has answered already.
    pub async fn wait_for_image(&self, condition: impl Fn(&Snapshot) -> bool) {
        if timeout(IMAGE_WAIT, self.cache.wait_until(condition))
            .await
            .is_err()
        {
            debug!("the image does not show a change that a controller made");
        }
    }

    async fn create(&self, topic: v1::NewTopic) -> Result<Arc<Snapshot>, ErrorCode> {
        let name = topic.name.clone();
        let work = async {
            let _turn = self.creations.acquire().await;
            let snapshot = self.cache.load();
            if snapshot.image.topic_by_name(&name).is_some() {
                return Ok(snapshot);
            }
            self.create_by_controller(topic).await?;
            Ok(self
                .cache
                .wait_until(|s| s.image.topic_by_name(&name).is_some())
                .await)
        };
        timeout(CREATION_WAIT, work)
            .await
            .unwrap_or(Err(ErrorCode::LeaderNotAvailable))
    }

    async fn create_by_controller(&self, topic: v1::NewTopic) -> Result<(), ErrorCode> {
        let name = topic.name.clone();
        let timeout_ms = u32::try_from(CREATION_WAIT.as_millis()).unwrap_or(u32::MAX);
        let request = v1::CreateTopicsRequest {
            topics: vec![topic],
            timeout_ms,
            validate_only: false,
        };
        let answer = match self.controllers.create_topics(request).await {
            Ok(answer) => answer,
            // Whether or not it was created, the client asks again.
            Err(CallError::Unreachable(_) | CallError::UnknownOutcome(_)) => {
                return Err(ErrorCode::LeaderNotAvailable);
            }
            Err(error @ CallError::Refused(_)) => return Err(admin_call_error(&error)),
        };
        let Some(created) = answer.topics.first() else {
            return Err(ErrorCode::UnknownServerError);
        };
        match created.error() {
            v1::AdminError::None => info!(topic = name, "created a topic that a client asked for"),
            // Somebody else was faster, or leaders are still being elected.
            v1::AdminError::TopicAlreadyExists | v1::AdminError::TimedOut => {}
            error => {
                debug!(
                    topic = name,
                    error = created.error_message,
                    "topic is not created"
                );
                return Err(admin_error(error));
            }
        }
        Ok(())
    }
}
