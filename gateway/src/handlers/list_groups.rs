//! ListGroups, versions 0 to 5: the groups of the brokers that the client's endpoint stands for.

use chronik_proto::v1;
use chronik_types::id::BrokerId;
use futures::future::join_all;
use tokio::time::timeout;

use super::coordinator::CALL_TIMEOUT;
use crate::error::{ErrorCode, group_error};
use crate::protocol::messages as m;
use crate::protocol::messages::StrBytes;
use crate::protocol::messages::list_groups_response::ListedGroup;
use crate::services::{Context, Services};

/// All groups are of Kafka's classic type.
const TYPE: &str = "classic";

pub async fn handle(context: Context, request: m::ListGroupsRequest) -> m::ListGroupsResponse {
    let services = &context.services;
    let snapshot = services.cache.load();
    let mut brokers = snapshot.endpoints.brokers_at(&context.origin.endpoint);
    if brokers.is_empty() {
        // An endpoint that stands for no broker is one that clients only start from.
        brokers = snapshot.image.brokers.keys().copied().collect();
    }
    brokers.retain(|id| snapshot.image.is_live(*id));
    let answers = join_all(brokers.into_iter().map(|id| list(services, id))).await;
    let mut groups = Vec::new();
    let mut error = ErrorCode::None;
    for answer in answers {
        match answer {
            Ok(answer) => {
                if error == ErrorCode::None {
                    error = group_error(answer.error());
                }
                groups.extend(answer.groups.into_iter().filter(|g| is_wanted(g, &request)));
            }
            Err(code) => error = code,
        }
    }
    let groups = groups
        .into_iter()
        .map(|group| {
            message!(ListedGroup {
                group_id: group.consumer_group.into(),
                protocol_type: group.protocol_type.into(),
                group_state: group.state.into(),
                group_type: TYPE.into(),
            })
        })
        .collect();
    message!(m::ListGroupsResponse {
        error_code: error.code(),
        groups: groups
    })
}

async fn list(
    services: &Services,
    broker_id: BrokerId,
) -> Result<v1::ListGroupsResponse, ErrorCode> {
    let link = services
        .router
        .link(broker_id)
        .ok_or(ErrorCode::CoordinatorNotAvailable)?;
    let mut client = link.groups();
    match timeout(CALL_TIMEOUT, client.list_groups(v1::ListGroupsRequest {})).await {
        Ok(Ok(answer)) => Ok(answer.into_inner()),
        Ok(Err(_)) | Err(_) => Err(ErrorCode::CoordinatorNotAvailable),
    }
}

fn is_wanted(group: &v1::ListedGroup, request: &m::ListGroupsRequest) -> bool {
    let among = |filter: &[StrBytes], value: &str| {
        filter.is_empty()
            || filter
                .iter()
                .any(|wanted| wanted.eq_ignore_ascii_case(value))
    };
    among(&request.states_filter, &group.state) && among(&request.types_filter, TYPE)
}
