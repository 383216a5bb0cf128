"""Scripts run by the Python of a peer's own environment; hasten starts them as files and never imports them."""
