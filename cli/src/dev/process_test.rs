//! Tests of `process`, with shell scripts in the services' place.

use std::os::unix::fs::PermissionsExt as _;

use super::*;

const PATIENCE: Duration = Duration::from_secs(20);
/// Between two looks.
const LOOK_INTERVAL: Duration = Duration::from_millis(5);

/// What the future gives. Fails at the deadline and says what did not come.
async fn within<T>(what: &str, future: impl Future<Output = T>) -> T {
    let outcome = tokio::time::timeout(PATIENCE, future).await;
    outcome.unwrap_or_else(|_| panic!("not within {PATIENCE:?}: {what}"))
}

/// A script that gets `--config <path>` like a service; `$2` is the path of its config.
fn script(folder: &Path, name: &str, role: Role, body: &str) -> ProcessSpec {
    let binary = folder.join(format!("{name}.sh"));
    std::fs::write(&binary, format!("#!/bin/sh\n{body}\n")).unwrap();
    std::fs::set_permissions(&binary, std::fs::Permissions::from_mode(0o755)).unwrap();
    ProcessSpec {
        name: name.to_owned(),
        role,
        binary,
        config: folder.join(format!("{name}.toml")),
        log: folder.join(format!("{name}.log")),
    }
}

/// Waits until the script has said so: signals before its `trap` would hit an unprepared shell.
async fn until_logged(spec: &ProcessSpec, line: &str) {
    let logged = async {
        while !last_lines(&spec.log, 10).iter().any(|l| l == line) {
            tokio::time::sleep(LOOK_INTERVAL).await;
        }
    };
    let what = format!("{} to log {line:?}", spec.name);
    within(&what, logged).await;
}

#[tokio::test]
async fn an_exit_is_reported_with_code_and_log() {
    let folder = tempfile::tempdir().unwrap();
    let mut processes = Processes::new();
    let spec = script(
        folder.path(),
        "broker-1",
        Role::Broker,
        "echo \"got $2\"; echo oops >&2; exit 64",
    );
    processes.start(spec.clone()).unwrap();
    let (ended, status) = within("an exit", processes.next_exit()).await;
    assert_eq!(
        (ended.name.as_str(), describe_exit(status).as_str()),
        ("broker-1", "exit code 64")
    );
    let expected = [format!("got {}", spec.config.display()), "oops".to_owned()];
    assert_eq!(last_lines(&spec.log, 5), expected);
    assert!(!processes.any_running());
}

#[tokio::test]
async fn only_the_role_that_is_stopped_ends() {
    let folder = tempfile::tempdir().unwrap();
    let mut processes = Processes::new();
    let wait = "trap 'echo stopped; exit 0' TERM; echo ready; while :; do sleep 0.05; done";
    let broker = script(folder.path(), "broker-1", Role::Broker, wait);
    let gateway = script(folder.path(), "gateway-1", Role::Gateway, wait);
    for spec in [&broker, &gateway] {
        processes.start(spec.clone()).unwrap();
        until_logged(spec, "ready").await;
    }
    let killed = processes.stop_role(Role::Gateway).await;
    assert!(killed.is_empty(), "{killed:?}");
    assert!(last_lines(&gateway.log, 1) == ["stopped"]);
    assert!(last_lines(&broker.log, 1) == ["ready"]);
    assert!(processes.any_running());
    within("the end of all", processes.kill_all()).await;
    assert!(!processes.any_running());
}

#[tokio::test]
async fn one_that_does_not_stop_is_killed_at_the_deadline() {
    let folder = tempfile::tempdir().unwrap();
    let mut processes = Processes::new();
    let body = "trap '' TERM; echo ready; while :; do sleep 0.05; done";
    let spec = script(folder.path(), "controller-1", Role::Controller, body);
    processes.start(spec.clone()).unwrap();
    until_logged(&spec, "ready").await;
    let stopped = processes.stop_role(Role::Controller);
    let killed = within("the end of the controllers", stopped).await;
    assert_eq!(killed, ["controller-1"]);
    assert!(!processes.any_running());
}

#[test]
fn the_log_of_the_run_before_is_kept() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("broker-1.log");
    std::fs::write(&path, "first run\n").unwrap();
    drop(open_log(&path).unwrap());
    assert!(last_lines(&path, 5).is_empty());
    assert_eq!(
        last_lines(&folder.path().join("broker-1.log.1"), 5),
        ["first run"]
    );
}

#[test]
fn variables_that_would_confuse_the_processes_are_not_passed_on() {
    for name in [
        "CHRONIK_BROKER_BROKER_ID",
        "CHRONIK_BROKER_DATA_DIR",
        "CHRONIK_CONTROLLER_REST_LISTEN",
        "CHRONIK_GATEWAY_LISTENERS",
        "CHRONIK_GATEWAY_CONTROLLERS",
        "CHRONIK_BROKER_RPC_ADVERTISED",
    ] {
        assert!(overrides_place(name), "{name}");
    }
    for name in [
        "PATH",
        "CHRONIK_REST_URL",
        "CHRONIK_BROKER_TELEMETRY__LOG_FILTER",
    ] {
        assert!(!overrides_place(name), "{name}");
    }
}
