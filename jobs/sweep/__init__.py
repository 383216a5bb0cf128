"""Sweeps: `hasten JOB --multirun`, a job at many settings on one cluster."""
