"""The descriptor of a job, the types of its fields, and the registry of all jobs."""
