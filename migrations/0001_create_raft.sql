-- Raft of the controllers: vote and log. `voted_for` is a controller id.
CREATE TABLE raft_vote (
    id INTEGER PRIMARY KEY CHECK (id = 1),
    term INTEGER NOT NULL,
    voted_for INTEGER NOT NULL,
    committed INTEGER NOT NULL
) STRICT;

-- Everything up to and including this log id is gone from raft_log.
CREATE TABLE raft_purged (
    id INTEGER PRIMARY KEY CHECK (id = 1),
    log_index INTEGER NOT NULL,
    term INTEGER NOT NULL
) STRICT;

-- kind: blank, command or membership; payload: JSON.
CREATE TABLE raft_log (
    log_index INTEGER PRIMARY KEY,
    term INTEGER NOT NULL,
    kind TEXT NOT NULL,
    payload TEXT NOT NULL
) STRICT;
