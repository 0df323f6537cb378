//! Command -> change of the state. Pure and deterministic: no clock, no randomness, no I/O.
//!
//! Invariant: applied to equal states, a command gives equal states, equal image changes and the
//! same answer. A command that changes nothing does not take a revision.

mod brokers;
mod reassignment;
mod reports;
mod restore;
mod topics;

pub use topics::collision_key;

#[cfg(test)]
mod tests;

use std::sync::Arc;

use chronik_types::cluster_image::ImageChange;

use crate::command::{BecomeLeader, Command, GatewaySession, Outcome};
use crate::state::State;

/// Applies one command. The change is already in the state's image.
pub fn apply(state: &mut State, command: Command) -> (Outcome, Option<ImageChange>) {
    let mut change = ImageChange {
        revision: state.next_revision(),
        ..Default::default()
    };
    let outcome = match command {
        Command::BecomeLeader(command) => become_leader(state, command, &mut change),
        Command::RegisterBroker(command) => brokers::register(state, command, &mut change),
        Command::FenceBrokers { brokers } => brokers::fence(state, &brokers, &mut change),
        Command::RegisterGateway { gateway } => {
            if state.image.gateways.get(&gateway.gateway_id) != Some(&gateway) {
                change.gateways.push(gateway);
            }
            Outcome::Done
        }
        Command::RemoveGateways { gateways } => remove_gateways(state, gateways, &mut change),
        Command::CreateTopics { topics } => topics::create(state, topics, &mut change),
        Command::DeleteTopics { topic_ids } => topics::delete(state, &topic_ids, &mut change),
        Command::CreatePartitions { topics } => {
            topics::create_partitions(state, topics, &mut change)
        }
        Command::SetTopicConfigs(command) => topics::set_configs(state, command, &mut change),
        Command::AllocateProducerIds { count } => allocate_producer_ids(state, count),
        Command::ReportPartitions(command) => reports::report(state, &command, &mut change),
        Command::AlterReassignments { changes } => reassignment::alter(state, changes, &mut change),
        Command::ActivateReassignments { partitions } => {
            reassignment::activate(state, &partitions, &mut change)
        }
        Command::SetWantedLeaders { leaders } => {
            reassignment::set_wanted_leaders(state, &leaders, &mut change)
        }
        Command::SetBrokerDrain { broker_id, drain } => {
            brokers::set_drain(state, broker_id, drain, &mut change)
        }
        Command::UnregisterBroker { broker_id } => {
            brokers::unregister(state, broker_id, &mut change)
        }
        Command::SetClusterSettings { settings } => {
            if state.image.settings != settings {
                change.settings = Some(settings);
            }
            Outcome::Done
        }
        Command::BeginAfterRestore { floor } => restore::begin(state, floor, &mut change),
    };
    if is_empty(&change) {
        return (outcome, None);
    }
    state.commit(&change);
    (outcome, Some(change))
}

fn become_leader(state: &mut State, command: BecomeLeader, change: &mut ImageChange) -> Outcome {
    let image = Arc::make_mut(&mut state.image);
    if image.cluster_id.is_empty() {
        image.cluster_id = command.cluster_id;
    }
    change.controller_leader = Some(Some(command.controller_id));
    change.controllers = command
        .controllers
        .into_iter()
        .filter(|controller| image.controllers.get(&controller.controller_id) != Some(controller))
        .collect();
    Outcome::Done
}

fn remove_gateways(
    state: &State,
    gateways: Vec<GatewaySession>,
    change: &mut ImageChange,
) -> Outcome {
    for session in gateways {
        let present = state.image.gateways.get(&session.gateway_id);
        if present.is_some_and(|gateway| gateway.incarnation_id == session.incarnation_id) {
            change.removed_gateways.push(session.gateway_id);
        }
    }
    Outcome::Done
}

fn allocate_producer_ids(state: &mut State, count: u32) -> Outcome {
    let first = state.next_producer_id;
    match first.checked_add(i64::from(count)) {
        Some(next) => {
            state.next_producer_id = next;
            Outcome::ProducerIds(first)
        }
        None => Outcome::ProducerIdsExhausted,
    }
}

fn is_empty(change: &ImageChange) -> bool {
    *change
        == ImageChange {
            revision: change.revision,
            ..Default::default()
        }
}
