"""Methods that merge tokens into others in place of dropping them."""
