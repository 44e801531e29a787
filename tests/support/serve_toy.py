"""Serves the toy training as a Prefect deployment; a test starts this file and kills it.

Environment
-----------
TOY_NAME, TOY_STORE
    Of the flow and its deployment; the store's root.
TOY_RUN_NAME
    Of the training run, a template.
TOY_MLFLOW
    Tracking URI; empty: no registry.
TOY_EXPERIMENT
    In MLflow; also the registered model's name.
TOY_FUNCTION
    Function of `toy_training`; default ``train``.
"""

from __future__ import annotations

import os

from ckpt_tasks.config import AttemptConfig, RegistryConfig, ScheduleConfig
from ckpt_tasks.integrations.prefect import TAG, resumable_flow

toy = resumable_flow(
    f"support.toy_training:{os.environ.get('TOY_FUNCTION', 'train')}",
    name="toy",
    store=os.environ["TOY_STORE"],
    run_name=os.environ["TOY_RUN_NAME"],
    schedule=ScheduleConfig(every_steps=3),
    registry=RegistryConfig(
        tracking_uri=os.environ["TOY_MLFLOW"] or None,
        experiment=os.environ["TOY_EXPERIMENT"],
        best="loss:min",
    ),
    attempt=AttemptConfig(heartbeat=1.0, takeover_after=5.0, grace=10.0, without_commit=3),
    retries=2,
    retry_delay_seconds=[0.5],
)

if __name__ == "__main__":
    toy.serve(name=os.environ["TOY_NAME"], tags=[TAG], pause_on_shutdown=False)
