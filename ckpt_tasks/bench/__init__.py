"""What a storage can do, measured beside what else writes checkpoints."""
