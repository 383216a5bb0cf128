"""Estimates of a job's memory, traffic, files and seconds, from the model's shapes alone. One file a family of jobs."""
