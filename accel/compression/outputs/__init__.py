"""Output folders of runs that can be resumed: compressed checkpoints, locks and atomic writes."""
