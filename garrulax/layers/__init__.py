"""Floor 2: pure functions on arrays, of which the families are built."""
