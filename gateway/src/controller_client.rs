//! The gateway's side of the controllers: the changes that Kafka clients ask for; beside it its
//! session and the image watch.
//!
//! Invariants: any controller may be asked, and one that does not answer is passed over; an outcome
//! that is not known is said to be so.

mod session;
mod watch_image;

use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use chronik_proto::v1::admin_client::AdminClient;
use chronik_proto::{MESSAGE_SIZE_MAX, v1};
use chronik_telemetry::rpc::carrying;
use tokio::time::{Instant, sleep, timeout_at};
use tonic::transport::Channel;
use tonic::{Code, Status};

use crate::error::CallError;
use crate::rpc_channel::{self, TracedChannel};

pub use session::hold_session;
pub use watch_image::{keep_image_on_disk, watch_image};

/// How long a change without a timeout of its own may take.
const ADMIN_WAIT: Duration = Duration::from_secs(10);
const BACKOFF_MIN: Duration = Duration::from_millis(50);
const BACKOFF_MAX: Duration = Duration::from_millis(1000);
/// A registration or heartbeat that takes longer is tried at another controller.
const SESSION_CALL_TIMEOUT: Duration = Duration::from_secs(2);
/// Asks controllers; shared by all handlers and by the tasks below.
#[derive(Debug)]
pub struct ControllerClient {
    channels: Vec<Channel>,
    /// The controller that answered last.
    preferred: AtomicUsize,
}

impl ControllerClient {
    /// `addresses` are `host:port`; nothing is connected yet.
    pub fn new(addresses: &[String]) -> Result<Self, tonic::transport::Error> {
        let channels = addresses
            .iter()
            .map(|address| rpc_channel::endpoint(address).map(|e| e.connect_lazy()))
            .collect::<Result<_, _>>()?;
        Ok(Self {
            channels,
            preferred: AtomicUsize::new(0),
        })
    }

    pub async fn create_topics(
        &self,
        request: v1::CreateTopicsRequest,
    ) -> Result<v1::CreateTopicsResponse, CallError> {
        let wait = admin_wait(request.timeout_ms);
        self.call(wait, |channel| {
            let request = request.clone();
            async move { AdminClient::new(channel).create_topics(request).await }
        })
        .await
    }

    pub async fn delete_topics(
        &self,
        request: v1::DeleteTopicsRequest,
    ) -> Result<v1::TopicResults, CallError> {
        let wait = admin_wait(request.timeout_ms);
        self.call(wait, |channel| {
            let request = request.clone();
            async move { AdminClient::new(channel).delete_topics(request).await }
        })
        .await
    }

    pub async fn create_partitions(
        &self,
        request: v1::CreatePartitionsRequest,
    ) -> Result<v1::TopicResults, CallError> {
        let wait = admin_wait(request.timeout_ms);
        self.call(wait, |channel| {
            let request = request.clone();
            async move { AdminClient::new(channel).create_partitions(request).await }
        })
        .await
    }

    pub async fn alter_topic_configs(
        &self,
        request: v1::AlterTopicConfigsRequest,
    ) -> Result<v1::TopicResults, CallError> {
        self.call(ADMIN_WAIT, |channel| {
            let request = request.clone();
            async move { AdminClient::new(channel).alter_topic_configs(request).await }
        })
        .await
    }

    pub async fn alter_reassignments(
        &self,
        request: v1::AlterReassignmentsRequest,
    ) -> Result<v1::PartitionResults, CallError> {
        self.call(ADMIN_WAIT, |channel| {
            let request = request.clone();
            async move { AdminClient::new(channel).alter_reassignments(request).await }
        })
        .await
    }

    pub async fn list_reassignments(
        &self,
        request: v1::ListReassignmentsRequest,
    ) -> Result<v1::ListReassignmentsResponse, CallError> {
        self.call(ADMIN_WAIT, |channel| {
            let request = request.clone();
            async move {
                AdminClient::new(channel)
                    .max_decoding_message_size(MESSAGE_SIZE_MAX)
                    .list_reassignments(request)
                    .await
            }
        })
        .await
    }

