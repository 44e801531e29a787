"""What several ranks agree on: when to save, what they start from, and how they end."""
