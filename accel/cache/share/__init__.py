"""Methods whose layers share what they hold."""
