//! InitProducerId, versions 0 to 5, for idempotent producers. Transactional ids are refused:
//! transactions are not served yet.

use crate::error::{CallError, ErrorCode};
use crate::protocol::messages as m;
use crate::services::Context;

pub async fn handle(
    context: Context,
    request: m::InitProducerIdRequest,
) -> m::InitProducerIdResponse {
    if let Some(id) = &request.transactional_id {
        let code = if id.is_empty() {
            ErrorCode::InvalidRequest
        } else {
            ErrorCode::UnsupportedVersion
        };
        return failed(code);
    }
    let services = &context.services;
    match services.producer_ids.next(&services.controllers).await {
        Ok(producer_id) => {
            message!(m::InitProducerIdResponse {
                producer_id: producer_id,
                producer_epoch: 0
            })
        }
        // Producers retry this one; ids that were taken and not told are only lost.
        Err(CallError::Unreachable(_) | CallError::UnknownOutcome(_)) => {
            failed(ErrorCode::CoordinatorNotAvailable)
        }
        Err(CallError::Refused(_)) => failed(ErrorCode::UnknownServerError),
    }
}

fn failed(code: ErrorCode) -> m::InitProducerIdResponse {
    message!(m::InitProducerIdResponse {
        error_code: code.code(),
        producer_id: -1,
        producer_epoch: -1,
    })
}
