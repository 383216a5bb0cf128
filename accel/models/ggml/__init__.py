"""ggml's block types, in which GGUF files store matrices: one module a family of types; names are in `types`."""
