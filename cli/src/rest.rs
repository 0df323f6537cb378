//! The REST client: asks the first controller that answers.
//!
//! Invariant: a request whose outcome is unknown is never sent again by itself; only one that no
//! controller has taken goes on to the next.

use std::fmt;
use std::time::Duration;

use reqwest::{Method, Response, StatusCode};
use serde::Deserialize;
use serde_json::Value;

const CONNECT_TIMEOUT: Duration = Duration::from_secs(3);

pub struct RestClient {
    http: reqwest::Client,
    urls: Vec<String>,
}

/// Why a controller did not take a request.
#[derive(Debug)]
pub struct Attempt {
    url: String,
    cause: String,
    answered: bool,
}

/// Why a request was not done, or not known to be done.
#[derive(Debug)]
pub enum RestError {
    /// A controller answered with a problem (RFC 9457), or with something that is none.
    Refused { status: StatusCode, reason: String },
    /// Nobody took the request: nothing was done.
    NobodyTookIt { attempts: Vec<Attempt> },
    /// The request was sent and no answer came.
    OutcomeUnknown { url: String, cause: String },
}

impl fmt::Display for RestError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Refused { status, reason } => {
                write!(f, "{reason} ({}){}", status.as_u16(), advice(*status))
            }
            Self::NobodyTookIt { attempts } => {
                f.write_str("no controller took the request:")?;
                for Attempt { url, cause, .. } in attempts {
                    write!(f, " {url}: {cause};")?;
                }
                f.write_str(if attempts.iter().any(|attempt| attempt.answered) {
                    " try again later"
                } else {
                    " is the cluster up? give its address by --rest-url or CHRONIK_REST_URL"
                })
            }
            Self::OutcomeUnknown { url, cause } => write!(
                f,
                "{url} took the request and did not answer ({cause}); it may or may not have been \
                 done: look before you try again"
            ),
        }
    }
}

impl std::error::Error for RestError {}

/// What a person can do about a refusal whose reason does not say it itself.
fn advice(status: StatusCode) -> &'static str {
    match status {
        StatusCode::NOT_FOUND => "; the list command shows what there is",
        StatusCode::CONFLICT => "; the describe command shows what is there",
        StatusCode::GATEWAY_TIMEOUT => "; look whether it was done before you try again",
        StatusCode::TOO_MANY_REQUESTS => "; try again later, or ask for less at once",
        _ => "",
    }
}

/// A problem detail as the controllers send it.
#[derive(Deserialize)]
struct Problem {
    title: Option<String>,
    detail: Option<String>,
}

impl RestClient {
    pub fn new(urls: &[String], timeout: Duration) -> anyhow::Result<Self> {
        // A controller is reached directly, whatever proxy the environment names for the web.
        let http = reqwest::Client::builder()
            .no_proxy()
            .connect_timeout(CONNECT_TIMEOUT.min(timeout))
            .timeout(timeout)
            .build()?;
        let urls = urls.iter().map(|url| base_url(url)).collect();
        Ok(Self { http, urls })
    }

    pub async fn get(&self, path: &str) -> Result<Value, RestError> {
        self.request(Method::GET, path, None).await
    }

    /// The first controller's answer that is one, its body not yet read.
    pub async fn download(&self, path: &str) -> Result<Response, RestError> {
        let (_, answer) = self.first_answer(Method::GET, path, None).await?;
        let status = answer.status();
        if status.is_success() {
            return Ok(answer);
        }
        Err(refused(status, &answer.bytes().await.unwrap_or_default()))
    }

    /// Sends a request to the first controller that takes it. `Null` where the answer is empty.
    pub async fn request(
        &self,
        method: Method,
        path: &str,
        body: Option<&Value>,
    ) -> Result<Value, RestError> {
        let (base, answer) = self.first_answer(method, path, body).await?;
        let status = answer.status();
        let bytes = answer.bytes().await;
        let bytes = bytes.map_err(|error| outcome_unknown(base, &error))?;
        read_answer(status, &bytes)
    }

    /// Asks one controller after the other until one takes the request; its URL, and the answer without
    /// its body.
    async fn first_answer(
        &self,
        method: Method,
        path: &str,
        body: Option<&Value>,
    ) -> Result<(&str, Response), RestError> {
        let mut attempts = Vec::new();
        let mut add = |url: &str, cause, answered| {
            let url = url.to_owned();
            attempts.push(Attempt {
                url,
                cause,
                answered,
            });
        };
        for base in &self.urls {
            let url = format!("{base}{path}");
            let mut request = self.http.request(method.clone(), &url);
            if let Some(body) = body {
                request = request.json(body);
            }
            let answer = match request.send().await {
                Ok(answer) => answer,
                Err(error) if nothing_was_sent(&error) || method == Method::GET => {
                    add(base, root_cause(&error), false);
                    continue;
                }
                Err(error) => return Err(outcome_unknown(base, &error)),
            };
            let status = answer.status();
            if status != StatusCode::SERVICE_UNAVAILABLE {
                return Ok((base, answer));
            }
            // Not decided, for want of a leader or because it is busy: another may know one, or be free.
            let bytes = answer.bytes().await.unwrap_or_default();
            add(base, reason(status, &bytes), true);
        }
        Err(RestError::NobodyTookIt { attempts })
    }
}

fn outcome_unknown(base: &str, error: &reqwest::Error) -> RestError {
    RestError::OutcomeUnknown {
        url: base.to_owned(),
        cause: root_cause(error),
    }
}

fn read_answer(status: StatusCode, bytes: &[u8]) -> Result<Value, RestError> {
    if !status.is_success() {
        return Err(refused(status, bytes));
    }
    if bytes.is_empty() {
        return Ok(Value::Null);
    }
    serde_json::from_slice(bytes).map_err(|error| RestError::Refused {
        status,
        reason: format!("the answer is not JSON ({error}); is this a Chronik controller?"),
    })
}

fn refused(status: StatusCode, bytes: &[u8]) -> RestError {
    let reason = reason(status, bytes);
    RestError::Refused { status, reason }
}

fn reason(status: StatusCode, bytes: &[u8]) -> String {
    let problem = serde_json::from_slice::<Problem>(bytes).ok();
    problem
        .and_then(|problem| {
            problem
                .detail
                .filter(|detail| !detail.is_empty())
                .or(problem.title)
        })
        .unwrap_or_else(|| {
            status
                .canonical_reason()
                .unwrap_or("no reason given")
                .to_lowercase()
        })
}

fn nothing_was_sent(error: &reqwest::Error) -> bool {
    error.is_connect() || error.is_builder()
}

/// reqwest names the URL at every level; the innermost cause is what a person needs.
fn root_cause(error: &reqwest::Error) -> String {
    if error.is_timeout() {
        return "no answer within the timeout".to_owned();
    }
    let mut cause: &dyn std::error::Error = error;
    while let Some(source) = cause.source() {
        cause = source;
    }
    cause.to_string()
}

/// Accepts `host:port` for `http://host:port`, and a slash at the end.
fn base_url(url: &str) -> String {
    let url = url.trim().trim_end_matches('/');
    if url.contains("://") {
        url.to_owned()
    } else {
        format!("http://{url}")
    }
}

/// `text` as one segment of a path.
pub fn path_segment(text: &str) -> String {
    let mut segment = String::with_capacity(text.len());
    for byte in text.bytes() {
        match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'.' | b'_' | b'-' => {
                segment.push(char::from(byte));
            }
            _ => segment.push_str(&format!("%{byte:02X}")),
        }
    }
    segment
}

#[cfg(test)]
#[path = "rest_test.rs"]
mod tests;
