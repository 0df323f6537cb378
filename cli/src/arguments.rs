//! The command line: every command, flag and default.
//!
//! Invariant: what can be seen to be wrong without asking a controller is refused here, with
//! exit code 64.

use clap::{Args, Parser, Subcommand, ValueEnum};

use crate::dev::DevArguments;

/// A command line that was parsed but makes no sense.
#[derive(Debug)]
pub struct UsageError(pub String);

impl std::fmt::Display for UsageError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for UsageError {}

/// Runs and operates Chronik, a Kafka-compatible streaming platform.
#[derive(Parser)]
#[command(name = "chronik", version, max_term_width = 100)]
pub struct Arguments {
    #[command(subcommand)]
    pub command: Command,
}

#[derive(Subcommand)]
pub enum Command {
    /// Run a whole cluster on this machine, each service a process of its own.
    Dev(DevArguments),
    #[command(flatten)]
    Admin(AdminCommand),
}

#[derive(Subcommand)]
pub enum AdminCommand {
    /// The cluster as a whole.
    #[command(subcommand)]
    Cluster(ClusterCommand),
    /// Controllers: they keep the cluster's metadata.
    #[command(subcommand)]
    Controller(ControllerCommand),
    /// Brokers: they store the records.
    #[command(subcommand)]
    Broker(BrokerCommand),
    /// Gateways: Kafka clients talk to them.
    #[command(subcommand)]
    Gateway(GatewayCommand),
    /// Topics: list, create, describe, change, delete.
    #[command(subcommand)]
    Topic(TopicCommand),
}

/// Where to ask, and how to print. The same for every operators' command.
#[derive(Args)]
pub struct Access {
    /// REST address of a controller. May be given several times, or with commas: where one does
    /// not answer, the next is asked.
    #[arg(
        long = "rest-url",
        value_name = "URL",
        env = "CHRONIK_REST_URL",
        value_delimiter = ',',
        default_value = "http://127.0.0.1:8080"
    )]
    pub rest_urls: Vec<String>,
    /// A table for people, or the controller's JSON for programs.
    #[arg(long, value_name = "FORMAT", default_value = "table")]
    pub output: OutputFormat,
    /// Longest time to wait for an answer, in milliseconds.
    #[arg(long, value_name = "MS", default_value_t = 30_000)]
    pub timeout_ms: u64,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum OutputFormat {
    Table,
    Json,
}

#[derive(Subcommand)]
pub enum ClusterCommand {
    /// Show the cluster's id, its leader, and what it consists of.
    Describe {
        #[command(flatten)]
        access: Access,
    },
}

#[derive(Subcommand)]
pub enum ControllerCommand {
    /// List controllers and which of them leads.
    List {
        #[command(flatten)]
        access: Access,
    },
}

#[derive(Subcommand)]
pub enum BrokerCommand {
    /// List registered brokers.
    List {
        #[command(flatten)]
        access: Access,
    },
    /// Show one broker.
    Describe {
        #[command(flatten)]
        access: Access,
        /// The broker's id.
        broker_id: i32,
    },
}

#[derive(Subcommand)]
pub enum GatewayCommand {
    /// List registered gateways and their endpoints.
    List {
        #[command(flatten)]
        access: Access,
    },
}

#[derive(Subcommand)]
pub enum TopicCommand {
    /// List topics.
    List {
        #[command(flatten)]
        access: Access,
        /// Show internal topics too, such as __consumer_offsets. JSON output always has them.
        #[arg(long)]
        internal: bool,
    },
    /// Create a topic.
    Create {
        #[command(flatten)]
        access: Access,
        name: String,
        /// Number of partitions; the cluster's default where not given.
        #[arg(long, value_name = "N", value_parser = clap::value_parser!(i32).range(1..))]
        partitions: Option<i32>,
        /// Copies of each partition; the cluster's default where not given.
        #[arg(long, value_name = "N", value_parser = clap::value_parser!(i16).range(1..))]
        replication_factor: Option<i16>,
        /// A topic config, such as retention.ms=86400000. May be given several times.
        #[arg(long = "config", value_name = "KEY=VALUE", value_parser = key_value)]
        configs: Vec<(String, String)>,
    },
    /// Show a topic: configs, and leader, replicas and ISR of each partition.
    Describe {
        #[command(flatten)]
        access: Access,
        name: String,
    },
    /// Change configs of a topic.
    #[command(group = clap::ArgGroup::new("changes").required(true).multiple(true))]
    AlterConfig {
        #[command(flatten)]
        access: Access,
        name: String,
        /// Set a config. May be given several times.
        #[arg(long, value_name = "KEY=VALUE", value_parser = key_value, group = "changes")]
        set: Vec<(String, String)>,
        /// Put a config back to its default. May be given several times.
        #[arg(long, value_name = "KEY", group = "changes")]
        delete: Vec<String>,
        /// Add words to a config that is a list. May be given several times.
        #[arg(long, value_name = "KEY=WORDS", value_parser = key_value, group = "changes")]
        append: Vec<(String, String)>,
        /// Take words from a config that is a list. May be given several times.
        #[arg(long, value_name = "KEY=WORDS", value_parser = key_value, group = "changes")]
        subtract: Vec<(String, String)>,
    },
    /// Give a topic more partitions. Records keep their place; keys may map to others from now on.
    AddPartitions {
        #[command(flatten)]
        access: Access,
        name: String,
        /// The number of partitions the topic shall have, not how many to add.
        #[arg(long, value_name = "N", value_parser = clap::value_parser!(i32).range(1..))]
        total: i32,
    },
    /// Delete a topic and all its records.
    Delete {
        #[command(flatten)]
        access: Access,
        name: String,
    },
}

fn key_value(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((key, value)) if !key.is_empty() => Ok((key.to_owned(), value.to_owned())),
        _ => Err("expected KEY=VALUE".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(line: &str) -> Result<Arguments, clap::Error> {
        Arguments::try_parse_from(line.split_whitespace())
    }

    #[test]
    fn the_command_line_is_consistent() {
        use clap::CommandFactory as _;
        Arguments::command().debug_assert();
    }

    #[test]
    fn configs_are_split_at_the_first_equals_sign() {
        let parsed = parse("chronik topic create t --config a.b=c=d --config e=").unwrap();
        let Command::Admin(AdminCommand::Topic(TopicCommand::Create { configs, .. })) =
            parsed.command
        else {
            panic!("not a topic create");
        };
        assert_eq!(
            configs,
            [("a.b".into(), "c=d".into()), ("e".into(), String::new())]
        );
    }

    #[test]
    fn senseless_command_lines_are_refused() {
        for line in [
            "chronik",
            "chronik topic",
            "chronik topic create",
            "chronik topic create t --partitions 0",
            "chronik topic create t --config novalue",
            "chronik topic create t --config =value",
            "chronik topic alter-config t",
            "chronik topic add-partitions t",
            "chronik topic list --output xml",
            "chronik broker describe one",
            "chronik dev --controllers 2",
            "chronik dev --brokers 0",
        ] {
            let error = parse(line)
                .err()
                .unwrap_or_else(|| panic!("accepted: {line}"));
            assert!(error.use_stderr(), "{line}");
        }
    }

    #[test]
    fn several_rest_urls_are_accepted() {
        let parsed = parse("chronik topic list --rest-url http://a:1,http://b:2").unwrap();
        let Command::Admin(AdminCommand::Topic(TopicCommand::List { access, .. })) = parsed.command
        else {
            panic!("not a topic list");
        };
        assert_eq!(access.rest_urls, ["http://a:1", "http://b:2"]);
    }
}
