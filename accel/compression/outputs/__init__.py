"""Folders that a run fills and a killed run continues: compressed checkpoints, locks and atomic writes."""
