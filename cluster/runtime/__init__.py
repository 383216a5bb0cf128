"""The Ray session and what runs on it: placement, actor pools, recovery, resources."""
