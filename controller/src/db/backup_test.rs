//! What is taken for a backup, and what is not.

use std::collections::BTreeMap;
use std::path::PathBuf;

use chronik_types::id::{BrokerId, TopicId};
use tempfile::TempDir;

use super::*;
use crate::apply::apply;
use crate::command::{Command, RegisterBroker, TopicPlan};
use crate::state::State;

/// A broker, and a topic on it.
fn dump() -> StateDump {
    let mut state = State::default();
    let register = RegisterBroker {
        broker_id: BrokerId(1),
        incarnation_id: Uuid::from_u128(1),
        rpc_address: "b1:1".to_owned(),
        rack: Some("it's".to_owned()),
        storage_id: Uuid::from_u128(2),
        held: None,
    };
    apply(&mut state, Command::RegisterBroker(register));
    let plan = TopicPlan {
        topic_id: TopicId(Uuid::from_u128(3)),
        name: "t".to_owned(),
        configs: BTreeMap::from([("retention.ms".to_owned(), "5".to_owned())]),
        assignments: vec![vec![BrokerId(1)]; 3],
    };
    apply(&mut state, Command::CreateTopics { topics: vec![plan] });
    StateDump::from(&state)
}

fn label() -> BackupLabel {
    BackupLabel {
        backup_id: Uuid::from_u128(4),
        created_at_ms: 5,
    }
}

/// A backup in which `changes` were made behind its back.
async fn changed_backup(folder: &TempDir, changes: &[&'static str]) -> (PathBuf, SqliteConnection) {
    let file = folder.path().join("a.backup");
    write(&file, &dump(), &label()).await.unwrap();
    let mut connection = options(&file).connect().await.unwrap();
    for change in changes {
        execute(&mut connection, change).await.unwrap();
    }
    (file, connection)
}

async fn refusal(changes: &[&'static str]) -> String {
    let folder = tempfile::tempdir().unwrap();
    let (file, connection) = changed_backup(&folder, changes).await;
    connection.close().await.unwrap();
    read(&file).await.unwrap_err().to_string()
}

#[tokio::test]
async fn a_backup_of_an_older_schema_can_be_read() {
    let folder = tempfile::tempdir().unwrap();
    // Before controllers knew of restores: the last schema before backups themselves came.
    let older = [
        "ALTER TABLE cluster DROP COLUMN restores",
        "ALTER TABLE cluster DROP COLUMN pending_restore",
        "DELETE FROM _sqlx_migrations WHERE version = 7",
    ];
    let (file, mut connection) = changed_backup(&folder, &older).await;
    let (backup_id, created_at_ms, _) = load_label(&mut connection).await.unwrap().unwrap();
    let checksum = checksum_of(&mut connection, &backup_id, created_at_ms);
    let checksum = checksum.await.unwrap();
    sqlx::query("UPDATE backup SET checksum = ?")
        .bind(checksum)
        .execute(&mut connection)
        .await
        .unwrap();
    connection.close().await.unwrap();
    assert_eq!(read(&file).await.unwrap(), (dump(), label()));
}

#[tokio::test]
async fn a_backup_is_what_was_written_and_nothing_else() {
    for change in [
        "UPDATE partitions SET leader_epoch = 7 WHERE partition_index = 2",
        "UPDATE brokers SET rack = NULL",
        "DELETE FROM partitions WHERE partition_index = 2",
        "INSERT INTO controllers VALUES (1, 'a', 'b')",
        "UPDATE backup SET backup_id = '00000000-0000-0000-0000-000000000009'",
        "UPDATE backup SET created_at_ms = 6",
    ] {
        let why = refusal(&[change]).await;
        assert!(why.contains("its checksum is wrong"), "{change}: {why}");
    }
    let why = refusal(&["DELETE FROM backup"]).await;
    assert!(why.contains("the database of a controller"), "{why}");
    let why = refusal(&["DROP TABLE backup", "DELETE FROM cluster"]).await;
    assert!(why.contains("it holds no state of a cluster"), "{why}");
    let later =
        "INSERT INTO _sqlx_migrations (version, description, success, checksum, execution_time)
                 VALUES (999, 'later', TRUE, x'00', 0)";
    let other_label = "ALTER TABLE backup RENAME COLUMN checksum TO digest";
    for newer in [&[later][..], &[later, other_label]] {
        let why = refusal(newer).await;
        assert!(why.contains("a newer version of Chronik"), "{why}");
    }
}
