"""The registrar's process: tells the registry of checkpoints and metrics, and retains."""
