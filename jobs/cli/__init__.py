"""The hasten command: from words to a job's config, help, and the commands besides the jobs."""
