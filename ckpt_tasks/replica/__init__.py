"""Replicas of runs in other stores: copied and verified, and adopted as runs of their own."""

from ckpt_tasks.replica.adopt import adopt
from ckpt_tasks.replica.copy import copy
from ckpt_tasks.replica.report import CopyReport, NotCopied

__all__ = ["CopyReport", "NotCopied", "adopt", "copy"]
