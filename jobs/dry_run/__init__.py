"""`hasten plan`: what a job will hold, move, write and take."""
