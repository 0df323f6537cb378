//! `chronik partition`, and what other commands ask about partitions.

use anyhow::Context as _;
use reqwest::Method;
use serde_json::{Value, json};

use super::{cell, client, items, show};
use crate::arguments::{Access, PartitionCommand, UsageError};
use crate::output::Table;
use crate::rest::path_segment;

/// Partitions, `all` or named as TOPIC or TOPIC:PARTITION.
type Named = Vec<(String, Option<i32>)>;

pub async fn run(command: PartitionCommand) -> anyhow::Result<()> {
    match command {
        PartitionCommand::List {
            access,
            topic,
            state,
        } => list(&access, topic.as_deref(), state.map(|state| state.name())).await,
        PartitionCommand::Reassign { access, moves } => {
            let moves = moves.iter().map(|text| assignment(text));
            let partitions = moves.collect::<Result<Vec<_>, _>>()?;
            reassign(&access, partitions).await
        }
        PartitionCommand::Reassignments { access } => reassignments(&access).await,
        PartitionCommand::Cancel {
            access,
            all,
            partitions,
        } => cancel(&access, all, named(all, &partitions)?).await,
        PartitionCommand::ElectLeaders {
            access,
            all,
            partitions,
        } => elect_leaders(&access, named(all, &partitions)?).await,
    }
}

pub async fn list(access: &Access, topic: Option<&str>, state: Option<&str>) -> anyhow::Result<()> {
    let mut query = Vec::new();
    if let Some(topic) = topic {
        query.push(format!("topic={}", path_segment(topic)));
    }
    if let Some(state) = state {
        query.push(format!("state={state}"));
    }
    let path = format!("/v1/partitions?{}", query.join("&"));
    let answer = client(access)?
        .get(path.trim_end_matches('?'))
        .await
        .context("cannot list partitions")?;
    show(access, &answer, render_partitions);
    Ok(())
}

/// Asks for moves of replicas: a topic, a partition, and the brokers that shall hold it.
pub async fn reassign(
    access: &Access,
    partitions: Vec<(String, i32, Vec<i32>)>,
) -> anyhow::Result<()> {
    let partitions: Vec<Value> = partitions
        .into_iter()
        .map(|(topic, partition, replicas)| {
            json!({"topic": topic, "partition": partition, "replicas": replicas})
        })
        .collect();
    let body = json!({ "partitions": partitions });
    let answer = client(access)?
        .request(Method::POST, "/v1/reassignments", Some(&body))
        .await
        .context("cannot move replicas")?;
    show(access, &answer, |answer| {
        render_results(answer, "move asked for")
    });
    all_taken(&answer)
}

async fn reassignments(access: &Access) -> anyhow::Result<()> {
    let answer = client(access)?.get("/v1/reassignments").await?;
    show(access, &answer, render_reassignments);
    Ok(())
}

async fn cancel(access: &Access, all: bool, named: Named) -> anyhow::Result<()> {
    let named = if all {
        vec![(String::new(), None)]
    } else {
        named
    };
    for (topic, partition) in named {
        let mut query = Vec::new();
        if !topic.is_empty() {
            query.push(format!("topic={}", path_segment(&topic)));
        }
        if let Some(partition) = partition {
            query.push(format!("partition={partition}"));
        }
        let path = format!("/v1/reassignments?{}", query.join("&"));
        let answer = client(access)?
            .request(Method::DELETE, path.trim_end_matches('?'), None)
            .await
            .context("cannot cancel moves of replicas")?;
        show(access, &answer, |answer| {
            render_results(answer, "goes back to where it was")
        });
        all_taken(&answer)?;
    }
    Ok(())
}

async fn elect_leaders(access: &Access, named: Named) -> anyhow::Result<()> {
    let client = client(access)?;
    let mut body = json!({});
    if !named.is_empty() {
        let mut partitions = Vec::new();
        for (topic, partition) in named {
            match partition {
                Some(partition) => {
                    partitions.push(json!({"topic": topic, "partition": partition}));
                }
                // Only those that need it: the others would be refused.
                None => {
                    let path = format!(
                        "/v1/partitions?topic={}&state=not-preferred-leader",
                        path_segment(&topic)
                    );
                    let answer = client.get(&path).await?;
                    let found = items(&answer, "partitions").iter();
                    partitions.extend(
                        found.map(
                            |one| json!({"topic": one["topic"], "partition": one["partition"]}),
                        ),
                    );
                }
            }
        }
        body["partitions"] = partitions.into();
    }
    let answer = client
        .request(Method::POST, "/v1/leader-elections", Some(&body))
        .await
        .context("cannot elect preferred leaders")?;
    show(access, &answer, |answer| {
        render_results(answer, "led by its preferred leader")
    });
    all_taken(&answer)
}

fn render_partitions(answer: &Value) -> String {
    let mut table = Table::new(&[
        "TOPIC",
        "PARTITION",
        "LEADER",
        "REPLICAS",
        "ISR",
        "MIN ISR",
        "ADDING",
        "REMOVING",
    ]);
    for one in items(answer, "partitions") {
        let names = [
            "topic",
            "partition",
            "leader",
            "replicas",
            "isr",
            "min_insync_replicas",
            "adding",
            "removing",
        ];
        table.row(names.iter().map(|name| cell(&one[*name])).collect());
    }
    table.render()
}

