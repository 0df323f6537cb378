//! UnregisterBroker, version 0: for a broker that is stopped and holds nothing.

use chronik_proto::v1;

use super::topic_results::{call_outcome, outcome};
use crate::protocol::messages as m;
use crate::services::Context;

pub async fn handle(
    context: Context,
    request: m::UnregisterBrokerRequest,
) -> m::UnregisterBrokerResponse {
    let wire = v1::UnregisterBrokerRequest {
        broker_id: request.broker_id,
    };
    let answer = context.services.controllers.unregister_broker(wire).await;
    let (code, message) = match answer {
        Ok(answer) => outcome(answer.error(), &answer.error_message),
        Err(error) => call_outcome(&error),
    };
    message!(m::UnregisterBrokerResponse {
        error_code: code.code(),
        error_message: message,
    })
}
