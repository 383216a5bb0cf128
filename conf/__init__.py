"""Hydra configs of hasten: one file per job, one folder per choice. Nothing but YAML lives here."""
