"""Options, logging, plots, storage and other parts that several jobs use."""
