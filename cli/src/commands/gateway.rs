//! `chronik gateway`.

use serde_json::Value;

use super::{cell, client, items, show};
use crate::arguments::Access;
use crate::output::Table;

pub async fn list(access: &Access) -> anyhow::Result<()> {
    let answer = client(access)?.get("/v1/gateways").await?;
    show(access, &answer, render);
    Ok(())
}

fn render(answer: &Value) -> String {
    let mut table = Table::new(&["GATEWAY", "RACK", "KAFKA ENDPOINTS"]);
    for gateway in items(answer, "gateways") {
        let endpoints: Vec<String> = items(gateway, "endpoints").iter().map(endpoint).collect();
        table.row(vec![
            cell(&gateway["gateway_id"]),
            cell(&gateway["rack"]),
            endpoints.join(","),
        ]);
    }
    table.render()
}

fn endpoint(endpoint: &Value) -> String {
    format!("{}:{}", cell(&endpoint["host"]), cell(&endpoint["port"]))
}
