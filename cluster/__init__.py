"""Ray actors, scheduling, progress and tracking round what accel computes."""
