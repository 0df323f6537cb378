-- What an operator wants a broker to be free of: none, leaders or replicas.
ALTER TABLE brokers ADD COLUMN drain TEXT NOT NULL DEFAULT 'none';
