"""A user's training function: found, its parameters read, its source kept."""
