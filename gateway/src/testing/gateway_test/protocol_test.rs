//! Bytes that no well-behaved client sends, and versions that nobody knows yet.
//!
//! Invariant: such a request harms at most its own connection.

use super::*;
use crate::protocol::Api;

#[tokio::test]
async fn versions_from_the_future_are_refused_and_do_no_harm() {
    let cluster = Cluster::start(1).await;
    for api in Api::ALL {
        for version in [api.versions().1 + 1, i16::MAX, -1] {
            let mut client = cluster.client(0).await;
            let mut frame = api.key().to_be_bytes().to_vec();
            frame.extend(version.to_be_bytes());
            frame.extend([0, 0, 0, 5, 0xff, 0xff]);
            frame.extend([0; 40]);
            client.send_frame(&frame).await;
            let answer = client.frame().await;
            if let Some(answer) = &answer {
                assert_eq!(answer[..4], [0, 0, 0, 5], "{}", api.name());
            }
            if *api == Api::ApiVersions {
                assert_eq!(answer.unwrap()[4..6], 35i16.to_be_bytes());
            }
        }
    }
    let mut client = cluster.client(0).await;
    for version in 0..=5 {
        let response = client.call(&api_versions(), version).await;
        assert_eq!(response.error_code, 0);
        let produce = response
            .api_keys
            .iter()
            .find(|api| api.api_key == 0)
            .unwrap();
        assert_eq!((produce.min_version, produce.max_version), (0, 13));
        assert_eq!(response.api_keys.len(), Api::ALL.len());
    }
}

fn api_versions() -> k::ApiVersionsRequest {
    let mut request = k::ApiVersionsRequest::default();
    request.client_software_name = "a-client".into();
    request.client_software_version = "1.2.3-rc.1".into();
    request
}

#[tokio::test]
async fn a_client_without_a_name_or_of_another_cluster_is_told_so() {
    let cluster = Cluster::start(1).await;
    let mut client = cluster.client(0).await;
    for (name, version) in [
        ("", "1"),
        ("a", ""),
        ("-a", "1"),
        ("a", "1+x"),
        ("a b", "1"),
    ] {
        let mut request = api_versions();
        request.client_software_name = name.into();
        request.client_software_version = version.into();
        assert_eq!(
            client.call(&request, 4).await.error_code,
            42,
            "{name} {version}"
        );
        assert_eq!(
            client.call(&request, 2).await.error_code,
            0,
            "before KIP-511"
        );
    }
    let described = client.call(&k::DescribeClusterRequest::default(), 0).await;
    let (own, broker) = (described.cluster_id, described.brokers[0].broker_id);
    for (cluster_id, node_id, error) in [
        (Some(own.clone()), broker, 0),
        (Some(own.clone()), -1, 0),
        (Some("another".into()), -1, 129),
        (Some(own), 9999, 0),
        (None, broker, 42),
        (None, -1, 0),
    ] {
        let mut request = api_versions();
        (request.cluster_id, request.node_id) = (cluster_id, node_id);
        let response = client.call(&request, 5).await;
        assert_eq!(response.error_code, error, "{request:?}");
        assert_eq!(response.api_keys.is_empty(), error != 0);
    }
}

#[tokio::test]
async fn malformed_bytes_close_the_connection_and_nothing_else() {
    let cluster = Cluster::start(1).await;
    let huge_array = [
        0, 3, 0, 12, 0, 0, 0, 1, 0xff, 0xff, 0, 0xff, 0xff, 0xff, 0xff, 0x07, 0, 0, 0, 0,
    ];
    let mut bad: Vec<Vec<u8>> = vec![
        (-1i32).to_be_bytes().to_vec(),
        i32::MAX.to_be_bytes().to_vec(),
        [&20i32.to_be_bytes()[..], &huge_array[..]].concat(),
        b"GET / HTTP/1.1\r\nHost: gateway\r\n\r\n".to_vec(),
        [0, 0, 0, 2, 9, 9].to_vec(),
        // An API that nobody knows.
        [0, 0, 0, 10, 0x7f, 0xff, 0, 0, 0, 0, 0, 1, 0xff, 0xff].to_vec(),
    ];
    // Each API with a body of garbage.
    for api in Api::ALL {
        let mut frame = api.key().to_be_bytes().to_vec();
        frame.extend(api.versions().1.to_be_bytes());
        frame.extend([0, 0, 0, 1, 0xff, 0xff, 0]);
        frame.extend([0xff; 64]);
        bad.push([&(frame.len() as i32).to_be_bytes()[..], &frame].concat());
    }
    for bytes in bad {
        let mut client = cluster.client(0).await;
        client.send_raw(&bytes).await;
        assert_eq!(client.frame().await, None, "{bytes:?}");
    }
    let mut client = cluster.client(0).await;
    assert_eq!(
        client
            .call(&produce("t", 0, -1, 1000), 7)
            .await
            .responses
            .len(),
        1
    );
}
