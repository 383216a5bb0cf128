"""KV-cache compression: one mechanism of segments, and the methods that decide what a cache keeps and how."""
