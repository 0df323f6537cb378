-- The cluster's metadata as of raft_applied: what commands made of it.
CREATE TABLE raft_applied (
    id INTEGER PRIMARY KEY CHECK (id = 1),
    log_index INTEGER,
    term INTEGER,
    membership_log_index INTEGER,
    membership_term INTEGER,
    membership TEXT NOT NULL
) STRICT;

CREATE TABLE cluster (
    id INTEGER PRIMARY KEY CHECK (id = 1),
    cluster_id TEXT NOT NULL,
    revision INTEGER NOT NULL,
    controller_leader INTEGER,
    next_raft_group_id INTEGER NOT NULL,
    next_producer_id INTEGER NOT NULL
) STRICT;

CREATE TABLE controllers (
    controller_id INTEGER PRIMARY KEY,
    rpc_address TEXT NOT NULL,
    rest_address TEXT NOT NULL
) STRICT;

CREATE TABLE brokers (
    broker_id INTEGER PRIMARY KEY,
    incarnation_id TEXT NOT NULL,
    broker_epoch INTEGER NOT NULL,
    rpc_address TEXT NOT NULL,
    rack TEXT,
    fenced INTEGER NOT NULL,
    storage_id TEXT NOT NULL
) STRICT;

CREATE TABLE gateways (
    gateway_id TEXT PRIMARY KEY,
    incarnation_id TEXT NOT NULL,
    rack TEXT,
    endpoints TEXT NOT NULL
) STRICT;

CREATE TABLE topics (
    topic_id TEXT PRIMARY KEY,
    name TEXT NOT NULL UNIQUE,
    configs TEXT NOT NULL
) STRICT;

-- replicas: JSON list of broker id and incarnation, preferred leader first; isr: JSON list.
CREATE TABLE partitions (
    topic_id TEXT NOT NULL,
    partition_index INTEGER NOT NULL,
    raft_group_id INTEGER NOT NULL UNIQUE,
    replicas TEXT NOT NULL,
    isr TEXT NOT NULL,
    leader INTEGER,
    leader_epoch INTEGER NOT NULL,
    partition_epoch INTEGER NOT NULL,
    PRIMARY KEY (topic_id, partition_index)
) STRICT, WITHOUT ROWID;
