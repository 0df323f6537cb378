//! Rules of the house that a program can check, on the files that git knows.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use chronik_tests::{bin_dir, project_root, tools};

const RUN_DEADLINE: Duration = Duration::from_secs(20);

/// This file names what it forbids.
const SELF: &str = "tests/tests/it/tidy.rs";

/// Tracked and new files, without what .gitignore leaves out.
fn files() -> Vec<PathBuf> {
    let output = Command::new("git")
        .args(["ls-files", "--cached", "--others", "--exclude-standard"])
        .current_dir(project_root())
        .output()
        .expect("git runs");
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    let files: Vec<PathBuf> = String::from_utf8_lossy(&output.stdout)
        .lines()
        .map(PathBuf::from)
        .filter(|path| project_root().join(path).is_file())
        .collect();
    assert!(files.len() > 50, "git lists only {} files", files.len());
    files
}

fn with_extension<'a>(files: &'a [PathBuf], extension: &'a str) -> impl Iterator<Item = &'a Path> {
    files
        .iter()
        .filter(move |path| path.extension().is_some_and(|found| found == extension))
        .map(PathBuf::as_path)
}

fn text(path: &Path) -> Option<String> {
    std::fs::read_to_string(project_root().join(path)).ok()
}

/// Panics with all findings at once.
fn check(rule: &str, findings: Vec<String>) {
    assert!(findings.is_empty(), "{rule}:\n  {}", findings.join("\n  "));
}

fn lines_with(path: &Path, needles: &[&str]) -> Vec<String> {
    let text = text(path).unwrap_or_default();
    text.lines()
        .enumerate()
        .filter_map(|(index, line)| {
            let needle = needles.iter().find(|needle| line.contains(**needle))?;
            Some(format!("{}:{}: {needle}", path.display(), index + 1))
        })
        .collect()
}

#[test]
fn every_rust_file_says_what_it_is_for() {
    let files = files();
    let findings = with_extension(&files, "rs")
        .filter(|path| !text(path).unwrap_or_default().starts_with("//! "))
        .map(|path| path.display().to_string())
        .collect();
    check("a .rs file opens with `//! `", findings);
}

#[test]
fn nothing_unfinished_or_switched_off_is_left() {
    // Of pieces, so that a search for them finds what is unfinished, not this line.
    let macros = ["todo", "dbg", "unimplemented"].map(|name| format!("{name}!("));
    let attribute = format!("#[{}", "ignore");
    let mut needles = vec![&*attribute, "FIXME", "XXX", "thread::sleep("];
    needles.extend(macros.iter().map(String::as_str));
    let files = files();
    let findings = with_extension(&files, "rs")
        .filter(|path| *path != Path::new(SELF))
        // Where tests wait for a condition, and where the storage rests.
        .filter(|path| *path != Path::new("tests/src/wait.rs"))
        .filter(|path| *path != Path::new("storage/src/pace.rs"))
        .flat_map(|path| lines_with(path, &needles))
        .collect();
    check("unfinished, ignored or sleeping code", findings);
}

#[test]
fn tests_sleep_only_between_two_looks() {
    // Each is the one place of its crate that waits for a condition, with a deadline.
    let places = [
        "broker/src/test_wait.rs",
        "cli/src/dev/process_test.rs",
        "controller/tests/service/common.rs",
        "tests/src/wait.rs",
        // A link that is slow, which is the fault itself.
        "tests/src/checker/network.rs",
    ];
    // Files of tests only; what is beside the code it tests in one file is left to readers.
    let is_test = |path: &&Path| {
        let stem = path.file_stem().unwrap_or_default().to_string_lossy();
        stem.ends_with("_test")
            || stem.starts_with("test_")
            || stem == "tests"
            || path.iter().any(|part| part == "tests" || part == "testing")
    };
    let files = files();
    let tests: Vec<&Path> = with_extension(&files, "rs").filter(is_test).collect();
    assert!(tests.len() > 50, "only {} files are tests", tests.len());
    let findings = tests
        .into_iter()
        .filter(|path| *path != Path::new(SELF) && !places.iter().any(|p| *path == Path::new(p)))
        .flat_map(|path| lines_with(path, &["sleep("]))
        .chain(
            with_extension(&files, "go")
                .filter(is_test)
                .flat_map(|path| lines_with(path, &["time.Sleep("])),
        )
        .collect();
    check(
        "a test waits for a condition, in the one place for it",
        findings,
    );
}

#[test]
fn no_machine_and_no_registry_is_named() {
    let needles = [
        "/work/",
        "/home/",
        "/root/",
        "crates.io",
        "npmjs",
        "pypi.org",
        "maven.org",
        "proxy.golang",
        "goproxy",
        "apache.org/maven",
    ];
    let files = files();
    let findings = files
        .iter()
        .filter(|path| path.as_path() != Path::new(SELF))
        // Written by cargo: where a crate comes from is part of its format.
        .filter(|path| path.as_path() != Path::new("Cargo.lock"))
        .flat_map(|path| lines_with(path, &needles))
        .collect();
    check("a machine's path or a registry's host", findings);
}

