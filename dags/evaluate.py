"""Evaluates the digits model whenever ``dags/train.py`` has a new one, verified and promoted.

The event of the training run's asset names the checkpoint: its address, and the digest that
proves that it is the one. The model is loaded in a process with torch, which the interpreter of
Airflow's worker needs not have: set ``CKPT_TASKS_DAGS_PYTHON`` to one that has it.
"""

import os
import sys

from airflow.sdk import DAG, Param, task
from airflow.sdk.exceptions import AirflowFailException

from ckpt_tasks.integrations.airflow import run_asset

PYTHON = os.environ.get("CKPT_TASKS_DAGS_PYTHON", sys.executable)

with DAG(
    "evaluate-digits",
    schedule=[run_asset("train-digits")],
    params={
        "uri": Param(None, type=["null", "string"], description="Another checkpoint's address."),
        "digest": Param(None, type=["null", "string"], description="Its record's digest."),
    },
    tags=["ckpt-tasks"],
):

    @task
    def choose_checkpoint(params=None, triggering_asset_events=None):
        """The newest checkpoint of the events that started this DAG run, or the one asked for."""
        events = triggering_asset_events[run_asset("train-digits")]
        newest = max(events, key=lambda event: event.timestamp, default=None)
        told = params if params["uri"] or newest is None else newest.extra
        if not told["uri"]:
            raise AirflowFailException(
                "no event of train-digits started this run; trigger that DAG, or give a uri"
            )
        return {name: told[name] for name in ("uri", "digest")}

    @task.external_python(python=PYTHON, expect_airflow=False)
    def evaluate(checkpoint):
        """Load the model where torch is, and count what it recognises."""
        from ckpt_tasks.demo.evaluation import held_out_accuracy

        accuracy = held_out_accuracy(**checkpoint)
        print(f"{checkpoint['uri']}: {accuracy:.1%} of the held-out images recognised")
        return accuracy

    evaluate(choose_checkpoint())
