//! `chronik broker`.

use anyhow::Context as _;
use reqwest::Method;
use serde_json::{Value, json};

use super::{cell, client, items, show};
use crate::arguments::{Access, BrokerCommand};
use crate::output::Table;

pub async fn run(command: BrokerCommand) -> anyhow::Result<()> {
    match command {
        BrokerCommand::List { access } => list(&access).await,
        BrokerCommand::Describe { access, broker_id } => describe(&access, broker_id).await,
        BrokerCommand::Drain {
            access,
            broker_id,
            decommission,
        } => {
            let body = json!({ "decommission": decommission });
            drain(&access, Method::POST, broker_id, Some(&body)).await
        }
        BrokerCommand::DrainStatus { access, broker_id } => {
            drain(&access, Method::GET, broker_id, None).await
        }
        BrokerCommand::Undrain { access, broker_id } => {
            drain(&access, Method::DELETE, broker_id, None).await
        }
        BrokerCommand::Unregister { access, broker_id } => {
            let answer = client(&access)?
                .request(Method::DELETE, &format!("/v1/brokers/{broker_id}"), None)
                .await
                .with_context(|| format!("cannot unregister broker {broker_id}"))?;
            show(&access, &answer, |_| {
                format!("broker {broker_id} is unregistered\n")
            });
            Ok(())
        }
    }
}

async fn drain(
    access: &Access,
    method: Method,
    broker_id: i32,
    body: Option<&Value>,
) -> anyhow::Result<()> {
    let answer = client(access)?
        .request(method, &format!("/v1/brokers/{broker_id}/drain"), body)
        .await
        .with_context(|| format!("the drain of broker {broker_id}"))?;
    show(access, &answer, render_drain);
    Ok(())
}

fn render_drain(drain: &Value) -> String {
    const LINES: &[(&str, &str)] = &[
        ("broker", "broker_id"),
        ("drain", "drain"),
        ("leaders left", "leader_count"),
        ("  nobody else can lead", "stuck_leader_count"),
        ("replicas left", "replica_count"),
        ("  being moved", "moving_count"),
        ("done", "done"),
    ];
    LINES
        .iter()
        .map(|(label, name)| format!("{label:<26}{}\n", cell(&drain[*name])))
        .collect()
}

async fn list(access: &Access) -> anyhow::Result<()> {
    let answer = client(access)?.get("/v1/brokers").await?;
    show(access, &answer, |answer| render(items(answer, "brokers")));
    Ok(())
}

async fn describe(access: &Access, broker_id: i32) -> anyhow::Result<()> {
    let broker = client(access)?
        .get(&format!("/v1/brokers/{broker_id}"))
        .await
        .with_context(|| format!("cannot describe broker {broker_id}"))?;
    show(access, &broker, |broker| {
        render(std::slice::from_ref(broker))
    });
    Ok(())
}

fn render(brokers: &[Value]) -> String {
    let mut table = Table::new(&[
        "BROKER", "STATE", "DRAIN", "LEADERS", "REPLICAS", "EPOCH", "RACK", "RPC",
    ]);
    for broker in brokers {
        let state = match broker["fenced"].as_bool() {
            Some(true) => "fenced",
            Some(false) => "active",
            None => "-",
        };
        table.row(vec![
            cell(&broker["broker_id"]),
            state.to_owned(),
            cell(&broker["drain"]),
            cell(&broker["leader_count"]),
            cell(&broker["replica_count"]),
            cell(&broker["broker_epoch"]),
            cell(&broker["rack"]),
            cell(&broker["rpc_address"]),
        ]);
    }
    table.render()
}
