"""migrationctl, the tool for people. Nothing in the daemon imports it."""
