"""MLflow: one writer, journals, stores and what a run is tagged with."""
