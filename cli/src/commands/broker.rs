//! `chronik broker`.

use anyhow::Context as _;
use serde_json::Value;

use super::{cell, client, items, show};
use crate::arguments::Access;
use crate::output::Table;

pub async fn list(access: &Access) -> anyhow::Result<()> {
    let answer = client(access)?.get("/v1/brokers").await?;
    show(access, &answer, |answer| render(items(answer, "brokers")));
    Ok(())
}

pub async fn describe(access: &Access, broker_id: i32) -> anyhow::Result<()> {
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
        "BROKER", "STATE", "LEADERS", "REPLICAS", "EPOCH", "RACK", "RPC",
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
            cell(&broker["leader_count"]),
            cell(&broker["replica_count"]),
            cell(&broker["broker_epoch"]),
            cell(&broker["rack"]),
            cell(&broker["rpc_address"]),
        ]);
    }
    table.render()
}
