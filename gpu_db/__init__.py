"""One SQLite file per GPU model: migrations, trials, what is known, exchange with other people's files."""
