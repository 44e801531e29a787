"""A checkpoint newer or better than a bound, for those who wait for one.

``python -m ckpt_tasks.tasks.find`` looks in a process of its own: the request as JSON on its
standard input, the answer as JSON on its standard output. Who cannot wait in its own process,
or must not have the credentials in its environment, has it look there.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Iterator
from typing import Literal

import msgspec

from ckpt_tasks.checkpointer.catalog import RunView, view_run
from ckpt_tasks.config import CheckpointConfig
from ckpt_tasks.errors import (
    CheckpointNotFoundError,
    CkptTasksError,
    ConfigError,
    RegistryError,
    StoreError,
)
from ckpt_tasks.format.layout import RunLayout
from ckpt_tasks.format.records import CommitRecord
from ckpt_tasks.registry import Registration, load_registry
from ckpt_tasks.store import Store, open_store
from ckpt_tasks.tasks.locate import LocatedCheckpoint, describe
from ckpt_tasks.tasks.registered import attach
from ckpt_tasks.types import CheckpointId

__all__ = [
    "FindAnswer",
    "FindRequest",
    "FoundCheckpoint",
    "WantedCheckpoint",
    "find",
    "parse_wanted",
]


class WantedCheckpoint(msgspec.Struct, frozen=True, kw_only=True):
    """What is waited for; every bound given holds. Made by `parse_wanted`.

    Parameters
    ----------
    after_step
        The checkpoint's step is greater.
    after
        It was committed later than the checkpoint of this id, whatever its step: an attempt may
        have gone back.
    metric, mode, bound
        Its metric is less (``min``) or greater (``max``) than the bound.
    """

    run: str
    after_step: int | None = None
    after: str | None = None
    metric: str | None = None
    mode: Literal["min", "max"] = "min"
    bound: float = 0.0

    def __str__(self) -> str:
        bounds = []
        if self.after_step is not None:
            bounds.append(f"newer than step {self.after_step}")
        if self.after is not None:
            bounds.append(f"newer than {self.after}")
        if self.metric is not None:
            sign = "<" if self.mode == "min" else ">"
            bounds.append(f"with {self.metric} {sign} {self.bound:g}")
        return f"a checkpoint of run {self.run!r}{''.join(f' {bound}' for bound in bounds)}"

    def accepts(self, record: CommitRecord) -> bool:
        """Whether a checkpoint is within the bounds."""
        if self.after_step is not None and record.position.step <= self.after_step:
            return False
        if self.after is not None and _age(record.id) <= _age(self.after):
            return False
        if self.metric is None:
            return True
        value = float(record.metrics.get(self.metric, math.nan))
        return value < self.bound if self.mode == "min" else value > self.bound


class FoundCheckpoint(msgspec.Struct, frozen=True, kw_only=True):
    """A checkpoint within the bounds.

    Parameters
    ----------
    registration
        What the registry calls it; ``None`` without one.
    links
        The registry's pages about it, for people.
    """

    checkpoint: LocatedCheckpoint
    registration: Registration | None
    links: dict[str, str] = {}


class FindRequest(msgspec.Struct, frozen=True, kw_only=True):
    """What the process of its own is asked."""

    config: CheckpointConfig
    wanted: WantedCheckpoint


class FindAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """What it answers: a checkpoint, or none yet, or what went wrong."""

    found: FoundCheckpoint | None = None
    error: str | None = None
    retryable: bool = False


def parse_wanted(
    run: str, *, newer_than: int | str | None = None, better_than: str | None = None
) -> WantedCheckpoint:
    """What is waited for, from what people write.

    Parameters
    ----------
    newer_than
        A step, or a checkpoint's id.
    better_than
        ``METRIC:min:BOUND`` or ``METRIC:max:BOUND``.

    Raises
    ------
    ConfigError
        The run's name or a bound cannot be read.
    """
    RunLayout(run)
    wanted = WantedCheckpoint(run=run)
    if newer_than is not None:
        wanted = _with_age(wanted, str(newer_than).strip())
    return wanted if better_than is None else _with_metric(wanted, better_than)


def find(config: CheckpointConfig, wanted: WantedCheckpoint) -> FoundCheckpoint | None:
    """The newest valid checkpoint within the bounds; registered, where there is a registry.

    Without a ``registry.tracking_uri`` a committed checkpoint suffices.

    Returns
    -------
    FoundCheckpoint | None
        ``None``: there is none yet, or no such run yet.

    Raises
    ------
    StoreError, RegistryError
        Storage or the registry did not answer; worth repeating.
    ConfigError
        The configuration cannot work.
    """
    store = open_store(config.store)
    try:
        view = view_run(store, wanted.run)
        records = [record for record in _valid(view) if wanted.accepts(record)]
        if not records:
            return None
        if config.registry.tracking_uri is None:
            return FoundCheckpoint(checkpoint=describe(store, view, records[0]), registration=None)
        return _registered(config, store, view, records)
    except CheckpointNotFoundError:
        return None  # the run has not begun
    finally:
        store.close()


def _registered(
    config: CheckpointConfig, store: Store, view: RunView, records: list[CommitRecord]
) -> FoundCheckpoint | None:
    registry = load_registry(config.registry)
    try:
        if not attach(store, registry, view, records[0]):
            return None
        registered = registry.registered()
        for record in records:
            registration = registered.get(record.id)
            if registration is not None:
                return FoundCheckpoint(
                    checkpoint=describe(store, view, record),
                    registration=registration,
                    links=registry.links(registration),
                )
        return None
    finally:
        registry.close()


def _valid(view: RunView) -> Iterator[CommitRecord]:
    """Newest first."""
    for checkpoint in view.checkpoints:
        if checkpoint.standing == "valid" and checkpoint.record is not None:
            yield checkpoint.record


def _with_age(wanted: WantedCheckpoint, text: str) -> WantedCheckpoint:
    if text.isdecimal():
        return msgspec.structs.replace(wanted, after_step=int(text))
    try:
        return msgspec.structs.replace(wanted, after=str(CheckpointId.parse(text)))
    except ValueError as error:
        raise ConfigError(f"newer_than takes a step or a checkpoint's id: {error}") from error


def _with_metric(wanted: WantedCheckpoint, text: str) -> WantedCheckpoint:
    metric, _, rest = text.rpartition(":")
    metric, _, mode = metric.rpartition(":")
    try:
        bound = float(rest)
    except ValueError:
        bound = math.nan
    if not metric or mode not in ("min", "max") or math.isnan(bound):
        raise ConfigError(
            f"better_than = {text!r} does not say which way is better, or than what; write "
            "METRIC:min:BOUND or METRIC:max:BOUND, for example 'val_loss:min:0.25'"
        )
    return msgspec.structs.replace(wanted, metric=metric, mode=mode, bound=bound)


def _age(checkpoint: str) -> tuple[int, int]:
    parsed = CheckpointId.parse(checkpoint)
    return parsed.attempt, parsed.sequence


def _answer(request: FindRequest) -> FindAnswer:
    try:
        return FindAnswer(found=find(request.config, request.wanted))
    except (StoreError, RegistryError) as error:
        return FindAnswer(error=str(error), retryable=True)
    except CkptTasksError as error:
        return FindAnswer(error=str(error))


def _main() -> None:
    # Libraries print; what they print belongs with the log, not with the answer.
    with os.fdopen(os.dup(sys.stdout.fileno()), "wb") as answers:
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
        request = msgspec.json.decode(sys.stdin.buffer.read(), type=FindRequest)
        answers.write(msgspec.json.encode(_answer(request)))


if __name__ == "__main__":
    _main()
