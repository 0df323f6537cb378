//! The only mapping of the controller's errors to gRPC statuses.
//!
//! Invariant: UNAVAILABLE means that nothing was changed; a change that may have happened is
//! DEADLINE_EXCEEDED.

use std::error::Error;

use tonic::{Code, ConnectError, Status};

use crate::raft::ProposeError;

pub fn proposal(error: ProposeError) -> Status {
    match error {
        ProposeError::NotLeader => Status::unavailable(error.to_string()),
        ProposeError::UnknownOutcome | ProposeError::Stopped(_) => unknown_outcome(),
        ProposeError::Unencodable(_) => Status::internal(error.to_string()),
    }
}

pub fn unknown_outcome() -> Status {
    Status::deadline_exceeded("no answer in time; the outcome is unknown")
}

/// What a call to the leader ended with: its own status is passed on; a connection that broke
/// leaves the outcome open, unless it never came about.
pub fn forwarded(status: Status) -> Status {
    let mut source: Option<&(dyn Error + 'static)> = status.source();
    if source.is_none() {
        return match status.code() {
            // The transport says so of a request whose stream was cut.
            Code::Cancelled | Code::Unknown => unknown_outcome(),
            _ => status,
        };
    }
    while let Some(error) = source {
        if error.is::<ConnectError>() {
            return Status::unavailable("the leader cannot be reached");
        }
        source = error.source();
    }
    unknown_outcome()
}

pub fn invalid(error: impl ToString) -> Status {
    Status::invalid_argument(error.to_string())
}

/// The state machine answered something that the command cannot give: a defect of this program.
pub fn unexpected(what: &'static str) -> Status {
    tracing::error!(what, "unexpected answer of the state machine");
    Status::internal("unexpected answer of the state machine")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_certainly_changed_nothing_is_unavailable() {
        assert_eq!(proposal(ProposeError::NotLeader).code(), Code::Unavailable);
        assert_eq!(
            proposal(ProposeError::UnknownOutcome).code(),
            Code::DeadlineExceeded
        );
        let refused = ConnectError("connection refused".into());
        assert_eq!(
            forwarded(Status::from_error(Box::new(refused))).code(),
            Code::Unavailable
        );
        let reset = std::io::Error::from(std::io::ErrorKind::ConnectionReset);
        assert_eq!(
            forwarded(Status::from_error(Box::new(reset))).code(),
            Code::DeadlineExceeded
        );
        assert_eq!(
            forwarded(Status::already_exists("x")).code(),
            Code::AlreadyExists
        );
        assert_eq!(
            forwarded(Status::unavailable("x")).code(),
            Code::Unavailable
        );
    }
}
