"""Jobs sent to a Ray cluster, with the code they need."""
