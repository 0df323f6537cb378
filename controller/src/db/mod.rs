//! The controller's SQLite file: Raft log, vote and state tables. The only module with SQL.
//!
//! Invariant: one worker owns the one connection and does the jobs in the order they were sent;
//! what has queued up meanwhile goes into one transaction, which is synced before anybody is told.
//! After a failed write nothing more is written: the process has to stop.

pub mod backup;
mod identity;
mod raft_tables;
mod state_tables;

use std::fs::{File, TryLockError};
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use sqlx::migrate::{MigrateError, Migrator};
use sqlx::sqlite::{SqliteConnectOptions, SqliteJournalMode, SqliteSynchronous};
use sqlx::{ConnectOptions, Connection, SqliteConnection};
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinHandle;
use uuid::Uuid;

pub use raft_tables::{KIND_BLANK, KIND_COMMAND, KIND_MEMBERSHIP, LogPosition, LogRow, VoteRow};
pub use state_tables::{AppliedRow, ClusterRow, StateRows};

use crate::founding::Identity;
use crate::state::StateDump;

pub const FILE_NAME: &str = "controller.db";
const LOCK_NAME: &str = "lock";
/// Size that SQLite's own write-ahead log goes back to.
const JOURNAL_BYTES_MAX: &str = "16777216";
/// Jobs that may wait for the worker.
const JOBS_MAX: usize = 1024;
/// Jobs that go into one transaction.
const TRANSACTION_JOBS_MAX: usize = 256;

/// Why the database cannot be used.
#[derive(Debug, Clone, thiserror::Error)]
pub enum DbError {
    #[error("data folder {0} is in use by another process")]
    InUse(PathBuf),
    #[error("cannot use data folder {folder}: {source}")]
    Folder {
        folder: PathBuf,
        source: Arc<std::io::Error>,
    },
    #[error("database: {0}")]
    Sql(Arc<sqlx::Error>),
    #[error("database schema: {0}")]
    Migrate(Arc<MigrateError>),
    #[error("database holds an unreadable {what}: {why}")]
    Corrupt { what: &'static str, why: String },
    #[error("database was closed by an earlier failed write")]
    Closed,
}

impl From<sqlx::Error> for DbError {
    fn from(error: sqlx::Error) -> Self {
        Self::Sql(Arc::new(error))
    }
}

impl From<DbError> for std::io::Error {
    fn from(error: DbError) -> Self {
        std::io::Error::other(error)
    }
}

/// Called once the job is synced, or has failed.
pub type Done = Box<dyn FnOnce(Result<(), DbError>) + Send>;

/// What the database held when it was opened.
#[derive(Debug)]
pub struct Contents {
    pub identity: Identity,
    pub vote: Option<VoteRow>,
    pub purged: Option<LogPosition>,
    pub log: Vec<LogRow>,
    pub applied: Option<AppliedRow>,
    pub state: Option<StateDump>,
}

impl Contents {
    /// Whether Raft has ever written into this database.
    pub fn has_raft_data(&self) -> bool {
        self.vote.is_some()
            || self.purged.is_some()
            || self.applied.is_some()
            || !self.log.is_empty()
    }
}

/// Sends jobs to the worker. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Db {
    jobs: mpsc::Sender<Job>,
}

enum Job {
    Append {
        rows: Vec<LogRow>,
        done: Done,
    },
    SaveVote {
        vote: VoteRow,
        done: Done,
    },
    SaveIdentity {
        identity: Box<Identity>,
        done: Done,
    },
    TruncateAfter {
        index: Option<u64>,
        done: Done,
    },
    Purge {
        upto: LogPosition,
        done: Done,
    },
    ReadLog {
        range: RangeInclusive<u64>,
        reply: oneshot::Sender<Result<Vec<LogRow>, DbError>>,
    },
    SaveState {
        rows: Box<StateRows>,
        done: Done,
    },
    ReplaceState {
        dump: Box<StateDump>,
        applied: AppliedRow,
        done: Done,
    },
}

