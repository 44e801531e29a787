"""The command line, ``ckpt-tasks``."""

from __future__ import annotations

from ckpt_tasks.cli.app import main

__all__ = ["main"]
