"""Changes of whole blocks before their layers are compressed."""
