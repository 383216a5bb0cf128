"""Descriptors of jobs, the types of their fields, and the registry of all jobs."""
