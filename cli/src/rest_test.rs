//! Tests of `rest`, against servers that answer one canned response per connection.

use serde_json::json;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpListener;

use super::*;

/// Serves `answer` to every connection; an empty one closes the connection after the request.
async fn server(answer: &'static str) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        loop {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut request = [0; 4096];
            let _ = stream.read(&mut request).await;
            let _ = stream.write_all(answer.as_bytes()).await;
        }
    });
    format!("http://{address}")
}

async fn nobody() -> String {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    format!("http://{}", listener.local_addr().unwrap())
}

fn client(urls: &[String]) -> RestClient {
    RestClient::new(urls, Duration::from_secs(10)).unwrap()
}

const OK: &str = "HTTP/1.1 200 OK\r\ncontent-length: 7\r\n\r\n{\"a\":1}";
const NO_LEADER: &str = "HTTP/1.1 503 x\r\ncontent-length: 22\r\n\r\n{\"detail\":\"no leader\"}";
const EXISTS: &str =
    "HTTP/1.1 409 x\r\ncontent-length: 32\r\n\r\n{\"detail\":\"topic 'a' is there\"}\r\n";

#[tokio::test]
async fn the_next_controller_is_asked_when_one_is_down_or_knows_no_leader() {
    let urls = [nobody().await, server(NO_LEADER).await, server(OK).await];
    let answer = client(&urls)
        .request(Method::POST, "/x", Some(&json!({})))
        .await
        .unwrap();
    assert_eq!(answer, json!({"a": 1}));
}

#[tokio::test]
async fn a_refusal_is_final_and_tells_the_detail() {
    let urls = [server(EXISTS).await, server(OK).await];
    let error = client(&urls).get("/x").await.unwrap_err();
    assert_eq!(
        error.to_string(),
        "topic 'a' is there (409); the describe command shows what is there"
    );
}

#[tokio::test]
async fn a_write_that_got_no_answer_is_not_repeated() {
    let urls = [server("").await, server(OK).await];
    let error = client(&urls)
        .request(Method::POST, "/x", Some(&json!({})))
        .await
        .unwrap_err();
    assert!(matches!(error, RestError::OutcomeUnknown { .. }), "{error}");
    // A read may be asked again.
    assert_eq!(client(&urls).get("/x").await.unwrap(), json!({"a": 1}));
}

#[tokio::test]
async fn all_attempts_are_named_when_nobody_takes_a_request() {
    let urls = [nobody().await, server(NO_LEADER).await];
    let error = client(&urls).get("/x").await.unwrap_err().to_string();
    for part in [&*urls[0], &*urls[1], "no leader", "try again later"] {
        assert!(error.contains(part), "'{part}' is not in: {error}");
    }
    // The address is in doubt only where nobody answered at all.
    assert!(!error.contains("--rest-url"), "{error}");
    let urls = [nobody().await, nobody().await];
    let error = client(&urls).get("/x").await.unwrap_err().to_string();
    assert!(error.contains("--rest-url"), "{error}");
}

#[test]
fn names_cannot_leave_their_path_segment() {
    assert_eq!(path_segment("a.b_c-D9"), "a.b_c-D9");
    assert_eq!(path_segment("../v1?x#ä"), "..%2Fv1%3Fx%23%C3%A4");
}

#[test]
fn addresses_without_a_scheme_are_http() {
    assert_eq!(base_url("localhost:8080/"), "http://localhost:8080");
    assert_eq!(base_url(" https://c.example/ "), "https://c.example");
}
