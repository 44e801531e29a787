"""``runs``, ``ls`` and ``show``: what a store holds."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import closing
from pathlib import Path
from typing import TypeVar

import click
import msgspec

from ckpt_tasks.checkpointer.catalog import (
    CheckpointView,
    RunSummary,
    RunView,
    list_runs,
    view_run,
)
from ckpt_tasks.checkpointer.files import TensorFile, TensorLine, list_files, list_tensors
from ckpt_tasks.cli.options import (
    as_json,
    configure,
    json_option,
    split_checkpoint,
    store_options,
)
from ckpt_tasks.cli.tables import age_or_dash, echo, table
from ckpt_tasks.errors import CheckpointNotFoundError, ConfigError, CorruptCheckpointError
from ckpt_tasks.fencing.replica import replica_text
from ckpt_tasks.format.layout import RunLayout
from ckpt_tasks.format.records import CommitRecord, RunRecord
from ckpt_tasks.replay import Replay
from ckpt_tasks.sizes import readable_size
from ckpt_tasks.store import Store, open_existing_store
from ckpt_tasks.suggest import did_you_mean
from ckpt_tasks.training.registration.story import read_replays

__all__ = ["find_checkpoint", "find_run", "ls", "runs", "show"]

T = TypeVar("T")

_LABEL_WIDTH = 14


@click.command()
@store_options
@json_option
def runs(store: str | None, config_file: Path | None, json_output: bool) -> None:
    """List the runs of a store."""
    with closing(open_existing_store(configure(store, config_file).store)) as opened:
        found = list_runs(opened)
        if json_output:
            click.echo(as_json(found))
        elif not found:
            echo(f"no runs in {opened.url}")
        else:
            _echo_runs(found)


def _echo_runs(found: list[RunSummary]) -> None:
    rows = [
        [
            run.name,
            str(run.attempts),
            str(run.checkpoints),
            run.newest or "-",
            _state(run),
            age_or_dash(run.created_at),
        ]
        for run in found
    ]
    headers = ["run", "attempts", "checkpoints", "newest", "state", "age"]
    _echo_lines(table(headers, rows, right="attempts checkpoints"))
    for run in found:
        if run.problem:
            echo(f"{run.name}: {run.problem}", err=True)


def _state(run: RunSummary) -> str:
    if run.problem:
        return "damaged"
    state = "complete" if run.completed else "incomplete"
    return f"{state}, replica" if run.replica else state


@click.command(short_help="List a run's checkpoints, newest first.")
@click.argument("run")
@store_options
@json_option
def ls(run: str, store: str | None, config_file: Path | None, json_output: bool) -> None:
    """List a run's checkpoints, newest first, and say which a retry may start from."""
    with closing(open_existing_store(configure(store, config_file).store)) as opened:
        view = find_run(opened, run)
    if json_output:
        click.echo(as_json(view.checkpoints))
    elif not view.checkpoints:
        echo(f"{run} has no checkpoints yet ({_attempts_text(view)})")
    else:
        _echo_checkpoints(view)


def _echo_checkpoints(view: RunView) -> None:
    headers = ["checkpoint", "epoch", "step", "size", "trigger", "standing", "age"]
    rows = [_checkpoint_row(checkpoint, view.newest) for checkpoint in view.checkpoints]
    _echo_lines(table(headers, rows, right="epoch step size"))
    for checkpoint in view.checkpoints:
        if checkpoint.why and checkpoint.standing not in ("zombie", "expired"):
            echo(f"{checkpoint.id}: {checkpoint.why}", err=True)


def _checkpoint_row(checkpoint: CheckpointView, newest: CheckpointView | None) -> list[str]:
    record = checkpoint.record
    standing: str = checkpoint.standing
    if checkpoint == newest:
        standing += " (newest)"
    if checkpoint.pinned:
        standing += " pinned"
    if record is None:
        return [checkpoint.id, "-", "-", "-", "-", standing, "-"]
    return [
        checkpoint.id,
        str(record.position.epoch),
        str(record.position.step),
        readable_size(record.size),
        record.trigger,
        standing,
        age_or_dash(record.created_at),
    ]


