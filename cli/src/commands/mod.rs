//! Operators' commands, one file per resource of the REST API.
//!
//! Invariant: with `--output json` the controller's answer is printed as it came, so that programs
//! see the documented API and not this program's idea of it.

use std::time::Duration;

use serde_json::Value;

use crate::arguments::{Access, AdminCommand, ControllerCommand, GatewayCommand, OutputFormat};
use crate::output;
use crate::rest::RestClient;

mod backup;
mod broker;
mod cluster;
mod controller;
mod gateway;
mod partition;
mod topic;

pub async fn run(command: AdminCommand) -> anyhow::Result<()> {
    match command {
        AdminCommand::Cluster(command) => cluster::run(command).await,
        AdminCommand::Controller(ControllerCommand::List { access }) => {
            controller::list(&access).await
        }
        AdminCommand::Broker(command) => broker::run(command).await,
        AdminCommand::Gateway(GatewayCommand::List { access }) => gateway::list(&access).await,
        AdminCommand::Topic(command) => topic::run(command).await,
        AdminCommand::Partition(command) => partition::run(command).await,
    }
}

fn client(access: &Access) -> anyhow::Result<RestClient> {
    RestClient::new(&access.rest_urls, Duration::from_millis(access.timeout_ms))
}

/// Prints the answer as JSON, or what `table` makes of it.
fn show(access: &Access, answer: &Value, table: impl FnOnce(&Value) -> String) {
    match access.output {
        OutputFormat::Json => output::print_json(answer),
        OutputFormat::Table => output::print(&table(answer)),
    }
}

/// A field as one cell of a table: lists with commas, nothing as `-`.
fn cell(value: &Value) -> String {
    match value {
        Value::Null => "-".to_owned(),
        Value::String(text) if text.is_empty() => "-".to_owned(),
        Value::String(text) => text.clone(),
        Value::Array(items) if items.is_empty() => "-".to_owned(),
        Value::Array(items) => items.iter().map(cell).collect::<Vec<_>>().join(","),
        Value::Object(fields) => {
            let fields = fields
                .iter()
                .map(|(name, value)| format!("{name}={}", cell(value)));
            fields.collect::<Vec<_>>().join(",")
        }
        Value::Bool(_) | Value::Number(_) => value.to_string(),
    }
}

/// The list that an answer carries under its resource's name.
fn items<'a>(answer: &'a Value, name: &str) -> &'a [Value] {
    answer[name].as_array().map_or(&[], Vec::as_slice)
}
