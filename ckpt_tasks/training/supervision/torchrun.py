"""What torchrun tells each of its workers, in their environment.

https://docs.pytorch.org/docs/stable/elastic/run.html#environment-variables
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Mapping
from pathlib import Path

from ckpt_tasks.errors import ConfigError
from ckpt_tasks.fencing.process import this_process
from ckpt_tasks.training.spec import RankPlace, TrainOutcome

__all__ = [
    "is_first_of_machine",
    "started_by_torchrun",
    "tell_torchrun",
    "torchrun_invocation",
    "torchrun_place",
]

_RUN_ID = "TORCHELASTIC_RUN_ID"
_NO_RUN_ID = "none"
_ERROR_FILE = "TORCHELASTIC_ERROR_FILE"


def started_by_torchrun(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether this process is one of its workers."""
    return _RUN_ID in environment


def is_first_of_machine(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether this worker is the one that says what people need to be told once on a machine."""
    return environment.get("LOCAL_RANK", "0") == "0"


def torchrun_place(environment: Mapping[str, str] = os.environ) -> RankPlace | None:
    """Where this worker stands; ``None`` for the only one, which has nobody to agree with.

    Raises `ConfigError` where torchrun's variables have been changed.
    """
    try:
        ranks = int(environment["WORLD_SIZE"])
        if ranks == 1:
            return None
        return RankPlace(
            rank=int(environment["RANK"]),
            ranks=ranks,
            host=environment["MASTER_ADDR"],
            port=int(environment["MASTER_PORT"]),
            served=environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
            one_machine=int(environment["LOCAL_WORLD_SIZE"]) == ranks,
        )
    except (KeyError, ValueError) as error:
        raise ConfigError(
            f"{_RUN_ID} is set, but torchrun's other variables are not as it sets them: {error}"
        ) from error


def torchrun_invocation(environment: Mapping[str, str] = os.environ) -> str:
    """The same at each of torchrun's own restarts, so that an attempt follows the one before.

    That is the job's id, or, where none was given, the agent that starts rank 0: this process's
    parent.
    """
    run_id = environment[_RUN_ID]
    if run_id != _NO_RUN_ID:
        return f"torchrun-{run_id}"
    agent = this_process(os.getppid())
    return f"torchrun-{agent.host}-{agent.pid}-{agent.started}"


def tell_torchrun(outcome: TrainOutcome, environment: Mapping[str, str] = os.environ) -> None:
    """Have its agent show why this worker failed, in the summary that it prints.

    In the form of ``torch.distributed.elastic.multiprocessing.errors``; what the training has
    written there itself stays.
    """
    path = environment.get(_ERROR_FILE)
    if path is None or outcome.done:
        return
    said = {"message": outcome.message, "extraInfo": {"timestamp": str(int(time.time()))}}
    # It is told in the output as well.
    with contextlib.suppress(OSError), Path(path).open("x", encoding="utf-8") as file:
        json.dump({"message": said}, file)