@click.command(short_help="Show a run, or one of its checkpoints.")
@click.argument("run", metavar="RUN[@ID]")
@click.option("--tensors", is_flag=True, help="List the checkpoint's tensors too; reads none.")
@store_options
@json_option
def show(
    run: str, tensors: bool, store: str | None, config_file: Path | None, json_output: bool
) -> None:
    """Show a run with its attempts, or one of its checkpoints with its files."""
    name, checkpoint_id = split_checkpoint(run)
    if tensors and checkpoint_id is None:
        raise ConfigError("--tensors lists those of one checkpoint: show RUN@ID --tensors")
    with closing(open_existing_store(configure(store, config_file).store)) as opened:
        view = find_run(opened, name)
        if checkpoint_id is None:
            replays = read_replays(opened, RunLayout(name), view.attempts)
            if json_output:
                click.echo(as_json({**msgspec.to_builtins(view), "replays": replays}))
            else:
                _echo_run(view, replays)
            return
        checkpoint = find_checkpoint(view, checkpoint_id)
        files = _told(list_files, opened, name, checkpoint)
        lines = _told(list_tensors, opened, name, checkpoint) if tensors and files else []
    if json_output:
        told = {**msgspec.to_builtins(checkpoint), "files": files}
        click.echo(as_json({**told, "tensors": lines} if tensors else told))
    else:
        _echo_checkpoint(checkpoint, files)
        _echo_tensors(lines)


def _told(
    listing: Callable[[Store, RunLayout, CommitRecord], list[T]],
    store: Store,
    run: str,
    checkpoint: CheckpointView,
) -> list[T]:
    """The checkpoint's files or tensors; none where what names them is damaged, which is told."""
    if checkpoint.record is None:
        return []
    try:
        return listing(store, RunLayout(run), checkpoint.record)
    except CorruptCheckpointError as error:
        echo(f"its files cannot be told: {error}", err=True)
        return []


def find_run(store: Store, name: str) -> RunView:
    """A run by name. Raises `CheckpointNotFoundError` with the nearest name there is."""
    try:
        return view_run(store, name)
    except CheckpointNotFoundError as error:
        names = [run.name for run in list_runs(store)]
        hint = did_you_mean(name, names, what="runs in this store")
        raise CheckpointNotFoundError(f"no run {name!r} in {store.url}; {hint}") from error


def find_checkpoint(view: RunView, checkpoint_id: str) -> CheckpointView:
    """A checkpoint of a run. Raises `CheckpointNotFoundError` with the nearest id there is."""
    for checkpoint in view.checkpoints:
        if checkpoint.id == checkpoint_id:
            return checkpoint
    ids = [checkpoint.id for checkpoint in view.checkpoints]
    hint = did_you_mean(checkpoint_id, ids, what="checkpoints of this run")
    raise CheckpointNotFoundError(f"no checkpoint {checkpoint_id} in {view.run.run}; {hint}")


def _echo_run(view: RunView, replays: Mapping[int, Replay]) -> None:
    newest = view.newest
    state = f"complete since {view.completed.completed_at}" if view.completed else "incomplete"
    _echo_fields(
        {
            "run": view.run.run,
            "uid": view.run.uid,
            "created": f"{view.run.created_at} by {view.run.created_by}",
            **_origin(view.run),
            "entry point": _entrypoint(view),
            "state": state,
            "newest": _newest_text(newest),
            "checkpoints": f"{len(view.checkpoints)} ({_total_size(view)})",
        }
    )
    if not view.attempts:
        return
    echo()
    rows = []
    for attempt in view.attempts:
        claim, resumed = attempt.claim, attempt.resumed
        rows.append(
            [
                str(attempt.number),
                (resumed.checkpoint or "the beginning") if resumed else "never trained",
                claim.invocation if claim else "record damaged",
                f"{claim.process.host}:{claim.process.pid}" if claim else "-",
                age_or_dash(claim.claimed_at if claim else None),
            ]
        )
    headers = ["attempt", "started from", "invocation", "process", "age"]
    _echo_lines(table(headers, rows, right="attempt"))
    for number, replay in replays.items():
        echo(f"attempt {number} {replay}")


