//! The only mapping of errors to HTTP: problem documents, RFC 9457.

use axum::Json;
use axum::body::Body;
use axum::extract::rejection::{JsonRejection, PathRejection, QueryRejection};
use axum::extract::{FromRequest, FromRequestParts, Path, Query, Request};
use axum::http::request::Parts;
use axum::http::{HeaderValue, StatusCode, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use chronik_proto::v1;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use tonic::Code;
use utoipa::ToSchema;

const CONTENT_TYPE: &str = "application/problem+json";
const TYPE_BASE: &str = "https://chronik.dev/problems/";

/// What went wrong, for people and for programs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Problem {
    /// Names the kind of problem; stable.
    #[serde(rename = "type")]
    pub kind: String,
    /// The kind of problem in words.
    pub title: String,
    /// The HTTP status.
    pub status: u16,
    /// What happened in this case.
    pub detail: String,
    /// The path of the request.
    pub instance: String,
}

impl Problem {
    fn new(status: StatusCode, kind: &str, title: &str, detail: impl Into<String>) -> Self {
        Self {
            kind: format!("{TYPE_BASE}{kind}"),
            title: title.to_owned(),
            status: status.as_u16(),
            detail: detail.into(),
            instance: String::new(),
        }
    }

    pub fn not_found(detail: impl Into<String>) -> Self {
        Self::new(StatusCode::NOT_FOUND, "not-found", "Not found", detail)
    }

    pub fn unknown_topic(name: &str) -> Self {
        let detail = format!("there is no topic '{name}'");
        Self::new(
            StatusCode::NOT_FOUND,
            "unknown-topic",
            "Unknown topic",
            detail,
        )
    }

    pub fn method_not_allowed(detail: impl Into<String>) -> Self {
        let status = StatusCode::METHOD_NOT_ALLOWED;
        Self::new(status, "method-not-allowed", "Method not allowed", detail)
    }

    pub fn malformed(status: StatusCode, detail: impl Into<String>) -> Self {
        Self::new(status, "malformed-request", "Malformed request", detail)
    }

    pub fn internal(detail: impl Into<String>) -> Self {
        let status = StatusCode::INTERNAL_SERVER_ERROR;
        Self::new(status, "internal-error", "Internal error", detail)
    }

    pub fn unavailable(detail: impl Into<String>) -> Self {
        let status = StatusCode::SERVICE_UNAVAILABLE;
        Self::new(status, "unavailable", "Unavailable", detail)
    }

    /// The problem of one result; None where there is none.
    pub fn of_result(error: v1::AdminError, detail: String) -> Option<Self> {
        use v1::AdminError as E;
        let (status, kind, title) = match error {
            E::None => return None,
            E::TopicAlreadyExists => (
                StatusCode::CONFLICT,
                "topic-already-exists",
                "Topic already exists",
            ),
            E::UnknownTopic => (StatusCode::NOT_FOUND, "unknown-topic", "Unknown topic"),
            E::InvalidTopicName => (
                StatusCode::BAD_REQUEST,
                "invalid-topic-name",
                "Invalid topic name",
            ),
            E::InvalidPartitions => (
                StatusCode::BAD_REQUEST,
                "invalid-partitions",
                "Invalid number of partitions",
            ),
            E::InvalidReplicationFactor => (
                StatusCode::BAD_REQUEST,
                "invalid-replication-factor",
                "Invalid replication factor",
            ),
            E::InvalidReplicaAssignment => (
                StatusCode::BAD_REQUEST,
                "invalid-replica-assignment",
                "Invalid replica assignment",
            ),
            E::InvalidConfig => (StatusCode::BAD_REQUEST, "invalid-config", "Invalid config"),
            E::TimedOut => (
                StatusCode::GATEWAY_TIMEOUT,
                "not-yet-in-effect",
                "Done, but not yet in effect",
            ),
            E::DuplicateInRequest => (
                StatusCode::BAD_REQUEST,
                "duplicate-in-request",
                "Named twice in one request",
            ),
            E::UnknownPartition
            | E::NoReassignmentInProgress
            | E::LeaderNotAvailable
            | E::PreferredLeaderNotAvailable
            | E::ElectionNotNeeded
            | E::UncleanElectionUnsupported
            | E::UnknownBroker
            | E::BrokerNeeded
            | E::Changed => of_placement(error),
        };
        Some(Self::new(status, kind, title, detail))
    }
}

