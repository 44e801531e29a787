"""Which checkpoints are kept: planned as data, marked by `expire`, removed by `collect`."""

from ckpt_tasks.retention.collect import collect
from ckpt_tasks.retention.expire import expire, expire_checkpoint, plan_run
from ckpt_tasks.retention.pins import pin, unpin
from ckpt_tasks.retention.plan import RetentionPlan, Verdict, plan
from ckpt_tasks.retention.report import CollectReport, Remaining

__all__ = [
    "CollectReport",
    "Remaining",
    "RetentionPlan",
    "Verdict",
    "collect",
    "expire",
    "expire_checkpoint",
    "pin",
    "plan",
    "plan_run",
    "unpin",
]
