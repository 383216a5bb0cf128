"""What `hasten report` reads, compares, draws and writes."""
