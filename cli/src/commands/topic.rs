//! `chronik topic`.

use anyhow::Context as _;
use reqwest::Method;
use serde_json::{Map, Value, json};

use super::{cell, client, items, partition, show};
use crate::arguments::{Access, OutputFormat, TopicCommand, UsageError};
use crate::output::{self, Table};
use crate::rest::path_segment;

pub async fn run(command: TopicCommand) -> anyhow::Result<()> {
    match command {
        TopicCommand::List { access, internal } => list(&access, internal).await,
        TopicCommand::Create {
            access,
            name,
            partitions,
            replication_factor,
            configs,
        } => {
            let mut topic = json!({ "name": name, "configs": string_map(configs)? });
            if let Some(partitions) = partitions {
                topic["partition_count"] = partitions.into();
            }
            if let Some(replication_factor) = replication_factor {
                topic["replication_factor"] = replication_factor.into();
            }
            create(&access, &name, &topic).await
        }
        TopicCommand::Describe {
            access,
            name,
            under_replicated_partitions,
            under_min_isr_partitions,
            at_min_isr_partitions,
            unavailable_partitions,
        } => {
            let states = [
                (under_replicated_partitions, "under-replicated"),
                (under_min_isr_partitions, "under-min-isr"),
                (at_min_isr_partitions, "at-min-isr"),
                (unavailable_partitions, "offline"),
            ];
            let state = states.iter().find(|(is_asked, _)| *is_asked);
            match (state, name) {
                (None, Some(name)) => describe(&access, &name).await,
                (state, name) => {
                    partition::list(&access, name.as_deref(), state.map(|state| state.1)).await
                }
            }
        }
        TopicCommand::Reassign {
            access,
            name,
            brokers,
            replication_factor,
        } => reassign(&access, &name, &brokers, replication_factor).await,
        TopicCommand::AlterConfig {
            access,
            name,
            set,
            delete,
            append,
            subtract,
        } => {
            let changes = config_changes(set, delete, append, subtract)?;
            alter_config(&access, &name, &changes).await
        }
        TopicCommand::AddPartitions {
            access,
            name,
            total,
        } => add_partitions(&access, &name, total).await,
        TopicCommand::Delete { access, name } => delete_topic(&access, &name).await,
    }
}

async fn list(access: &Access, internal: bool) -> anyhow::Result<()> {
    let answer = client(access)?.get("/v1/topics").await?;
    show(access, &answer, |answer| {
        let mut table = Table::new(&["TOPIC", "PARTITIONS", "REPLICATION FACTOR", "ID"]);
        for topic in items(answer, "topics") {
            if internal || topic["internal"] != Value::Bool(true) {
                table.row(vec![
                    cell(&topic["name"]),
                    cell(&topic["partition_count"]),
                    cell(&topic["replication_factor"]),
                    cell(&topic["topic_id"]),
                ]);
            }
        }
        table.render()
    });
    Ok(())
}

async fn create(access: &Access, name: &str, topic: &Value) -> anyhow::Result<()> {
    let answer = client(access)?
        .request(Method::POST, "/v1/topics", Some(topic))
        .await
        .with_context(|| format!("cannot create topic '{name}'"))?;
    show(access, &answer, |answer| {
        format!(
            "created topic '{name}': {} partitions, replication factor {}\n",
            cell(&answer["partition_count"]),
            cell(&answer["replication_factor"])
        )
    });
    Ok(())
}

async fn describe(access: &Access, name: &str) -> anyhow::Result<()> {
    let topic = client(access)?
        .get(&topic_path(name)?)
        .await
        .with_context(|| format!("cannot describe topic '{name}'"))?;
    show(access, &topic, render_topic);
    Ok(())
}

/// Places the partitions of a topic on the brokers in turn, so that each leads and holds its share.
async fn reassign(
    access: &Access,
    name: &str,
    brokers: &[i32],
    replication_factor: Option<u16>,
) -> anyhow::Result<()> {
    let topic = client(access)?
        .get(&topic_path(name)?)
        .await
        .with_context(|| format!("cannot describe topic '{name}'"))?;
    let present = topic["replication_factor"].as_u64().unwrap_or(1);
    let wanted = replication_factor.map_or(present, u64::from);
    let wanted = usize::try_from(wanted)?;
    if wanted > brokers.len() {
        let count = brokers.len();
        return Err(UsageError(format!(
            "{wanted} replicas per partition do not fit on {count} brokers"
        ))
        .into());
    }
    let count = items(&topic, "partitions").len();
    let moves = (0..count).map(|index| {
        let replicas = (0..wanted).map(|place| brokers[(index + place) % brokers.len()]);
        let partition = i32::try_from(index).unwrap_or(i32::MAX);
        (name.to_owned(), partition, replicas.collect())
    });
    partition::reassign(access, moves.collect()).await
}

fn render_topic(topic: &Value) -> String {
    let mut table = Table::new(&["PARTITION", "LEADER", "LEADER EPOCH", "REPLICAS", "ISR"]);
    for partition in items(topic, "partitions") {
        table.row(vec![
            cell(&partition["partition"]),
            cell(&partition["leader"]),
            cell(&partition["leader_epoch"]),
            cell(&partition["replicas"]),
            cell(&partition["isr"]),
        ]);
    }
    format!(
        "topic    {}\nid       {}\nconfigs  {}\n\n{}",
        cell(&topic["name"]),
        cell(&topic["topic_id"]),
        cell(&topic["configs"]),
        table.render()
    )
}

