-- JSON of the settings that operators change while the cluster runs; '{}' stands for the defaults.
ALTER TABLE cluster ADD COLUMN settings TEXT NOT NULL DEFAULT '{}';
