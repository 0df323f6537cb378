//! The images, built from scratch, and the compose file's Chronik part, used from the host.

use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::Duration;

use chronik_tests::figures::report;
use chronik_tests::ledger::{Production, verify};
use chronik_tests::process::OwnChild;
use chronik_tests::project_root;
use chronik_tests::rest::Rest;
use chronik_tests::tools::{kafka_topics, kcat, run, run_ok};
use chronik_tests::turn::Turn;
use chronik_tests::wait::{holds, wait_for};

const DEADLINE: Duration = Duration::from_secs(180);
const BUILD_DEADLINE: Duration = Duration::from_secs(1800);
const SERVICES: [&str; 8] = [
    "controller-1",
    "controller-2",
    "controller-3",
    "broker-1",
    "broker-2",
    "broker-3",
    "gateway-1",
    "gateway-2",
];
/// As published by deploy/compose.yaml.
const BOOTSTRAP: &str = "127.0.0.1:9092,127.0.0.1:9095";
const REST: &str = "127.0.0.1:8080";

/// A container engine of our own: data, socket and all in one folder, gone in the end.
struct Engine {
    daemon: OwnChild,
    folder: tempfile::TempDir,
}

impl Engine {
    fn start() -> Self {
        let folder = tempfile::tempdir().expect("the temporary folder is writable");
        let path = |name: &str| folder.path().join(name);
        let log = std::fs::File::create(path("dockerd.log")).expect("the folder is writable");
        let errors = log.try_clone().expect("a file can be shared");
        let mut command = Command::new("dockerd");
        command
            .arg("--data-root")
            .arg(path("data"))
            .arg("--exec-root")
            .arg(path("exec"))
            .arg("--pidfile")
            .arg(path("dockerd.pid"))
            .arg("-H")
            .arg(format!("unix://{}", path("socket").display()))
            .stdin(Stdio::null())
            .stdout(log)
            .stderr(errors);
        let engine = Self {
            daemon: OwnChild::spawn(&mut command),
            folder,
        };
        wait_for("dockerd to answer", DEADLINE, || {
            let finished = run(engine.docker(&["info"]).stdin(Stdio::null()), "", DEADLINE);
            holds(finished.success, engine.log_end())
        });
        engine
    }

    fn log_end(&self) -> String {
        let text = std::fs::read_to_string(self.folder.path().join("dockerd.log"));
        let text = text.unwrap_or_default();
        let lines: Vec<&str> = text.lines().collect();
        lines[lines.len().saturating_sub(5)..].join("\n")
    }

    fn with_engine(&self, command: &mut Command) {
        command
            .env(
                "DOCKER_HOST",
                format!("unix://{}", self.folder.path().join("socket").display()),
            )
            .env("CHRONIK_TAG", "test");
    }

    fn docker(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new("docker");
        self.with_engine(command.args(arguments));
        command
    }

    fn compose(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new("docker-compose");
        command
            .arg("-f")
            .arg(project_root().join("deploy/compose.yaml"))
            .args(["-p", "chronik-test"])
            .args(arguments);
        self.with_engine(&mut command);
        command
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let logs = run(&mut self.compose(&["logs", "--tail", "15"]), "", DEADLINE);
            eprintln!("{}{}", logs.stdout, logs.stderr);
        }
        let _ = self.compose(&["down", "-v", "--timeout", "5"]).output();
        // It ends containerd, which it started itself.
        self.daemon.terminate();
        self.daemon.wait("dockerd", DEADLINE);
    }
}

fn build_images(engine: &Engine) {
    let mut command = Command::new(project_root().join("deploy/build-images.sh"));
    command.arg("test").current_dir(project_root());
    engine.with_engine(&mut command);
    run_ok(&mut command, "", BUILD_DEADLINE);
    for service in ["controller", "broker", "gateway"] {
        let image = format!("chronik-{service}:test");
        let inspect = |format: &str| {
            let mut command = engine.docker(&["image", "inspect", "--format", format, &image]);
            run_ok(&mut command, "", DEADLINE).trim().to_owned()
        };
        let size: f64 = inspect("{{.Size}}").parse().expect("a size in bytes");
        report(&format!("image {image}: {:.1} MB", size / 1e6));
        assert!(size < 60e6, "image {image} has {size} bytes");
        let user = inspect("{{.Config.User}}");
        assert!(
            !user.is_empty() && user != "root" && !user.starts_with("0"),
            "{image}: user {user:?}"
        );
    }
}

#[test]
fn the_compose_file_serves_clients_on_the_host_while_a_broker_is_stopped() {
    let _turn = Turn::alone();
    let engine = Engine::start();
    build_images(&engine);
    let mut up = vec!["up", "-d"];
    up.extend(SERVICES);
    run_ok(&mut engine.compose(&up), "", DEADLINE);
    let rest = Rest::new(vec![REST.to_owned()]);
    wait_for("all brokers and gateways to register", DEADLINE, || {
        let cluster = rest.get("/v1/cluster")?;
        let complete = cluster["broker_count"] == 3
            && cluster["fenced_broker_count"] == 0
            && cluster["gateway_count"] == 2;
        holds(complete, &cluster)
    });

    // From the host: through gateway 1, then through gateway 2.
    run_ok(
        &mut kcat(&["-P", "-b", "127.0.0.1:9092", "-t", "hello"]),
        "hello\n",
        DEADLINE,
    );
    let mut read = kcat(&["-C", "-q", "-e", "-b", "127.0.0.1:9095", "-t", "hello"]);
    assert_eq!(run_ok(&mut read, "", DEADLINE), "hello\n");

    let create = [
        "--create",
        "--topic",
        "load",
        "--partitions",
        "6",
        "--replication-factor",
        "3",
    ];
    run_ok(&mut kafka_topics(BOOTSTRAP, &create), "", DEADLINE);
    rest.wait_until_healthy("load", DEADLINE);
    let folder: PathBuf = engine.folder.path().to_owned();
    let arguments = [
        "-partitions",
        "6",
        "-records",
        "300000",
        "-rate",
        "15000",
        "-timeout",
        "170s",
    ];
    let production = Production::start_at(BOOTSTRAP, &folder, "load", &arguments);
    production.wait_until_acked(50_000, DEADLINE);
    run_ok(&mut engine.compose(&["stop", "broker-2"]), "", DEADLINE);
    production.wait_until_acked(150_000, DEADLINE);
    run_ok(&mut engine.compose(&["start", "broker-2"]), "", DEADLINE);
    production.wait_until_acked(200_000, DEADLINE);
    run_ok(
        &mut engine.compose(&["kill", "-s", "SIGKILL", "broker-3"]),
        "",
        DEADLINE,
    );
    run_ok(&mut engine.compose(&["start", "broker-3"]), "", DEADLINE);
    let produced = production.finish(DEADLINE);
    produced.assert_all_acked(300_000);
    let verdict = verify(BOOTSTRAP, "load", &produced.ledger);
    report(&format!(
        "containers, one broker stopped, one killed: {verdict}"
    ));
    rest.wait_until_healthy("load", DEADLINE);
    run_ok(
        &mut engine.compose(&["stop", "--timeout", "30"]),
        "",
        DEADLINE,
    );
}
