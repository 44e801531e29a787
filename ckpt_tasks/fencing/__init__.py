"""Attempts: claiming the next one, knowing a stale one, and the lineage that links them."""

from ckpt_tasks.fencing.attempts import AttemptView, list_attempts, next_attempt, read_attempts
from ckpt_tasks.fencing.claim import Attempt, ClaimRequest, claim_attempt, open_run, read_run
from ckpt_tasks.fencing.fence import Fence
from ckpt_tasks.fencing.heartbeat import Heart, HeartbeatObserver
from ckpt_tasks.fencing.lineage import Lineage, extend_lineage, trace_lineage
from ckpt_tasks.fencing.process import end_process, process_is_alive, this_process

__all__ = [
    "Attempt",
    "AttemptView",
    "ClaimRequest",
    "Fence",
    "Heart",
    "HeartbeatObserver",
    "Lineage",
    "claim_attempt",
    "end_process",
    "extend_lineage",
    "list_attempts",
    "next_attempt",
    "open_run",
    "process_is_alive",
    "read_attempts",
    "read_run",
    "this_process",
    "trace_lineage",
]
