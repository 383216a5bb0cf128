"""Methods that zero small elements of keys and values, or write them in fewer dimensions."""