def _origin(run: RunRecord) -> dict[str, str]:
    """Of a replica, and of a run that was one."""
    inherited = ", ".join(
        f"attempts 1 to {ancestor.attempts} of {ancestor.uid}" for ancestor in run.ancestors or []
    )
    fields = {"replica": replica_text(run), "inherited": inherited}
    return {name: text for name, text in fields.items() if text}


def _entrypoint(view: RunView) -> str:
    claims = [attempt.claim for attempt in view.attempts if attempt.claim is not None]
    return claims[-1].entrypoint if claims else "unknown"


def _newest_text(newest: CheckpointView | None) -> str:
    if newest is None or newest.record is None:
        return "none that a retry could start from"
    return f"{newest.id}, {newest.record.position}, {age_or_dash(newest.record.created_at)} ago"


def _total_size(view: RunView) -> str:
    return readable_size(sum(c.record.size for c in view.checkpoints if c.record is not None))


def _attempts_text(view: RunView) -> str:
    count = len(view.attempts)
    return f"{count} attempt{'' if count == 1 else 's'}"


def _echo_checkpoint(checkpoint: CheckpointView, files: list[TensorFile]) -> None:
    standing = checkpoint.standing + (f": {checkpoint.why}" if checkpoint.why else "")
    _echo_fields({"checkpoint": checkpoint.id, "standing": standing})
    if checkpoint.record is not None:
        _echo_fields(_record_fields(checkpoint.record))
    if checkpoint.pin is not None:
        _echo_fields({"pinned": checkpoint.pin})
    if files:
        echo()
        rows = [[file.name, readable_size(file.size), file.url] for file in files]
        _echo_lines(table(["tracked", "size", "file"], rows, right="size"))


def _echo_tensors(lines: list[TensorLine]) -> None:
    if not lines:
        return
    echo()
    rows = [
        [line.name, line.key, line.dtype, str(line.shape), readable_size(line.size)]
        for line in lines
    ]
    headers = ["tracked", "tensor", "dtype", "shape", "size"]
    if any(line.ranks != [0] for line in lines):
        headers.append("ranks")
        rows = [[*row, _ranks_text(line.ranks)] for row, line in zip(rows, lines, strict=True)]
    _echo_lines(table(headers, rows, right="size"))


def _ranks_text(ranks: list[int]) -> str:
    """Who has written a tensor; of many, the first and the last."""
    return ", ".join(map(str, ranks)) if len(ranks) < 4 else f"{ranks[0]}...{ranks[-1]}"


def _record_fields(record: CommitRecord) -> dict[str, str]:
    lineage = " < ".join(
        f"attempt {entry.attempt} from {entry.resumed_from or 'the beginning'}"
        for entry in record.lineage
    )
    fields = {
        "position": str(record.position),
        "saved": f"{record.created_at} ({record.trigger}: {record.reason})",
        "size": f"{readable_size(record.size)} on {record.world_size} rank(s)",
        "took": ", ".join(f"{name} {value:.3f} s" for name, value in record.timings.items()),
        "metrics": ", ".join(f"{name}={value}" for name, value in record.metrics.items()),
        "hyperparams": ", ".join(f"{k}={v}" for k, v in record.hyperparameters.items()),
        "lineage": lineage,
        "environment": ", ".join(f"{k} {v}" for k, v in record.environment.items()),
        "indexes": ", ".join(ref.path for ref in record.indexes),
        "exact": "" if record.exact else "no: the data's order only",
    }
    return {name: value for name, value in fields.items() if value}


def _echo_fields(fields: dict[str, str]) -> None:
    for name, value in fields.items():
        echo(f"{name:<{_LABEL_WIDTH}}{value}")


def _echo_lines(lines: list[str]) -> None:
    for line in lines:
        echo(line)
