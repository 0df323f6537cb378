-- Only in the file of a backup: what it is. checksum: CRC-64 of the state that the other tables hold.
CREATE TABLE backup (
    id INTEGER PRIMARY KEY CHECK (id = 1),
    backup_id TEXT NOT NULL,
    created_at_ms INTEGER NOT NULL,
    checksum INTEGER NOT NULL
) STRICT;
