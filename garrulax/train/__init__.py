"""Training: short pure pieces (objectives, schedules, optimizers, step) and one loop that wires them."""
