-- reassignment: JSON of the move of replicas that was asked for, none where NULL. wanted_leader: the
-- broker that the leader is asked to hand over to.
ALTER TABLE partitions ADD COLUMN reassignment TEXT;
ALTER TABLE partitions ADD COLUMN wanted_leader INTEGER;
