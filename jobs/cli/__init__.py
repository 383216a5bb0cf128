"""The hasten command: words to a job's config, help, and the commands beside the jobs."""
