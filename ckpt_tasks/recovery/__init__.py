"""Which checkpoint a retry starts from, and bringing it back verified."""
