"""``python -m ckpt_tasks``: the command line."""

from __future__ import annotations

from ckpt_tasks.cli import main

if __name__ == "__main__":
    main()
