//! `chronik controller`.

use serde_json::Value;

use super::{cell, client, items, show};
use crate::arguments::Access;
use crate::output::Table;

pub async fn list(access: &Access) -> anyhow::Result<()> {
    let answer = client(access)?.get("/v1/controllers").await?;
    show(access, &answer, render);
    Ok(())
}

fn render(answer: &Value) -> String {
    let mut table = Table::new(&["CONTROLLER", "LEADER", "REST", "RPC"]);
    for controller in items(answer, "controllers") {
        table.row(vec![
            cell(&controller["controller_id"]),
            cell(&controller["is_leader"]),
            cell(&controller["rest_address"]),
            cell(&controller["rpc_address"]),
        ]);
    }
    table.render()
}
