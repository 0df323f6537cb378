//! Answers of the controllers about topics, as the admin APIs pass them on.

use std::collections::HashMap;

use chronik_proto::v1;

use crate::error::{CallError, ErrorCode, admin_call_error, admin_error};
use crate::protocol::messages::StrBytes;

/// An error and what it says to people.
pub type Outcome = (ErrorCode, Option<StrBytes>);

/// The outcome for one topic of a request.
pub fn outcome(error: v1::AdminError, message: &str) -> Outcome {
    let code = admin_error(error);
    let message = (code.is_error() && !message.is_empty()).then(|| StrBytes::from(message));
    (code, message)
}

/// The outcome for every topic of a request that got no answer.
pub fn call_outcome(error: &CallError) -> Outcome {
    (
        admin_call_error(error),
        Some(StrBytes::from(error.to_string())),
    )
}

/// Outcomes by topic name.
pub fn by_name(answer: Result<v1::TopicResults, CallError>) -> impl FnMut(&str) -> Outcome {
    let mut results: Result<HashMap<String, v1::TopicResult>, CallError> = answer.map(|answer| {
        answer
            .topics
            .into_iter()
            .map(|topic| (topic.name.clone(), topic))
            .collect()
    });
    move |name| match &mut results {
        Ok(results) => match results.remove(name) {
            Some(result) => outcome(result.error(), &result.error_message),
            None => (
                ErrorCode::UnknownServerError,
                Some("the controller did not answer".into()),
            ),
        },
        Err(error) => call_outcome(error),
    }
}

/// A client's timeout on the wire to the controllers.
pub fn timeout_ms(millis: i32) -> u32 {
    u32::try_from(millis).unwrap_or(0)
}
