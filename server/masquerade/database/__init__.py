"""Where keys, files, jobs, batches and responses are stored: SQLite files, or a PostgreSQL database."""
