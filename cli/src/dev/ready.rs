//! When the local cluster is up.
//!
//! Invariant: ready means that a client that connects now is served: controllers have a leader,
//! every broker is registered and not fenced, every gateway is registered and says itself that it
//! is ready. Each is asked over HTTP; nothing is concluded from time passing.

use std::collections::HashSet;
use std::time::Duration;

use serde_json::Value;

use super::process::Role;
use super::service_config::Service;

const ASK_INTERVAL: Duration = Duration::from_millis(20);
const ANSWER_TIMEOUT: Duration = Duration::from_secs(2);

/// Waits until all is up. Between two rounds, `waiting` is told what is still missing.
pub async fn wait_until_ready(services: &[Service], mut waiting: impl FnMut(&[String])) {
    let http = client();
    let mut interval = tokio::time::interval(ASK_INTERVAL);
    interval.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        interval.tick().await;
        let missing = missing(&http, services).await;
        if missing.is_empty() {
            return;
        }
        waiting(&missing);
    }
}

pub fn client() -> reqwest::Client {
    reqwest::Client::builder()
        .no_proxy()
        .timeout(ANSWER_TIMEOUT)
        .build()
        .expect("no TLS and no resolver settings that could be refused")
}

async fn missing(http: &reqwest::Client, services: &[Service]) -> Vec<String> {
    let Some(controller) = services
        .iter()
        .find(|service| service.role == Role::Controller)
    else {
        return vec!["a controller".to_owned()];
    };
    let mut missing = Vec::new();
    let brokers = get(http, &controller.http_address, "/v1/brokers").await;
    let gateways = get(http, &controller.http_address, "/v1/gateways").await;
    let (Some(brokers), Some(gateways)) = (brokers, gateways) else {
        return vec![format!("{} to answer", controller.name)];
    };
    let unfenced = unfenced_brokers(&brokers);
    let registered = registered_gateways(&gateways);
    for service in services {
        let known = match service.role {
            Role::Controller => true,
            Role::Broker => unfenced.contains(&service.id),
            Role::Gateway => registered.contains(&service.id),
        };
        if !known {
            missing.push(format!("{} to register", service.name));
        } else if !is_ready(http, &service.http_address).await {
            missing.push(format!("{} to be ready", service.name));
        }
    }
    missing
}

fn unfenced_brokers(answer: &Value) -> HashSet<String> {
    let brokers = answer["brokers"].as_array().into_iter().flatten();
    brokers
        .filter(|broker| broker["fenced"] == Value::Bool(false))
        .filter_map(|broker| broker["broker_id"].as_i64())
        .map(|id| id.to_string())
        .collect()
}

fn registered_gateways(answer: &Value) -> HashSet<String> {
    let gateways = answer["gateways"].as_array().into_iter().flatten();
    gateways
        .filter_map(|gateway| gateway["gateway_id"].as_str())
        .map(str::to_owned)
        .collect()
}

async fn get(http: &reqwest::Client, address: &str, path: &str) -> Option<Value> {
    let answer = http
        .get(format!("http://{address}{path}"))
        .send()
        .await
        .ok()?;
    answer.error_for_status().ok()?.json().await.ok()
}

async fn is_ready(http: &reqwest::Client, address: &str) -> bool {
    let answer = http.get(format!("http://{address}/readyz")).send().await;
    answer.is_ok_and(|answer| answer.status().is_success())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_fenced_broker_is_not_ready() {
        let answer = json!({"brokers": [
            {"broker_id": 1, "fenced": false}, {"broker_id": 2, "fenced": true}, {"broker_id": 3},
        ]});
        assert_eq!(unfenced_brokers(&answer), HashSet::from(["1".to_owned()]));
    }

    #[test]
    fn an_answer_of_another_shape_means_not_ready() {
        for answer in [
            json!(null),
            json!([]),
            json!({"brokers": 3}),
            json!({"gateways": {}}),
        ] {
            assert!(unfenced_brokers(&answer).is_empty());
            assert!(registered_gateways(&answer).is_empty());
        }
    }
}
