//! Configuration of a service: defaults, then a TOML file, then environment variables.
//! Invariant: a key that no service knows is an error, wherever it was written.

use std::path::{Path, PathBuf};

use figment::Figment;
use figment::providers::{Env, Format, Serialized, Toml};
use figment::value::{Dict, Value};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

/// Why a configuration cannot be used. Services exit with 64 on it.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    #[error("config file {} does not exist or cannot be read; check --config", .0.display())]
    Unreadable(PathBuf),
    #[error("config is not valid: {0}")]
    Invalid(Box<figment::Error>),
}

/// Loads a configuration: `C`'s defaults, then `file`, then environment variables that start with
/// `env_prefix`. `CHRONIK_BROKER_DATA_DIR` is `data-dir` under the prefix `CHRONIK_BROKER_`, and
/// two underscores go one level down: `CHRONIK_BROKER_TELEMETRY__LOG_FILTER`.
pub fn load<C>(file: Option<&Path>, env_prefix: &str) -> Result<C, ConfigError>
where
    C: Serialize + DeserializeOwned + Default,
{
    let mut figment = Figment::from(Serialized::defaults(C::default()));
    if let Some(file) = file {
        if !file.is_file() {
            return Err(ConfigError::Unreadable(file.to_owned()));
        }
        figment = figment.merge(Toml::file(file));
    }
    let env = Env::prefixed(env_prefix)
        .map(|key| key.as_str().replace("__", ".").replace('_', "-").into());
    figment
        .merge(env)
        .extract()
        .map_err(|error| ConfigError::Invalid(Box::new(error)))
}

/// Which settings of a service its help does not name, or names with another default, as `name ... [default]` or
/// `name = default`; `[required]` stands for any. For the services' tests.
pub fn wrong_in_help<C: Serialize + Default>(help: &str) -> Vec<String> {
    let mut wrong = Vec::new();
    match Value::serialize(C::default()) {
        Ok(Value::Dict(_, defaults)) => check_help(help, "", &defaults, &mut wrong),
        other => wrong.push(format!("the settings are not a table: {other:?}")),
    }
    wrong
}

fn check_help(help: &str, table: &str, defaults: &Dict, wrong: &mut Vec<String>) {
    for (name, value) in defaults {
        let path = format!("{table}{name}");
        if let Value::Dict(_, inner) = value {
            check_help(help, &format!("{path}."), inner, wrong);
            continue;
        }
        let Some(told) = told_default(help, &path).or_else(|| told_default(help, name)) else {
            wrong.push(format!("{path} is not there"));
            continue;
        };
        let default = match value {
            Value::String(_, text) => text.clone(),
            Value::Bool(_, flag) => flag.to_string(),
            Value::Num(_, number) => match number.to_i128().or(number.to_u128().map(|n| n as i128))
            {
                Some(whole) => whole.to_string(),
                None => number.to_f64().unwrap_or_default().to_string(),
            },
            // Words tell those better.
            _ => continue,
        };
        if !default.is_empty() && told != "required" && told.trim_matches('"') != default {
            wrong.push(format!("{path} is {default}, the help says {told}"));
        }
    }
}

/// What a help says after the name of a setting, which begins a line or follows a comma.
fn told_default<'a>(help: &'a str, name: &str) -> Option<&'a str> {
    let begins = |at: usize| {
        let before = help[..at].trim_end_matches(' ');
        let ends = help[at + name.len()..].starts_with([' ', '\n', ',']);
        ends && (before.ends_with('\n') || before.ends_with(','))
    };
    let (at, _) = help.match_indices(name).find(|(at, _)| begins(*at))?;
    let mut lines = help[at + name.len()..].lines();
    let line = lines.next().unwrap_or_default();
    if let Some(value) = line.trim_start().strip_prefix("= ") {
        return Some(value.split("  ").next().unwrap_or(value).trim());
    }
    // What is indented more than a name goes on with the setting before.
    let more = lines.take_while(|line| line.starts_with("    "));
    let bracketed = |line: &'a str| line.split_once('[')?.1.split_once(']');
    let told = std::iter::once(line).chain(more).find_map(bracketed);
    Some(told.map_or("", |(value, _)| value))
}