    pub async fn elect_leaders(
        &self,
        request: v1::ElectLeadersRequest,
    ) -> Result<v1::PartitionResults, CallError> {
        let wait = admin_wait(request.timeout_ms);
        self.call(wait, |channel| {
            let request = request.clone();
            async move { AdminClient::new(channel).elect_leaders(request).await }
        })
        .await
    }

    pub async fn unregister_broker(
        &self,
        request: v1::UnregisterBrokerRequest,
    ) -> Result<v1::BrokerResult, CallError> {
        self.call(ADMIN_WAIT, |channel| async move {
            AdminClient::new(channel).unregister_broker(request).await
        })
        .await
    }

    pub async fn allocate_producer_ids(
        &self,
        count: u32,
    ) -> Result<v1::AllocateProducerIdsResponse, CallError> {
        self.call(Duration::from_secs(5), |channel| async move {
            let request = v1::AllocateProducerIdsRequest { count };
            AdminClient::new(channel)
                .allocate_producer_ids(request)
                .await
        })
        .await
    }

    /// Asks one controller after the other until one decides or `wait` has passed.
    async fn call<A, F>(
        &self,
        wait: Duration,
        ask: impl Fn(TracedChannel) -> F,
    ) -> Result<A, CallError>
    where
        F: Future<Output = Result<tonic::Response<A>, Status>>,
    {
        let deadline = Instant::now() + wait;
        let mut backoff = BACKOFF_MIN;
        loop {
            for _ in 0..self.channels.len() {
                let Some((number, channel)) = self.controller() else {
                    break;
                };
                match timeout_at(deadline, ask(channel)).await {
                    Ok(Ok(answer)) => return Ok(answer.into_inner()),
                    Ok(Err(status)) if status.code() == Code::Unavailable => {
                        self.pass_over(number);
                    }
                    Ok(Err(status)) => return Err(call_error(&status)),
                    Err(_) => {
                        self.pass_over(number);
                        return Err(CallError::UnknownOutcome("no answer in time".to_owned()));
                    }
                }
            }
            if Instant::now() + backoff >= deadline {
                return Err(CallError::Unreachable("no controller with a quorum"));
            }
            sleep(backoff).await;
            backoff = backoff.saturating_mul(2).min(BACKOFF_MAX);
        }
    }

    fn controller(&self) -> Option<(usize, TracedChannel)> {
        let number = self.preferred.load(Ordering::Relaxed);
        self.channels
            .get(number)
            .map(|channel| (number, carrying(channel.clone())))
    }

    /// Moves on to the next controller, unless another call has done so already.
    fn pass_over(&self, number: usize) {
        let next = number.wrapping_add(1) % self.channels.len().max(1);
        let _ = self
            .preferred
            .compare_exchange(number, next, Ordering::Relaxed, Ordering::Relaxed);
    }
}

/// What a failed call to a broker or controller means.
pub fn call_error(status: &Status) -> CallError {
    match status.code() {
        Code::InvalidArgument
        | Code::FailedPrecondition
        | Code::NotFound
        | Code::AlreadyExists
        | Code::PermissionDenied
        | Code::Unauthenticated
        | Code::Unimplemented
        | Code::OutOfRange => CallError::Refused(status.message().to_owned()),
        Code::Ok
        | Code::Cancelled
        | Code::Unknown
        | Code::DeadlineExceeded
        | Code::ResourceExhausted
        | Code::Aborted
        | Code::Internal
        | Code::Unavailable
        | Code::DataLoss => CallError::UnknownOutcome(status.message().to_owned()),
    }
}

/// An administrator's timeout, with room for the answer to come back.
fn admin_wait(timeout_ms: u32) -> Duration {
    Duration::from_millis(u64::from(timeout_ms).min(300_000)) + Duration::from_secs(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refusals_are_certain_and_the_rest_is_unknown() {
        assert!(matches!(
            call_error(&Status::invalid_argument("x")),
            CallError::Refused(_)
        ));
        for status in [
            Status::deadline_exceeded("x"),
            Status::unknown("x"),
            Status::internal("x"),
        ] {
            assert!(matches!(call_error(&status), CallError::UnknownOutcome(_)));
        }
    }
}
