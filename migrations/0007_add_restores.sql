-- restores: JSON list of the restores that this state has been through. pending_restore: JSON of the
-- backup that this state was taken from, until a leader has begun anew with it; NULL otherwise.
ALTER TABLE cluster ADD COLUMN restores TEXT NOT NULL DEFAULT '[]';
ALTER TABLE cluster ADD COLUMN pending_restore TEXT;
