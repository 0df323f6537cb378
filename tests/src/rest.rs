//! The controllers' REST API, as a test uses it.

use std::time::Duration;

use reqwest::Method;
use serde_json::{Value, json};

use crate::wait::wait_for;

/// Longer than the controllers wait for leaders of a new topic.
const ANSWER_DEADLINE: Duration = Duration::from_secs(70);

/// Asks one controller after the other until one answers.
pub struct Rest {
    runtime: tokio::runtime::Runtime,
    http: reqwest::Client,
    addresses: Vec<String>,
}

/// An answer of any status.
#[derive(Debug)]
pub struct Answer {
    pub status: u16,
    pub content_type: String,
    pub body: Value,
}

impl Rest {
    pub fn new(addresses: Vec<String>) -> Self {
        Self::with_deadline(addresses, ANSWER_DEADLINE)
    }

    /// Gives each controller so long to answer.
    pub fn with_deadline(addresses: Vec<String>, deadline: Duration) -> Self {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .expect("a runtime without options starts");
        let http = reqwest::Client::builder()
            .no_proxy()
            .pool_max_idle_per_host(0)
            .timeout(deadline)
            .build()
            .expect("no TLS and no resolver settings that could be refused");
        Self {
            runtime,
            http,
            addresses,
        }
    }

    /// `None`: no controller answered at all.
    pub fn ask(&self, method: Method, path: &str, body: Option<&Value>) -> Option<Answer> {
        self.addresses
            .iter()
            .find_map(|address| self.ask_one(address, &method, path, body))
    }

    pub fn ask_one(
        &self,
        address: &str,
        method: &Method,
        path: &str,
        body: Option<&Value>,
    ) -> Option<Answer> {
        let mut request = self
            .http
            .request(method.clone(), format!("http://{address}{path}"));
        if let Some(body) = body {
            request = request.json(body);
        }
        self.runtime.block_on(async {
            let response = request.send().await.ok()?;
            let status = response.status().as_u16();
            let content_type = response
                .headers()
                .get("content-type")
                .and_then(|value| value.to_str().ok())
                .unwrap_or_default()
                .to_owned();
            let bytes = response.bytes().await.ok()?;
            let body = serde_json::from_slice(&bytes).unwrap_or(Value::Null);
            Some(Answer {
                status,
                content_type,
                body,
            })
        })
    }

    /// What the first address shows that answers, as text.
    pub fn text(&self, path: &str) -> Result<String, String> {
        let get = |address: &String| {
            let request = self.http.get(format!("http://{address}{path}"));
            self.runtime
                .block_on(async { request.send().await.ok()?.text().await.ok() })
        };
        self.addresses
            .iter()
            .find_map(get)
            .ok_or_else(|| format!("GET {path}: no answer"))
    }

    pub fn get(&self, path: &str) -> Result<Value, String> {
        match self.ask(Method::GET, path, None) {
            Some(answer) if answer.status == 200 => Ok(answer.body),
            Some(answer) => Err(format!("GET {path}: {} {}", answer.status, answer.body)),
            None => Err(format!("GET {path}: no controller answers")),
        }
    }

    pub fn create_topic(&self, name: &str, partitions: u32, replication: u32, configs: Value) {
        let body = json!({
            "name": name, "partition_count": partitions, "replication_factor": replication,
            "configs": configs, "timeout_ms": 60_000,
        });
        let answer = self
            .ask(Method::POST, "/v1/topics", Some(&body))
            .unwrap_or_else(|| panic!("creating topic {name}: no controller answers"));
        assert!(
            answer.status < 300,
            "creating topic {name}: {} {}",
            answer.status,
            answer.body
        );
    }

    /// Creates a topic as soon as the controllers can: an answer of before they have elected a leader
    /// says that nothing was done.
    pub fn create_topic_in_the_end(&self, body: &Value, deadline: Duration) {
        let what = format!("topic {} to be created", body["name"]);
        wait_for(&what, deadline, || {
            match self.ask(Method::POST, "/v1/topics", Some(body)) {
                Some(answer) if answer.status < 300 || answer.status == 409 => Ok(()),
                other => Err(format!("{other:?}")),
            }
        });
    }

    /// The id of the controller that leads, once there is one.
    pub fn controller_leader(&self, deadline: Duration) -> u64 {
        wait_for("a controller leader", deadline, || {
            self.get("/v1/cluster")?["controller_leader"]
                .as_u64()
                .ok_or_else(|| "none".to_owned())
        })
    }

    pub fn partitions(&self, topic: &str) -> Result<Vec<Partition>, String> {
        let answer = self.get(&format!("/v1/topics/{topic}"))?;
        let list = answer["partitions"]
            .as_array()
            .ok_or_else(|| format!("no list: {answer}"))?;
        Ok(list.iter().map(Partition::from_json).collect())
    }

    /// How many partitions of a topic are in a state (`under-replicated`, `offline`, ...).
    pub fn count_in_state(&self, topic: &str, state: &str) -> Result<usize, String> {
        let list = self.get(&format!("/v1/partitions?state={state}"))?;
        let of_topic = |one: &&Value| one["topic"] == topic;
        let all = list["partitions"].as_array().into_iter().flatten();
        Ok(all.filter(of_topic).count())
    }

    pub fn partition(&self, topic: &str, partition: usize) -> Result<Partition, String> {
        let mut partitions = self.partitions(topic)?;
        if partition >= partitions.len() {
            return Err(format!("{topic} has {} partitions", partitions.len()));
        }
        Ok(partitions.swap_remove(partition))
    }

    /// Waits until every partition of the topic has a leader and all its replicas in the ISR.
    pub fn wait_until_healthy(&self, topic: &str, deadline: Duration) -> Vec<Partition> {
        wait_for(
            &format!("topic {topic} to have leaders and full ISRs"),
            deadline,
            || {
                let partitions = self.partitions(topic)?;
                match partitions.iter().find(|partition| !partition.is_healthy()) {
                    None if partitions.is_empty() => Err("it has no partitions".to_owned()),
                    None => Ok(partitions),
                    Some(partition) => Err(format!("{partition:?}")),
                }
            },
        )
    }
}

/// A partition as REST shows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Partition {
    pub partition: i64,
    pub leader: Option<i64>,
    pub leader_epoch: i64,
    pub replicas: Vec<i64>,
    /// Sorted.
    pub isr: Vec<i64>,
}

impl Partition {
    fn from_json(value: &Value) -> Self {
        let ids = |name: &str| -> Vec<i64> {
            value[name]
                .as_array()
                .into_iter()
                .flatten()
                .filter_map(Value::as_i64)
                .collect()
        };
        let mut isr = ids("isr");
        isr.sort_unstable();
        Self {
            partition: value["partition"].as_i64().unwrap_or(-1),
            leader: value["leader"].as_i64(),
            leader_epoch: value["leader_epoch"].as_i64().unwrap_or(-1),
            replicas: ids("replicas"),
            isr,
        }
    }

    pub fn is_healthy(&self) -> bool {
        self.leader.is_some() && self.isr.len() == self.replicas.len()
    }
}
