//! `chronik cluster`.

use serde_json::Value;

use super::{cell, client, show};
use crate::arguments::Access;

pub async fn describe(access: &Access) -> anyhow::Result<()> {
    let cluster = client(access)?.get("/v1/cluster").await?;
    show(access, &cluster, render);
    Ok(())
}

fn render(cluster: &Value) -> String {
    const LINES: &[(&str, &str)] = &[
        ("cluster id", "cluster_id"),
        ("revision", "revision"),
        ("leading controller", "controller_leader"),
        ("controllers", "controller_count"),
        ("brokers", "broker_count"),
        ("  fenced", "fenced_broker_count"),
        ("gateways", "gateway_count"),
        ("topics", "topic_count"),
        ("partitions", "partition_count"),
        ("  without leader", "leaderless_partition_count"),
        ("  under-replicated", "under_replicated_partition_count"),
    ];
    LINES
        .iter()
        .map(|(label, name)| format!("{label:<20}{}\n", cell(&cluster[*name])))
        .collect()
}
