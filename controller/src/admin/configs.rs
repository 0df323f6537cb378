//! Changes of topic configs: the leader works out the new configs and proposes them on condition
//! that the old ones are still in force.

use std::collections::{BTreeMap, HashSet};

use chronik_proto::v1;
use chronik_types::id::TopicId;
use chronik_types::topic_config::{self, ConfigKind};
use tonic::Status;

use super::{Refused, propose_topics, topic_result};
use crate::command::{Command, SetTopicConfigs, TopicRefusal};
use crate::controller::Controller;

/// How often a change is tried again that somebody else overtook.
const ATTEMPTS: usize = 5;

type Configs = BTreeMap<String, String>;

pub async fn alter_topic_configs(
    controller: &Controller,
    request: v1::AlterTopicConfigsRequest,
) -> Result<v1::TopicResults, Status> {
    let mut seen = HashSet::new();
    let mut topics = Vec::with_capacity(request.topics.len());
    for topic in request.topics {
        let result = if seen.insert(topic.name.clone()) {
            alter(controller, &topic, request.validate_only).await?
        } else {
            Err(Refused::new(
                v1::AdminError::DuplicateInRequest,
                "the request names the topic twice",
            ))
        };
        topics.push(topic_result(topic.name, result));
    }
    Ok(v1::TopicResults { topics })
}

async fn alter(
    controller: &Controller,
    changes: &v1::TopicConfigChanges,
    validate_only: bool,
) -> Result<Result<TopicId, Refused>, Status> {
    for _ in 0..ATTEMPTS {
        let image = controller.image();
        let Some(topic) = image.topic_by_name(&changes.name) else {
            return Ok(Err(TopicRefusal::Unknown.into()));
        };
        let configs = match altered(&topic.configs, &changes.changes) {
            Ok(configs) => configs,
            Err(message) => {
                return Ok(Err(Refused::new(v1::AdminError::InvalidConfig, message)));
            }
        };
        if validate_only || configs == topic.configs {
            return Ok(Ok(topic.topic_id));
        }
        let command = Command::SetTopicConfigs(SetTopicConfigs {
            topic_id: topic.topic_id,
            expected: topic.configs.clone(),
            configs,
        });
        match propose_topics(controller, command).await?.pop() {
            Some(Err(TopicRefusal::Changed)) => {}
            Some(result) => return Ok(result.map_err(Refused::from)),
            None => return Err(crate::rpc::error::unexpected("SetTopicConfigs")),
        }
    }
    Err(Status::aborted(
        "the configs of the topic are being changed by others: try again",
    ))
}

/// The configs after the changes, or what is wrong with them.
fn altered(present: &Configs, changes: &[v1::ConfigChange]) -> Result<Configs, String> {
    use v1::config_change::Operation;
    let mut configs = present.clone();
    let mut seen = HashSet::new();
    for change in changes {
        let name = change.name.as_str();
        if !seen.insert(name) {
            return Err(format!("config '{name}' is there twice"));
        }
        let key = topic_config::key(name)
            .ok_or_else(|| topic_config::InvalidConfig::UnknownKey(name.to_owned()).to_string())?;
        let operation = Operation::try_from(change.operation)
            .map_err(|_| format!("unknown operation on config '{name}'"))?;
        let value = match operation {
            Operation::Set => change.value.clone(),
            Operation::Delete => {
                configs.remove(name);
                continue;
            }
            Operation::Append | Operation::Subtract => {
                if !matches!(key.kind, ConfigKind::List(_)) {
                    return Err(format!("config '{name}' is not a list"));
                }
                let present = topic_config::effective(&configs, name);
                combined(present, &change.value, operation == Operation::Append)
            }
        };
        topic_config::validate(name, &value).map_err(|error| error.to_string())?;
        configs.insert(name.to_owned(), value);
    }
    Ok(configs)
}

fn combined(present: &str, words: &str, append: bool) -> String {
    let split = |list: &str| -> Vec<String> {
        let words = list
            .split(',')
            .map(str::trim)
            .filter(|word| !word.is_empty());
        words.map(str::to_owned).collect()
    };
    let mut list = split(present);
    for word in split(words) {
        if append && !list.contains(&word) {
            list.push(word);
        } else if !append {
            list.retain(|other| *other != word);
        }
    }
    list.join(",")
}

#[cfg(test)]
mod tests {
    use v1::config_change::Operation;

    use super::*;

    fn change(name: &str, operation: Operation, value: &str) -> v1::ConfigChange {
        v1::ConfigChange {
            name: name.to_owned(),
            operation: operation.into(),
            value: value.to_owned(),
        }
    }

    fn check(
        present: &[(&str, &str)],
        change: v1::ConfigChange,
        expected: Option<&[(&str, &str)]>,
    ) {
        let map = |pairs: &[(&str, &str)]| -> Configs {
            pairs
                .iter()
                .map(|(k, v)| ((*k).to_owned(), (*v).to_owned()))
                .collect()
        };
        assert_eq!(altered(&map(present), &[change]).ok(), expected.map(map));
    }

    #[test]
    fn configs_are_set_deleted_appended_and_subtracted() {
        let policy = "cleanup.policy";
        check(
            &[],
            change("retention.ms", Operation::Set, "5"),
            Some(&[("retention.ms", "5")]),
        );
        check(&[], change("retention.ms", Operation::Set, "x"), None);
        check(&[], change("no.such", Operation::Set, "1"), None);
        check(
            &[("retention.ms", "5")],
            change("retention.ms", Operation::Delete, ""),
            Some(&[]),
        );
        check(
            &[],
            change(policy, Operation::Append, "compact"),
            Some(&[(policy, "delete,compact")]),
        );
        let both = [(policy, "compact,delete")];
        check(
            &both,
            change(policy, Operation::Subtract, "delete"),
            Some(&[(policy, "compact")]),
        );
        check(&[], change(policy, Operation::Subtract, "delete"), None);
        check(&[], change("retention.ms", Operation::Append, "1"), None);
    }
}
