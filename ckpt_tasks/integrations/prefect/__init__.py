"""Resumable training under Prefect.

::

    from ckpt_tasks.integrations.prefect import TAG, resumable_flow

    train_digits = resumable_flow("digits.training:train", name="train-digits", store="s3://...")

    if __name__ == "__main__":
        train_digits.serve("digits", tags=[TAG])

Once per server: ``ckpt-tasks prefect install-automations``.
"""

from ckpt_tasks.integrations.prefect.automations import TAG, install_automations
from ckpt_tasks.integrations.prefect.blocks import CheckpointStore, ModelRegistry
from ckpt_tasks.integrations.prefect.flow import resumable_flow
from ckpt_tasks.integrations.prefect.maintenance import maintenance_flow

__all__ = [
    "TAG",
    "CheckpointStore",
    "ModelRegistry",
    "install_automations",
    "maintenance_flow",
    "resumable_flow",
]