/// Problems with where replicas and leaders are.
fn of_placement(error: v1::AdminError) -> (StatusCode, &'static str, &'static str) {
    use v1::AdminError as E;
    let conflict = |kind, title| (StatusCode::CONFLICT, kind, title);
    let not_found = |kind, title| (StatusCode::NOT_FOUND, kind, title);
    match error {
        E::UnknownPartition => not_found("unknown-partition", "Unknown partition"),
        E::UnknownBroker => not_found("unknown-broker", "Unknown broker"),
        E::NoReassignmentInProgress => {
            not_found("no-reassignment-in-progress", "No reassignment in progress")
        }
        E::LeaderNotAvailable => conflict("leader-not-available", "No leader"),
        E::PreferredLeaderNotAvailable => conflict(
            "preferred-leader-not-available",
            "Preferred leader not available",
        ),
        E::ElectionNotNeeded => conflict("election-not-needed", "Election not needed"),
        E::UncleanElectionUnsupported => (
            StatusCode::NOT_IMPLEMENTED,
            "unclean-election-unsupported",
            "There are no unclean elections",
        ),
        E::BrokerNeeded => conflict("broker-needed", "The broker is needed"),
        E::None
        | E::TopicAlreadyExists
        | E::UnknownTopic
        | E::InvalidTopicName
        | E::InvalidPartitions
        | E::InvalidReplicationFactor
        | E::InvalidReplicaAssignment
        | E::InvalidConfig
        | E::TimedOut
        | E::DuplicateInRequest
        | E::Changed => conflict("changed", "Changed by somebody else"),
    }
}

impl From<tonic::Status> for Problem {
    fn from(status: tonic::Status) -> Self {
        let detail = status.message().to_owned();
        let (http, kind, title) = match status.code() {
            Code::Unavailable => (
                StatusCode::SERVICE_UNAVAILABLE,
                "unavailable",
                "No leader; nothing was changed",
            ),
            Code::DeadlineExceeded | Code::Cancelled | Code::Unknown => (
                StatusCode::GATEWAY_TIMEOUT,
                "unknown-outcome",
                "The outcome is unknown",
            ),
            Code::InvalidArgument | Code::OutOfRange => (
                StatusCode::BAD_REQUEST,
                "invalid-request",
                "Invalid request",
            ),
            Code::NotFound => (StatusCode::NOT_FOUND, "not-found", "Not found"),
            Code::AlreadyExists | Code::Aborted | Code::FailedPrecondition => {
                (StatusCode::CONFLICT, "conflict", "Conflict")
            }
            Code::ResourceExhausted => (
                StatusCode::TOO_MANY_REQUESTS,
                "resource-exhausted",
                "A limit is reached",
            ),
            Code::PermissionDenied => (StatusCode::FORBIDDEN, "forbidden", "Forbidden"),
            Code::Unauthenticated => (
                StatusCode::UNAUTHORIZED,
                "unauthenticated",
                "Not authenticated",
            ),
            Code::Unimplemented => (StatusCode::NOT_IMPLEMENTED, "unimplemented", "Unknown here"),
            Code::Ok | Code::Internal | Code::DataLoss => (
                StatusCode::INTERNAL_SERVER_ERROR,
                "internal-error",
                "Internal error",
            ),
        };
        Self::new(http, kind, title, detail)
    }
}

impl IntoResponse for Problem {
    fn into_response(self) -> Response {
        let status = StatusCode::from_u16(self.status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        let mut response = (status, Json(&self)).into_response();
        let content_type = HeaderValue::from_static(CONTENT_TYPE);
        response
            .headers_mut()
            .insert(header::CONTENT_TYPE, content_type);
        // The request's path is put in by `name_instance`.
        response.extensions_mut().insert(self);
        response
    }
}

/// Puts the request's path into problem documents.
pub async fn name_instance(request: Request, next: Next) -> Response {
    let path = request.uri().path().to_owned();
    let mut response = next.run(request).await;
    let Some(mut problem) = response.extensions_mut().remove::<Problem>() else {
        return response;
    };
    problem.instance = path;
    if let Ok(json) = serde_json::to_vec(&problem) {
        response.headers_mut().remove(header::CONTENT_LENGTH);
        *response.body_mut() = Body::from(json);
    }
    response
}

/// `axum::Json`, with problem documents for what is malformed.
pub struct JsonBody<T>(pub T);

impl<S: Send + Sync, T: DeserializeOwned> FromRequest<S> for JsonBody<T> {
    type Rejection = Problem;

    async fn from_request(request: Request, state: &S) -> Result<Self, Problem> {
        let Json(body) = Json::from_request(request, state).await?;
        Ok(Self(body))
    }
}

/// `axum::extract::Path`, likewise.
pub struct PathOf<T>(pub T);

impl<S: Send + Sync, T: DeserializeOwned + Send> FromRequestParts<S> for PathOf<T> {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Problem> {
        let Path(path) = Path::from_request_parts(parts, state).await?;
        Ok(Self(path))
    }
}

/// `axum::extract::Query`, likewise.
pub struct QueryOf<T>(pub T);

impl<S: Send + Sync, T: DeserializeOwned + Send> FromRequestParts<S> for QueryOf<T> {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Problem> {
        let Query(query) = Query::from_request_parts(parts, state).await?;
        Ok(Self(query))
    }
}

impl From<QueryRejection> for Problem {
    fn from(rejection: QueryRejection) -> Self {
        Self::malformed(rejection.status(), rejection.body_text())
    }
}

impl From<JsonRejection> for Problem {
    fn from(rejection: JsonRejection) -> Self {
        Self::malformed(rejection.status(), rejection.body_text())
    }
}

impl From<PathRejection> for Problem {
    fn from(rejection: PathRejection) -> Self {
        Self::malformed(rejection.status(), rejection.body_text())
    }
}
