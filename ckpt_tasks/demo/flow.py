"""The demo's flow: what a team would write, and nothing else.

``python -m ckpt_tasks.demo.flow STORE TRACKING_URI RUN`` runs it once against the Prefect server
of the environment.
"""

from __future__ import annotations

import sys

from ckpt_tasks.config import RegistryConfig, ScheduleConfig
from ckpt_tasks.integrations.prefect import resumable_flow

__all__ = ["main"]


def main(store: str, tracking_uri: str, run: str) -> None:
    train_digits = resumable_flow(
        "ckpt_tasks.demo.digits:train",
        name="train-digits",
        store=store,
        schedule=ScheduleConfig(every_steps=20, every_epochs=1),
        registry=RegistryConfig(
            tracking_uri=tracking_uri, experiment="digits", best="val_accuracy:max"
        ),
        run_name=run,
        retries=5,
        retry_delay_seconds=(1,),
    )
    train_digits()


if __name__ == "__main__":
    main(*sys.argv[1:])