impl Db {
    /// Opens or creates the database in `folder` and starts its worker, which ends when the last
    /// `Db` is dropped. The folder is locked for this process.
    pub async fn open(folder: &Path) -> Result<(Db, Contents, JoinHandle<()>), DbError> {
        let lock = lock_folder(folder)?;
        let mut connection = connect(&folder.join(FILE_NAME)).await?;
        migrate(&mut connection)
            .await
            .map_err(|error| DbError::Migrate(Arc::new(error)))?;
        let contents = load(&mut connection).await?;
        let (jobs, queue) = mpsc::channel(JOBS_MAX);
        let worker = tokio::spawn(
            Worker {
                connection,
                queue,
                _lock: lock,
            }
            .run(),
        );
        Ok((Db { jobs }, contents, worker))
    }

    pub async fn append(&self, rows: Vec<LogRow>, done: Done) {
        self.send(Job::Append { rows, done }).await;
    }

    pub async fn save_vote(&self, vote: VoteRow) -> Result<(), DbError> {
        self.send_and_wait(|done| Job::SaveVote { vote, done })
            .await
    }

    pub async fn save_identity(&self, identity: Identity) -> Result<(), DbError> {
        let identity = Box::new(identity);
        self.send_and_wait(|done| Job::SaveIdentity { identity, done })
            .await
    }

    /// Removes all log entries above `index`; all of them if there is none.
    pub async fn truncate_after(&self, index: Option<u64>) -> Result<(), DbError> {
        self.send_and_wait(|done| Job::TruncateAfter { index, done })
            .await
    }

    pub async fn purge(&self, upto: LogPosition) -> Result<(), DbError> {
        self.send_and_wait(|done| Job::Purge { upto, done }).await
    }

    pub async fn read_log(&self, range: RangeInclusive<u64>) -> Result<Vec<LogRow>, DbError> {
        let (reply, answer) = oneshot::channel();
        self.send(Job::ReadLog { range, reply }).await;
        answer.await.unwrap_or(Err(DbError::Closed))
    }

    pub async fn save_state(&self, rows: StateRows) -> Result<(), DbError> {
        let rows = Box::new(rows);
        self.send_and_wait(|done| Job::SaveState { rows, done })
            .await
    }

    pub async fn replace_state(&self, dump: StateDump, applied: AppliedRow) -> Result<(), DbError> {
        let dump = Box::new(dump);
        self.send_and_wait(|done| Job::ReplaceState {
            dump,
            applied,
            done,
        })
        .await
    }

    async fn send_and_wait(&self, job: impl FnOnce(Done) -> Job) -> Result<(), DbError> {
        let (reply, answer) = oneshot::channel();
        let done: Done = Box::new(move |result| {
            let _ = reply.send(result);
        });
        self.send(job(done)).await;
        answer.await.unwrap_or(Err(DbError::Closed))
    }

    async fn send(&self, job: Job) {
        if let Err(mpsc::error::SendError(job)) = self.jobs.send(job).await {
            job.fail(&DbError::Closed);
        }
    }
}

impl Job {
    fn fail(self, error: &DbError) {
        match self {
            Job::ReadLog { reply, .. } => {
                let _ = reply.send(Err(error.clone()));
            }
            Job::Append { done, .. }
            | Job::SaveVote { done, .. }
            | Job::SaveIdentity { done, .. }
            | Job::TruncateAfter { done, .. }
            | Job::Purge { done, .. }
            | Job::SaveState { done, .. }
            | Job::ReplaceState { done, .. } => done(Err(error.clone())),
        }
    }
}

struct Worker {
    connection: SqliteConnection,
    queue: mpsc::Receiver<Job>,
    _lock: File,
}

impl Worker {
    async fn run(mut self) {
        while let Some(first) = self.queue.recv().await {
            let mut jobs = vec![first];
            while jobs.len() < TRANSACTION_JOBS_MAX
                && let Ok(job) = self.queue.try_recv()
            {
                jobs.push(job);
            }
            if let Err(error) = self.transaction(jobs).await {
                tracing::error!(%error, "database write failed: the controller stops");
                // Later jobs fail as the queue is dropped with its sender side still open.
                self.queue.close();
                while let Some(job) = self.queue.recv().await {
                    job.fail(&DbError::Closed);
                }
                return;
            }
        }
        if let Err(error) = self.connection.close().await {
            tracing::warn!(%error, "database was not closed in order");
        }
    }

