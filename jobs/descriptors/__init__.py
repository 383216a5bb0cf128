"""What a job says of itself: its descriptor, and the list of all jobs."""
