"""The supervisor of an attempt: starts its processes, and says how they ended."""