/// How log lines are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum LogFormat {
    Text,
    Json,
}

/// The `telemetry` table of every service's configuration.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields, default)]
pub struct TelemetryConfig {
    /// Which log lines are written: a level, or directives such as `info,chronik_broker=debug`.
    /// By default Raft library lines below WARN stay out: one per vote of every partition.
    pub log_filter: String,
    pub log_format: LogFormat,
    /// Where traces go: an OTLP gRPC endpoint such as `http://127.0.0.1:4317`. None: no traces.
    pub otlp_endpoint: Option<String>,
    /// Fraction of client requests that are traced, from 0 to 1. Only the gateway decides.
    pub trace_sample_ratio: f64,
}

impl Default for TelemetryConfig {
    fn default() -> Self {
        Self {
            log_filter: "info,openraft=warn".to_owned(),
            log_format: LogFormat::Text,
            otlp_endpoint: None,
            trace_sample_ratio: 0.01,
        }
    }
}

impl TelemetryConfig {
    /// Says what is wrong with the values, if anything.
    pub fn validate(&self) -> Result<(), String> {
        if !(0.0..=1.0).contains(&self.trace_sample_ratio) {
            return Err(format!(
                "telemetry.trace-sample-ratio is {}, it must be from 0 to 1",
                self.trace_sample_ratio
            ));
        }
        tracing_subscriber::EnvFilter::try_new(&self.log_filter)
            .map(|_| ())
            .map_err(|error| format!("telemetry.log-filter '{}': {error}", self.log_filter))
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    #[derive(Debug, Default, Serialize, Deserialize)]
    #[serde(rename_all = "kebab-case", deny_unknown_fields, default)]
    struct Sample {
        data_dir: String,
        broker_id: i32,
        telemetry: TelemetryConfig,
    }

    #[test]
    fn file_overrides_defaults_and_unknown_keys_are_refused() {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        writeln!(file, "broker-id = 3\n[telemetry]\nlog-filter = \"debug\"").unwrap();
        let sample: Sample = load(Some(file.path()), "CHRONIK_NO_SUCH_PREFIX_").unwrap();
        assert_eq!(
            (sample.broker_id, sample.telemetry.log_filter.as_str()),
            (3, "debug")
        );
        assert_eq!(sample.telemetry.otlp_endpoint, None);

        writeln!(file, "no-such-key = 1").unwrap();
        let error = load::<Sample>(Some(file.path()), "CHRONIK_NO_SUCH_PREFIX_").unwrap_err();
        assert!(error.to_string().contains("no-such-key"), "{error}");
    }

    #[test]
    fn a_missing_file_is_named() {
        let error = load::<Sample>(Some(Path::new("/no/such/file.toml")), "X_").unwrap_err();
        assert!(error.to_string().contains("/no/such/file.toml"), "{error}");
    }

    #[test]
    fn a_help_that_tells_another_default_is_found() {
        let right = "\n  data-dir   folder\n  broker-id  number [0], log-filter x [info,openraft=warn]\n  \
                     log-format = \"text\"  how\n  otlp-endpoint  where [none]\n  trace-sample-ratio [0.01]\n";
        assert_eq!(wrong_in_help::<Sample>(right), Vec::<String>::new());
        let wrong = right.replace("[0.01]", "[0.1]").replace("broker-id", "id");
        assert_eq!(
            wrong_in_help::<Sample>(&wrong),
            [
                "broker-id is not there",
                "telemetry.trace-sample-ratio is 0.01, the help says 0.1"
            ]
        );
    }

    #[test]
    fn ratio_and_filter_are_checked() {
        let bad = TelemetryConfig {
            trace_sample_ratio: 2.0,
            ..Default::default()
        };
        assert!(bad.validate().is_err());
        let bad = TelemetryConfig {
            log_filter: "a=b=c".to_owned(),
            ..Default::default()
        };
        assert!(bad.validate().is_err());
        assert_eq!(TelemetryConfig::default().validate(), Ok(()));
    }
}
