"""`hasten report`: reads and compares runs, draws charts, and writes tables and pages."""