/// Words that the glossary forbids because another word is meant. Word by word, in Rust and proto.
#[test]
fn one_concept_has_one_word() {
    let forbidden = [
        ("shard", "partition or replica"),
        ("message set", "record batch"),
        ("log tail offset", "log end offset"),
        ("generation id of the partition", "leader epoch"),
    ];
    let files = files();
    let mut findings = Vec::new();
    for path in with_extension(&files, "rs").chain(with_extension(&files, "proto")) {
        if path == Path::new(SELF) {
            continue;
        }
        for (index, line) in text(path)
            .unwrap_or_default()
            .to_lowercase()
            .lines()
            .enumerate()
        {
            for (word, meant) in forbidden {
                let found = line.match_indices(word).any(|(at, _)| {
                    let before = line[..at].chars().next_back();
                    let after = line[at + word.len()..].chars().next();
                    ![before, after]
                        .into_iter()
                        .flatten()
                        .any(char::is_alphanumeric)
                });
                if found {
                    findings.push(format!(
                        "{}:{}: {word}: say {meant}",
                        path.display(),
                        index + 1
                    ));
                }
            }
        }
    }
    check("a forbidden word", findings);
}

#[test]
fn only_the_controllers_db_module_holds_sql() {
    let files = files();
    let findings = with_extension(&files, "rs")
        .filter(|path| !path.starts_with("controller/src/db") && *path != Path::new(SELF))
        .flat_map(|path| {
            lines_with(
                path,
                &["SELECT ", "INSERT INTO", "DELETE FROM", "sqlx::query"],
            )
        })
        .collect();
    check("SQL outside controller/src/db", findings);
}

#[test]
fn migrations_are_numbered_without_gaps_and_never_edited() {
    let files = files();
    let mut names: Vec<String> = files
        .iter()
        .filter(|path| path.starts_with("migrations"))
        .filter(|path| path.extension().is_some_and(|extension| extension == "sql"))
        .filter_map(|path| path.file_name())
        .map(|name| name.to_string_lossy().into_owned())
        .collect();
    names.sort();
    assert!(!names.is_empty(), "there are no migrations");
    for (number, name) in (1..).zip(&names) {
        assert!(
            name.starts_with(&format!("{number:04}_")),
            "{name} should be number {number:04}"
        );
    }
    // What the main branch of the origin holds was applied by somebody's controllers already.
    for name in &names {
        let merged = Command::new("git")
            .args(["show", &format!("origin/main:migrations/{name}")])
            .current_dir(project_root())
            .output()
            .expect("git runs");
        if merged.status.success() {
            let now = text(&Path::new("migrations").join(name)).unwrap_or_default();
            assert!(
                now.as_bytes() == merged.stdout,
                "{name} was edited after it was merged"
            );
        }
    }
}

#[test]
fn sample_configurations_are_accepted() {
    let samples = project_root().join("deploy/config");
    for service in ["controller", "broker", "gateway"] {
        let sample = samples.join(format!("{service}.toml"));
        assert!(sample.is_file(), "{} is missing", sample.display());
        let binary = bin_dir().join(format!("chronik-{service}"));
        let mut command = Command::new(&binary);
        command.arg("--config").arg(&sample).arg("--check-config");
        tools::run_ok(&mut command, "", RUN_DEADLINE);
    }
}

#[test]
fn bad_configuration_is_refused_with_exit_code_64() {
    let folder = tempfile::tempdir().expect("the temporary folder is writable");
    let file = folder.path().join("bad.toml");
    std::fs::write(&file, "no-such-setting = 1\n").expect("the folder is writable");
    for service in ["controller", "broker", "gateway"] {
        let output = Command::new(bin_dir().join(format!("chronik-{service}")))
            .arg("--config")
            .arg(&file)
            .output()
            .expect("the binary runs");
        assert_eq!(
            output.status.code(),
            Some(64),
            "chronik-{service}: {output:?}"
        );
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(
            said.contains("no-such-setting"),
            "chronik-{service} does not name it: {said}"
        );
    }
}

#[test]
fn every_program_tells_what_it_is_for() {
    for service in [
        "chronik-controller",
        "chronik-broker",
        "chronik-gateway",
        "chronik",
    ] {
        let mut command = Command::new(bin_dir().join(service));
        let help = tools::run_ok(command.arg("--help"), "", RUN_DEADLINE);
        assert!(
            help.lines().count() > 5,
            "{service} --help says little: {help}"
        );
    }
}
