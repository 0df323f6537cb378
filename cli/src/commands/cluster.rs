//! `chronik cluster`.

use anyhow::Context as _;
use reqwest::Method;
use serde_json::{Map, Value, json};

use super::{backup, cell, client, items, show};
use crate::arguments::{Access, ClusterCommand};
use crate::output::Table;

const SETTINGS: &str = "/v1/cluster/settings";

pub async fn run(command: ClusterCommand) -> anyhow::Result<()> {
    match command {
        ClusterCommand::Describe { access } => describe(&access).await,
        ClusterCommand::Backup { access, to } => backup::run(&access, &to).await,
        ClusterCommand::Rebalance {
            access, dry_run, ..
        } => rebalance(&access, dry_run).await,
        ClusterCommand::Settings { access } => {
            let answer = client(&access)?.get(SETTINGS).await?;
            show(&access, &answer, render_settings);
            Ok(())
        }
        ClusterCommand::Set {
            access,
            reassignment_parallel_max,
            reassignment_bytes_per_second,
            leader_balance_enable,
        } => {
            let mut change = Map::new();
            if let Some(max) = reassignment_parallel_max {
                change.insert("reassignment_parallel_max".to_owned(), max.into());
            }
            if let Some(rate) = reassignment_bytes_per_second {
                change.insert("reassignment_bytes_per_second".to_owned(), rate.into());
            }
            if let Some(enable) = leader_balance_enable {
                change.insert("leader_balance_enable".to_owned(), enable.into());
            }
            let answer = client(&access)?
                .request(Method::PATCH, SETTINGS, Some(&Value::Object(change)))
                .await
                .context("cannot change the settings")?;
            show(&access, &answer, render_settings);
            Ok(())
        }
    }
}

async fn rebalance(access: &Access, dry_run: bool) -> anyhow::Result<()> {
    let body = json!({ "dry_run": dry_run });
    let answer = client(access)?
        .request(Method::POST, "/v1/rebalance", Some(&body))
        .await
        .context("cannot rebalance")?;
    show(access, &answer, |answer| {
        let moves = items(answer, "moves");
        if moves.is_empty() {
            return "nothing to move\n".to_owned();
        }
        let mut table = Table::new(&["TOPIC", "PARTITION", "FROM", "TO"]);
        for one in moves {
            table.row(vec![
                cell(&one["topic"]),
                cell(&one["partition"]),
                cell(&one["from"]),
                cell(&one["to"]),
            ]);
        }
        table.render()
    });
    Ok(())
}

fn render_settings(settings: &Value) -> String {
    const LINES: &[&str] = &[
        "reassignment_parallel_max",
        "reassignment_bytes_per_second",
        "leader_balance_enable",
    ];
    LINES
        .iter()
        .map(|name| format!("{name:<32}{}\n", cell(&settings[*name])))
        .collect()
}

async fn describe(access: &Access) -> anyhow::Result<()> {
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
        ("  reassigning", "reassigning_partition_count"),
    ];
    LINES
        .iter()
        .map(|(label, name)| format!("{label:<20}{}\n", cell(&cluster[*name])))
        .collect()
}
