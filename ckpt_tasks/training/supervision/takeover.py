"""Whether a trainer died because somebody has taken its run over."""

from __future__ import annotations

import threading

from ckpt_tasks.errors import CkptTasksError, StaleAttemptError
from ckpt_tasks.training.spec import TrainSpec

__all__ = ["is_overtaken"]


def is_overtaken(spec: TrainSpec, attempt: int, *, within: float = 10.0) -> bool:
    """Whether an attempt later than `attempt` has been claimed.

    False too where the store does not say so `within` that many seconds: the attempt's end is
    then told as what it looks like.
    """
    answers: list[bool] = []
    asking = threading.Thread(
        target=lambda: answers.append(_ask_the_fence(spec, attempt)), daemon=True
    )
    asking.start()
    asking.join(within)
    return answers == [True]


def _ask_the_fence(spec: TrainSpec, attempt: int) -> bool:
    # Storage libraries take a while to import: not at the start of every supervisor.
    from ckpt_tasks.fencing.fence import Fence
    from ckpt_tasks.format.layout import RunLayout
    from ckpt_tasks.store.open import open_store

    try:
        store = open_store(spec.config.store)
        try:
            Fence(store, RunLayout(spec.run), attempt).check()
        finally:
            store.close()
    except StaleAttemptError:
        return True
    except CkptTasksError:
        return False
    return False
