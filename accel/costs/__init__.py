"""What a job will hold, move, write and take, from the model's shapes alone. One file a family of jobs."""
