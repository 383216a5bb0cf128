"""`hasten plan`: memory, traffic, files and time of a job before it runs."""
