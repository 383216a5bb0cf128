"""Ray actors: thin classes that hold state, call accel and report."""
