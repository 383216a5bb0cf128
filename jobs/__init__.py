"""The hasten command and its jobs."""
