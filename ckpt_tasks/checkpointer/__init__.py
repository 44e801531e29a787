"""From captured state to a committed checkpoint, and back to verified bytes."""
