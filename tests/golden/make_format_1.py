"""Makes ``tests/golden/format-1``: a run of two attempts in a store of format 1.

Usage: ``PYTHONPATH=tests python tests/golden/make_format_1.py FOLDER``; the folder must not exist
yet. Once format 1 is released its golden run is never made again: it then stands for all the
checkpoints that users have.
"""

from __future__ import annotations

import sys
from pathlib import Path

import msgspec
from golden.golden_state import loop_state, seed_generators, trained
from support.made_runs import MadeAttempt, MadeRun

from ckpt_tasks.checkpointer.marks import mark, write_completed
from ckpt_tasks.format.codec import encode
from ckpt_tasks.format.records import (
    CompletedRecord,
    Failure,
    Heartbeat,
    Process,
    RegistryRunIds,
    now,
)
from ckpt_tasks.state.capture import capture
from ckpt_tasks.state.rng import capture_rng
from ckpt_tasks.store import open_store
from ckpt_tasks.types import Position, SaveDecision

RUN = "digits/ü 1"


def make(folder: Path) -> None:
    """Make the run."""
    folder.mkdir()
    with open_store(str(folder)) as store:
        run = MadeRun(store, RUN)
        first = begin(run)
        checkpoint = save(first, 4, Position(epoch=0, step=4))
        mark(store, run.layout, "pins", checkpoint, why="for the paper", by="ada")
        store.put(
            run.layout.heartbeat(1),
            encode(
                Heartbeat(
                    attempt=1,
                    beat=3,
                    at=now(),
                    step=5,
                    ended=True,
                    failure=Failure(kind="RuntimeError: out of memory", step=5),
                )
            ),
        )
        second = begin(run)
        newest = save(second, 8, Position(epoch=1, step=8, phase="epoch_done"))
        ids = RegistryRunIds(
            tracking_uri="http://mlflow.example:5000",
            experiment_id="7",
            experiment="digits",
            run_id="0123456789abcdef0123456789abcdef",
            registered_model="digits",
        )
        store.create(run.layout.registry_ids("mlflow"), encode(ids))
        write_completed(
            store,
            run.layout,
            CompletedRecord(
                uid=run.identity.uid,
                attempt=2,
                checkpoint=str(newest),
                position=run.record(newest).position,
                completed_at=now(),
            ),
        )


def begin(run: MadeRun) -> MadeAttempt:
    """An attempt of a machine that is nobody's."""
    made = run.begin("flow-run-1", hyperparameters={"lr": 0.1})
    process = Process(host="trainer", boot_id="00000000", pid=1000 + made.number, started=1)
    claim = msgspec.structs.replace(made.attempt.claim, process=process)
    run.store.put(run.layout.attempt(made.number), encode(claim))
    return made


def save(made: MadeAttempt, step: int, position: Position) -> object:
    """A checkpoint of the golden state after so many steps."""
    model, optimizer = trained(step)
    seed_generators(step)
    state = capture(
        {
            "model": model,
            "optimizer": optimizer,
            "state": loop_state(step),
            "ckpt_tasks.rng": capture_rng(),
        }
    )
    return made.save(
        step,
        state,  # type: ignore[arg-type]
        position=position,
        decision=SaveDecision("steps", "every 4 steps"),
        metrics={"loss": 1 / step, "worst": "nan"},
        rows=[("loss", 1 / step, step, 1_700_000_000_000 + step), ("worst", "nan", step, 1)],
    )


if __name__ == "__main__":
    make(Path(sys.argv[1]))
