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
    let mut text = String::new();
    for (name, value) in cluster.as_object().into_iter().flatten() {
        text.push_str(&format!("{:<24} {}\n", name.replace('_', " "), cell(value)));
    }
    text
}
