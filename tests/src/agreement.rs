//! Whether the controllers hold the same state: each answers reads from its own copy.
//!
//! Invariant: copies of one revision are compared, whatever goes on meanwhile.

use std::time::Duration;

use reqwest::Method;
use serde_json::Value;

use crate::rest::Rest;
use crate::wait::within;

/// For one answer of one controller.
const ASK_DEADLINE: Duration = Duration::from_secs(5);
/// What REST shows of the cluster image, that which has its revision first; besides, each topic.
const VIEWS: [&str; 7] = [
    "/v1/cluster",
    "/v1/cluster/settings",
    "/v1/controllers",
    "/v1/brokers",
    "/v1/gateways",
    "/v1/topics",
    "/v1/partitions",
];

/// Waits until the controllers at these REST addresses are at one revision, and compares what they
/// hold there.
///
/// # Errors
/// What the first two hold that differ, or that they did not come to the same revision in time.
pub fn controllers_agree(rest_addresses: &[String], deadline: Duration) -> Result<(), String> {
    if rest_addresses.len() < 2 {
        return Ok(());
    }
    let rest = Rest::with_deadline(rest_addresses.to_vec(), ASK_DEADLINE);
    let copies = within(deadline, || {
        let copies = rest_addresses.iter().map(|address| copy_of(&rest, address));
        let copies = copies.collect::<Result<Vec<_>, _>>()?;
        let revisions: Vec<&Value> = copies.iter().map(|copy| revision(copy)).collect();
        match revisions.windows(2).all(|two| two[0] == two[1]) {
            true => Ok(copies),
            false => Err(format!("the controllers stay at {revisions:?}")),
        }
    })?;
    let differing = |two: &[Vec<Value>]| {
        let mut views = two[0].iter().zip(&two[1]);
        let (one, other) = views.find(|(one, other)| one != other)?;
        Some(format!(
            "controllers of one revision differ: {one} and {other}"
        ))
    };
    match copies.windows(2).find_map(differing) {
        None => Ok(()),
        Some(difference) => Err(difference),
    }
}

fn revision(copy: &[Value]) -> &Value {
    &copy[0]["revision"]
}

/// One controller's copy, if it stays at its revision while it is read.
fn copy_of(rest: &Rest, address: &String) -> Result<Vec<Value>, String> {
    let get = |path: &str| match rest.ask_one(address, &Method::GET, path, None) {
        Some(answer) if answer.status == 200 => Ok(answer.body),
        other => Err(format!("GET {path} at {address}: {other:?}")),
    };
    let mut copy = VIEWS.into_iter().map(get).collect::<Result<Vec<_>, _>>()?;
    let topics = get("/v1/topics")?;
    let names = topics["topics"].as_array().into_iter().flatten();
    for topic in names.filter_map(|topic| topic["name"].as_str()) {
        copy.push(get(&format!("/v1/topics/{topic}"))?);
    }
    match get(VIEWS[0])?["revision"] == *revision(&copy) {
        true => Ok(copy),
        false => Err(format!("{address} did not stay at {}", revision(&copy))),
    }
}
