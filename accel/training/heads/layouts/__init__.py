"""Layouts of trained heads that other programs write and read, one a file."""
