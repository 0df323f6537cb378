//! The command line: every command, flag and default.
//!
//! Invariant: what can be seen to be wrong without asking a controller is refused here, with
//! exit code 64.

use std::path::PathBuf;

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
    /// Topics: list, create, describe, change, move, delete.
    #[command(subcommand)]
    Topic(TopicCommand),
    /// Partitions: their state, where their replicas are, who leads them.
    #[command(subcommand)]
    Partition(PartitionCommand),
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
    /// Save all metadata into a file, from which `chronik-controller restore` makes controllers again.
    Backup {
        #[command(flatten)]
        access: Access,
        /// The file to make; one that is there is never overwritten.
        #[arg(long, value_name = "FILE")]
        to: PathBuf,
    },
    /// Give brokers equal numbers of replicas and leaders, as after a broker was added.
    #[command(group = clap::ArgGroup::new("how").required(true))]
    Rebalance {
        #[command(flatten)]
        access: Access,
        /// Only show what would be moved.
        #[arg(long, group = "how")]
        dry_run: bool,
        /// Ask for the moves; they go on by themselves.
        #[arg(long, group = "how")]
        execute: bool,
    },
    /// Show the settings that can be changed while the cluster runs.
    Settings {
        #[command(flatten)]
        access: Access,
    },
    /// Change settings of the whole cluster.
    #[command(group = clap::ArgGroup::new("settings").required(true).multiple(true))]
    Set {
        #[command(flatten)]
        access: Access,
        /// Partitions whose replicas are moved at the same time.
        #[arg(long, value_name = "N", group = "settings")]
        reassignment_parallel_max: Option<u32>,
        /// Bytes per second that one broker takes in by copies of segment files; 0: unlimited.
        #[arg(long, value_name = "BYTES", group = "settings")]
        reassignment_bytes_per_second: Option<u64>,
        /// Whether leadership goes back to preferred leaders by itself.
        #[arg(long, value_name = "true|false", group = "settings")]
        leader_balance_enable: Option<bool>,
    },
}

/// States of partitions, as the REST API names them.
#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum PartitionState {
    /// Fewer in-sync replicas than assigned.
    UnderReplicated,
    /// acks=all is refused.
    UnderMinIsr,
    /// One more lost replica, and acks=all is refused.
    AtMinIsr,
    /// Without a live leader.
    Offline,
    /// Replicas are being moved, or wait for that.
    Reassigning,
    /// Led by another than the preferred leader.
    NotPreferredLeader,
}

impl PartitionState {
    pub fn name(self) -> &'static str {
        match self {
            Self::UnderReplicated => "under-replicated",
            Self::UnderMinIsr => "under-min-isr",
            Self::AtMinIsr => "at-min-isr",
            Self::Offline => "offline",
            Self::Reassigning => "reassigning",
            Self::NotPreferredLeader => "not-preferred-leader",
        }
    }
}

#[derive(Subcommand)]
pub enum PartitionCommand {
    /// List partitions, all or those in a state that needs attention.
    List {
        #[command(flatten)]
        access: Access,
        /// Of this topic only.
        #[arg(long)]
        topic: Option<String>,
        /// In this state only.
        #[arg(long)]
        state: Option<PartitionState>,
    },
    /// Move replicas to other brokers, preferred leader first. Goes on by itself; see reassignments.
    Reassign {
        #[command(flatten)]
        access: Access,
        #[arg(required = true, value_name = "TOPIC:PARTITION=BROKER,BROKER,..")]
        moves: Vec<String>,
    },
    /// Show moves of replicas that are not done, and how far they are.
    Reassignments {
        #[command(flatten)]
        access: Access,
    },
    /// Cancel moves of replicas: partitions go back to where they were.
    Cancel {
        #[command(flatten)]
        access: Access,
        /// All moves.
        #[arg(long)]
        all: bool,
        #[arg(value_name = "TOPIC[:PARTITION]")]
        partitions: Vec<String>,
    },
    /// Have preferred leaders lead at once.
    ElectLeaders {
        #[command(flatten)]
        access: Access,
        /// All partitions that another broker leads.
        #[arg(long)]
        all: bool,
        #[arg(value_name = "TOPIC[:PARTITION]")]
        partitions: Vec<String>,
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
    /// Move leadership away from a broker, or with --decommission all its replicas.
    Drain {
        #[command(flatten)]
        access: Access,
        /// The broker's id.
        broker_id: i32,
        /// Move all replicas away, so that the broker can leave the cluster.
        #[arg(long)]
        decommission: bool,
    },
    /// Show what a drain has still to move.
    DrainStatus {
        #[command(flatten)]
        access: Access,
        /// The broker's id.
        broker_id: i32,
    },
    /// End a drain: the broker may lead and hold replicas again; moves that are not done go back.
    Undrain {
        #[command(flatten)]
        access: Access,
        /// The broker's id.
        broker_id: i32,
    },
    /// Remove a broker from the cluster that is stopped and holds nothing.
    Unregister {
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
        /// The topic's name.
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
    /// Show a topic: configs, and leader, replicas and ISR of each partition. With a state: the
    /// partitions of all topics, or of one, that are in it.
    #[command(group = clap::ArgGroup::new("state"))]
    Describe {
        #[command(flatten)]
        access: Access,
        #[arg(required_unless_present = "state")]
        name: Option<String>,
        /// Fewer in-sync replicas than assigned.
        #[arg(long, group = "state")]
        under_replicated_partitions: bool,
        /// Fewer in-sync replicas than min.insync.replicas.
        #[arg(long, group = "state")]
        under_min_isr_partitions: bool,
        /// Just as many in-sync replicas as min.insync.replicas.
        #[arg(long, group = "state")]
        at_min_isr_partitions: bool,
        /// Without a live leader.
        #[arg(long, group = "state")]
        unavailable_partitions: bool,
    },
    /// Move all replicas of a topic onto the named brokers, spread evenly.
    Reassign {
        #[command(flatten)]
        access: Access,
        /// The topic's name.
        name: String,
        /// Brokers that shall hold the topic.
        #[arg(
            long,
            value_name = "BROKER,BROKER,..",
            value_delimiter = ',',
            required = true
        )]
        brokers: Vec<i32>,
        /// Copies of each partition; as many as now where not given.
        #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..))]
        replication_factor: Option<u16>,
    },
    /// Change configs of a topic.
    #[command(group = clap::ArgGroup::new("changes").required(true).multiple(true))]
    AlterConfig {
        #[command(flatten)]
        access: Access,
        /// The topic's name.
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
        /// The topic's name.
        name: String,
        /// The number of partitions the topic shall have, not how many to add.
        #[arg(long, value_name = "N", value_parser = clap::value_parser!(i32).range(1..))]
        total: i32,
    },
    /// Delete a topic and all its records.
    Delete {
        #[command(flatten)]
        access: Access,
        /// The topic's name.
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
            "chronik topic describe",
            "chronik topic describe --under-replicated-partitions --unavailable-partitions",
            "chronik topic reassign t",
            "chronik partition reassign",
            "chronik partition list --state fine",
            "chronik cluster rebalance",
            "chronik cluster rebalance --dry-run --execute",
            "chronik cluster set",
            "chronik cluster backup",
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
