"""GGUF files, in which llama.cpp keeps models: their names and metadata, reading and writing."""
