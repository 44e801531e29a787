"""The steps of a resumable training, as plain functions that no orchestrator has a part in."""

from ckpt_tasks.tasks.copy import adopt, copy
from ckpt_tasks.tasks.export import ExportReport, export, export_from
from ckpt_tasks.tasks.exporting import ExportRequest, ServedModel
from ckpt_tasks.tasks.find import FoundCheckpoint, WantedCheckpoint, find, parse_wanted
from ckpt_tasks.tasks.locate import LocatedCheckpoint, locate
from ckpt_tasks.tasks.maintain import (
    Maintenance,
    RunMaintenance,
    check_maintained,
    collect_store,
    expire_store,
    maintain,
    maintenance_rows,
    reconcile_store,
)
from ckpt_tasks.tasks.narrate import narrate
from ckpt_tasks.tasks.promote import Promotion, promote
from ckpt_tasks.tasks.reconcile import ReconcileReport, reconcile
from ckpt_tasks.tasks.reconcile_all import reconcile_all
from ckpt_tasks.tasks.recover import RecoveryReport, recover
from ckpt_tasks.tasks.report import Row, RunReport, checkpoint_row, markdown_table, report
from ckpt_tasks.tasks.resolve import resolve, signature_of_entrypoint
from ckpt_tasks.tasks.retain import (
    RetentionReport,
    collect,
    expire,
    expire_checkpoint,
    pin,
    retain,
    unpin,
)
from ckpt_tasks.tasks.sweep import Ranking, Trial, combinations, rank
from ckpt_tasks.tasks.train import is_worth_retrying, train
from ckpt_tasks.tasks.verify import verify

__all__ = [
    "ExportReport",
    "ExportRequest",
    "FoundCheckpoint",
    "LocatedCheckpoint",
    "Maintenance",
    "Promotion",
    "Ranking",
    "ReconcileReport",
    "RecoveryReport",
    "RetentionReport",
    "Row",
    "RunMaintenance",
    "RunReport",
    "ServedModel",
    "Trial",
    "WantedCheckpoint",
    "adopt",
    "check_maintained",
    "checkpoint_row",
    "collect",
    "collect_store",
    "combinations",
    "copy",
    "expire",
    "expire_checkpoint",
    "export",
    "export_from",
    "expire_store",
    "find",
    "is_worth_retrying",
    "locate",
    "maintain",
    "maintenance_rows",
    "markdown_table",
    "narrate",
    "parse_wanted",
    "pin",
    "promote",
    "rank",
    "reconcile",
    "reconcile_all",
    "reconcile_store",
    "recover",
    "report",
    "resolve",
    "retain",
    "signature_of_entrypoint",
    "train",
    "unpin",
    "verify",
]
