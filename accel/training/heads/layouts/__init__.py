"""Layouts in which other programs store trained heads, a file each: to write them, and to draft with such a folder."""
