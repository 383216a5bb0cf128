"""Methods that read the ids of a prompt before it runs."""