fn render_reassignments(answer: &Value) -> String {
    let mut table = Table::new(&[
        "TOPIC",
        "PARTITION",
        "STATE",
        "FROM",
        "TO",
        "CAUSE",
        "ENTRIES LEFT",
    ]);
    for one in items(answer, "reassignments") {
        let state = match one["active"].as_bool() {
            Some(true) => "moving",
            _ => "waiting",
        };
        let log_entries = cell(&one["progress"]["log_entries"]);
        let left = items(&one["progress"], "replicas").iter().map(|replica| {
            let lag = match &replica["lag_entries"] {
                Value::Null => "all".to_owned(),
                lag => cell(lag),
            };
            let copy = match copied_percent(&replica["copy"]) {
                Some(percent) => format!(" (copy: {percent} %)"),
                None => String::new(),
            };
            let broker = cell(&replica["broker_id"]);
            format!("{broker}: {lag} of {log_entries}{copy}")
        });
        let left = left.collect::<Vec<_>>().join(", ");
        table.row(vec![
            cell(&one["topic"]),
            cell(&one["partition"]),
            state.to_owned(),
            cell(&one["original"]),
            cell(&one["target"]),
            cell(&one["cause"]),
            if left.is_empty() {
                "-".to_owned()
            } else {
                left
            },
        ]);
    }
    table.render()
}

fn copied_percent(copy: &Value) -> Option<u64> {
    let copied = copy["copied_bytes"].as_u64()?;
    let total = copy["total_bytes"].as_u64()?;
    copied.saturating_mul(100).checked_div(total)
}

fn render_results(answer: &Value, done: &str) -> String {
    let mut table = Table::new(&["TOPIC", "PARTITION", "RESULT"]);
    for one in items(answer, "partitions") {
        let result = match &one["problem"] {
            Value::Null => done.to_owned(),
            problem => cell(&problem["detail"]),
        };
        table.row(vec![cell(&one["topic"]), cell(&one["partition"]), result]);
    }
    table.render()
}

/// A refusal of some partitions fails the command, though the others were taken.
fn all_taken(answer: &Value) -> anyhow::Result<()> {
    let refused = items(answer, "partitions")
        .iter()
        .filter(|one| !one["problem"].is_null())
        .count();
    anyhow::ensure!(refused == 0, "{refused} partitions were refused");
    Ok(())
}

fn named(all: bool, partitions: &[String]) -> Result<Named, UsageError> {
    if all != partitions.is_empty() {
        return Err(UsageError(
            "name partitions as TOPIC or TOPIC:PARTITION, or give --all".to_owned(),
        ));
    }
    partitions.iter().map(|text| partition_name(text)).collect()
}

fn partition_name(text: &str) -> Result<(String, Option<i32>), UsageError> {
    let (topic, partition) = match text.split_once(':') {
        None => (text, None),
        Some((topic, index)) => {
            let index = index.parse::<i32>().ok().filter(|index| *index >= 0);
            let wrong = || UsageError(format!("'{text}' is not TOPIC or TOPIC:PARTITION"));
            (topic, Some(index.ok_or_else(wrong)?))
        }
    };
    if topic.is_empty() {
        return Err(UsageError(format!("'{text}' names no topic")));
    }
    Ok((topic.to_owned(), partition))
}

/// TOPIC:PARTITION=BROKER,BROKER,..
fn assignment(text: &str) -> Result<(String, i32, Vec<i32>), UsageError> {
    let wrong = || UsageError(format!("'{text}' is not TOPIC:PARTITION=BROKER,BROKER,.."));
    let (name, brokers) = text.split_once('=').ok_or_else(wrong)?;
    let (topic, partition) = partition_name(name)?;
    let brokers = brokers.split(',').map(str::parse);
    let brokers = brokers.collect::<Result<Vec<i32>, _>>();
    Ok((
        topic,
        partition.ok_or_else(wrong)?,
        brokers.map_err(|_| wrong())?,
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn partitions_and_their_brokers_are_read_from_the_command_line() {
        assert_eq!(
            assignment("a.b:3=1,2").unwrap(),
            ("a.b".to_owned(), 3, vec![1, 2])
        );
        for wrong in [
            "t", "t:0", "t=1", "t:0=", "t:x=1", "t:-1=1", ":0=1", "t:0=1,x",
        ] {
            assert!(assignment(wrong).is_err(), "{wrong}");
        }
        assert_eq!(partition_name("t").unwrap(), ("t".to_owned(), None));
        assert!(named(true, &["t".to_owned()]).is_err());
        assert!(named(false, &[]).is_err());
    }

    #[test]
    fn moves_are_shown_with_what_is_left() {
        let answer = json!({"reassignments": [{
            "topic": "t", "partition": 0, "active": true, "cause": "request",
            "original": [1, 2], "target": [3, 4],
            "progress": {"log_entries": 10, "replicas": [
                {"broker_id": 3, "lag_entries": 4}, {"broker_id": 4, "lag_entries": null,
                    "copy": {"copied_bytes": 50, "total_bytes": 120}},
            ]},
        }]});
        let shown = render_reassignments(&answer);
        assert!(shown.contains("moving"), "{shown}");
        assert!(
            shown.contains("3: 4 of 10, 4: all of 10 (copy: 41 %)"),
            "{shown}"
        );
    }

    #[test]
    fn a_refused_partition_fails_the_command() {
        let taken = json!({"topic": "t", "partition": 0, "problem": null});
        let refused = json!({"topic": "t", "partition": 1, "problem": {"detail": "t-1: no"}});
        assert!(all_taken(&json!({"partitions": [taken]})).is_ok());
        let answer = json!({"partitions": [taken, refused]});
        assert!(all_taken(&answer).is_err());
        assert!(render_results(&answer, "done").contains("t-1: no"));
    }
}