async fn alter_config(access: &Access, name: &str, changes: &Value) -> anyhow::Result<()> {
    let answer = client(access)?
        .request(
            Method::PATCH,
            &format!("{}/configs", topic_path(name)?),
            Some(changes),
        )
        .await
        .with_context(|| format!("cannot change configs of topic '{name}'"))?;
    done(
        access,
        &answer,
        &format!("changed configs of topic '{name}'"),
    );
    Ok(())
}

async fn add_partitions(access: &Access, name: &str, total: i32) -> anyhow::Result<()> {
    let body = json!({ "total_count": total });
    let answer = client(access)?
        .request(
            Method::POST,
            &format!("{}/partitions", topic_path(name)?),
            Some(&body),
        )
        .await
        .with_context(|| format!("cannot add partitions to topic '{name}'"))?;
    done(
        access,
        &answer,
        &format!("topic '{name}' has {total} partitions"),
    );
    Ok(())
}

async fn delete_topic(access: &Access, name: &str) -> anyhow::Result<()> {
    let answer = client(access)?
        .request(Method::DELETE, &topic_path(name)?, None)
        .await
        .with_context(|| format!("cannot delete topic '{name}'"))?;
    done(access, &answer, &format!("deleted topic '{name}'"));
    Ok(())
}

/// For answers that may be empty: a program still gets JSON.
fn done(access: &Access, answer: &Value, sentence: &str) {
    match (access.output, answer) {
        (OutputFormat::Json, Value::Null) => output::print_json(&json!({})),
        (OutputFormat::Json, answer) => output::print_json(answer),
        (OutputFormat::Table, _) => output::print_line(sentence),
    }
}

/// `.` and `..` would not stay in their place in a URL; they are no topic names either.
fn topic_path(name: &str) -> Result<String, UsageError> {
    if matches!(name, "" | "." | "..") {
        return Err(UsageError(format!("'{name}' cannot be a topic's name")));
    }
    Ok(format!("/v1/topics/{}", path_segment(name)))
}

fn string_map(pairs: Vec<(String, String)>) -> Result<Value, UsageError> {
    let mut map = Map::new();
    for (key, value) in pairs {
        if map.insert(key.clone(), value.into()).is_some() {
            return Err(UsageError(format!("config '{key}' is given twice")));
        }
    }
    Ok(Value::Object(map))
}

/// The body of a change of configs: null puts a config back to its default.
fn config_changes(
    set: Vec<(String, String)>,
    delete: Vec<String>,
    append: Vec<(String, String)>,
    subtract: Vec<(String, String)>,
) -> Result<Value, UsageError> {
    let mut configs = string_map(set)?;
    for key in delete {
        if configs.get(&key).is_some_and(|value| !value.is_null()) {
            return Err(UsageError(format!(
                "config '{key}' cannot be both set and deleted"
            )));
        }
        configs[key] = Value::Null;
    }
    Ok(json!({
        "configs": configs, "append": string_map(append)?, "subtract": string_map(subtract)?,
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pair(key: &str, value: &str) -> (String, String) {
        (key.to_owned(), value.to_owned())
    }

    #[test]
    fn a_deleted_config_is_null() {
        let changes = config_changes(
            vec![pair("a", "1")],
            vec!["b".into()],
            vec![pair("c", "x")],
            vec![],
        );
        assert_eq!(
            changes.unwrap(),
            json!({"configs": {"a": "1", "b": null}, "append": {"c": "x"}, "subtract": {}})
        );
    }

    #[test]
    fn contradictions_are_refused() {
        let twice = config_changes(vec![pair("a", "1"), pair("a", "2")], vec![], vec![], vec![]);
        assert!(twice.unwrap_err().to_string().contains("twice"));
        let both = config_changes(vec![pair("a", "1")], vec!["a".into()], vec![], vec![]);
        assert!(both.unwrap_err().to_string().contains("both"));
    }

    #[test]
    fn a_topic_is_shown_with_its_partitions() {
        let topic = json!({
            "name": "t", "topic_id": "id", "configs": {"retention.ms": "1"},
            "partitions": [
                {"partition": 0, "leader": 2, "leader_epoch": 4, "replicas": [2, 3], "isr": [2]},
                {"partition": 1, "leader": null, "leader_epoch": 0, "replicas": [3], "isr": []},
            ],
        });
        let shown = render_topic(&topic);
        assert!(shown.contains("configs  retention.ms=1\n"), "{shown}");
        assert!(
            shown.contains("0          2       4             2,3       2\n"),
            "{shown}"
        );
        assert!(
            shown.contains("1          -       0             3         -\n"),
            "{shown}"
        );
    }

    #[test]
    fn dots_are_no_topic_names() {
        for name in ["", ".", ".."] {
            assert!(topic_path(name).is_err(), "{name}");
        }
        assert_eq!(topic_path("...").unwrap(), "/v1/topics/...");
    }
}
