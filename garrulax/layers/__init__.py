"""Layer 2: pure functions on arrays, from which the families are built."""