    /// Runs the jobs in one transaction, then tells each of them.
    async fn transaction(&mut self, jobs: Vec<Job>) -> Result<(), DbError> {
        let mut unfinished: Vec<Done> = Vec::with_capacity(jobs.len());
        let mut result = execute(&mut self.connection, "BEGIN IMMEDIATE").await;
        for job in jobs {
            if result.is_err() {
                job.fail(&DbError::Closed);
                continue;
            }
            let (outcome, done) = run_job(&mut self.connection, job).await;
            unfinished.extend(done);
            result = outcome;
        }
        if result.is_ok() {
            result = execute(&mut self.connection, "COMMIT").await;
        }
        for done in unfinished {
            done(result.clone());
        }
        result
    }
}

async fn run_job(
    connection: &mut SqliteConnection,
    job: Job,
) -> (Result<(), DbError>, Option<Done>) {
    match job {
        Job::Append { rows, done } => {
            (raft_tables::insert_log(connection, &rows).await, Some(done))
        }
        Job::SaveVote { vote, done } => {
            (raft_tables::save_vote(connection, vote).await, Some(done))
        }
        Job::SaveIdentity { identity, done } => {
            (identity::save(connection, &identity).await, Some(done))
        }
        Job::TruncateAfter { index, done } => (
            raft_tables::truncate_after(connection, index).await,
            Some(done),
        ),
        Job::Purge { upto, done } => (raft_tables::purge(connection, upto).await, Some(done)),
        Job::ReadLog { range, reply } => {
            let _ = reply.send(raft_tables::read_log(connection, range).await);
            (Ok(()), None)
        }
        Job::SaveState { rows, done } => (state_tables::save(connection, &rows).await, Some(done)),
        Job::ReplaceState {
            dump,
            applied,
            done,
        } => (
            state_tables::replace(connection, &dump, &applied).await,
            Some(done),
        ),
    }
}

static MIGRATIONS: Migrator = sqlx::migrate!("../migrations");

async fn migrate(connection: &mut SqliteConnection) -> Result<(), MigrateError> {
    // `run_direct`, since the future of `run` is not `Send`.
    MIGRATIONS.run_direct(None, connection, false).await
}

async fn execute(connection: &mut SqliteConnection, sql: &'static str) -> Result<(), DbError> {
    sqlx::query(sql).execute(connection).await?;
    Ok(())
}

/// Reads everything. A file without an identity gets one.
async fn load(connection: &mut SqliteConnection) -> Result<Contents, DbError> {
    let (applied, state) = state_tables::load(connection).await?;
    let vote = raft_tables::load_vote(connection).await?;
    let purged = raft_tables::load_purged(connection).await?;
    let log = raft_tables::read_log(connection, 0..=u64::MAX).await?;
    let identity = match identity::load(connection).await? {
        Some(identity) => identity,
        None => {
            let identity = Identity::of_new_disk(Uuid::new_v4());
            identity::save(connection, &identity).await?;
            identity
        }
    };
    Ok(Contents {
        identity,
        vote,
        purged,
        log,
        applied,
        state,
    })
}

async fn connect(file: &Path) -> Result<SqliteConnection, DbError> {
    let options = SqliteConnectOptions::new()
        .filename(file)
        .create_if_missing(true)
        .journal_mode(SqliteJournalMode::Wal)
        .synchronous(SqliteSynchronous::Full)
        // What a large transaction has made of the file beside it is given back.
        .pragma("journal_size_limit", JOURNAL_BYTES_MAX)
        .disable_statement_logging();
    Ok(options.connect().await?)
}

fn lock_folder(folder: &Path) -> Result<File, DbError> {
    let unusable = |source: std::io::Error| DbError::Folder {
        folder: folder.to_owned(),
        source: Arc::new(source),
    };
    std::fs::create_dir_all(folder).map_err(unusable)?;
    let lock = File::create(folder.join(LOCK_NAME)).map_err(unusable)?;
    match lock.try_lock() {
        Ok(()) => Ok(lock),
        Err(TryLockError::WouldBlock) => Err(DbError::InUse(folder.to_owned())),
        Err(TryLockError::Error(source)) => Err(unusable(source)),
    }
}
