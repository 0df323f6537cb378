-- Who this controller is in the Raft group. disk_id: made together with this file. controller_id and
-- incarnation: NULL until it is decided as whom it takes part. founders: JSON list of controller id and
-- disk id, those whose disks the group was founded with, as far as this controller was told.
-- raft_vote.voted_for and the memberships in raft_log and raft_applied hold node ids: the controller id
-- plus 65536 times the incarnation.
CREATE TABLE raft_identity (
    id INTEGER PRIMARY KEY CHECK (id = 1),
    disk_id TEXT NOT NULL,
    controller_id INTEGER,
    incarnation INTEGER,
    founders TEXT NOT NULL DEFAULT '[]'
) STRICT;
