"""The main job, live: a training is killed twice and ends where an uninterrupted one ends."""

from ckpt_tasks.demo.show import main

__all__ = ["main"]
