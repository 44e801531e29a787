"""Step 6: what happened, for people: checkpoints, attempts, and what each resumed from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec

from ckpt_tasks.checkpointer.catalog import CheckpointView, RunView, view_run
from ckpt_tasks.config import StoreConfig
from ckpt_tasks.escaping import markdown_code, markdown_text
from ckpt_tasks.fencing.attempts import AttemptView
from ckpt_tasks.format.layout import RunLayout
from ckpt_tasks.replay import Replay
from ckpt_tasks.sizes import readable_size
from ckpt_tasks.store import open_store
from ckpt_tasks.training.registration.story import read_replays
from ckpt_tasks.types import CheckpointId, Number

__all__ = ["Row", "RunReport", "checkpoint_row", "markdown_table", "report"]

Row = dict[str, str | int | None]
"""One line of a table: column -> value."""

_SHOWN_METRICS = 4
_SHOWN_ROWS = 100
"""Of each table: orchestrators keep reports in their databases, and people read them."""


class RunReport(msgspec.Struct, frozen=True, kw_only=True):
    """A run in two tables, and as Markdown.

    Parameters
    ----------
    complete
        The run has its completion marker.
    checkpoints, attempts
        Rows of the newest hundred of each; newest checkpoint and earliest attempt first.
    markdown
        All of it, as a page.
    """

    run: str
    uid: str
    complete: bool
    checkpoints: list[Row]
    attempts: list[Row]
    markdown: str


def report(store: StoreConfig, run: str) -> RunReport:
    """Read a run from its store and describe it.

    Raises
    ------
    CheckpointNotFoundError
        There is no such run.
    StoreError
        Storage did not answer.
    """
    opened = open_store(store)
    try:
        view, url = view_run(opened, run), opened.url
        replays = read_replays(opened, RunLayout(run), view.attempts)
    finally:
        opened.close()
    checkpoints = [_checkpoint(checkpoint) for checkpoint in view.checkpoints[:_SHOWN_ROWS]]
    attempts = [
        _attempt(attempt, view.checkpoints, replays.get(attempt.number))
        for attempt in view.attempts[-_SHOWN_ROWS:]
    ]
    return RunReport(
        run=run,
        uid=view.run.uid,
        complete=view.completed is not None,
        checkpoints=checkpoints,
        attempts=attempts,
        markdown=_markdown(view, url, checkpoints, attempts),
    )


def checkpoint_row(
    checkpoint: str,
    *,
    epoch: int | None,
    trigger: str | None,
    size: int | None,
    state: str,
) -> Row:
    """One line of the checkpoints table; step and attempt are read from the id."""
    parsed = CheckpointId.parse(checkpoint)
    return {
        "checkpoint": checkpoint,
        "epoch": epoch,
        "step": parsed.step,
        "attempt": parsed.attempt,
        "trigger": trigger,
        "size": None if size is None else readable_size(size),
        "state": state,
    }


def markdown_table(rows: Sequence[Row]) -> str:
    """Rows as a Markdown table; the first row names the columns."""
    if not rows:
        return "*none*"
    columns = list(rows[0])
    lines = ["| " + " | ".join(map(markdown_text, columns)) + " |", "|" + " --- |" * len(columns)]
    lines += [
        "| " + " | ".join(_cell(row.get(column)) for column in columns) + " |" for row in rows
    ]
    return "\n".join(lines)


def _cell(value: str | int | None) -> str:
    text = "" if value is None else str(value)
    return markdown_text(text)


def _checkpoint(view: CheckpointView) -> Row:
    record = view.record
    state = view.standing if view.why is None else f"{view.standing}: {view.why}"
    row = checkpoint_row(
        view.id,
        epoch=record.position.epoch if record else None,
        trigger=record.trigger if record else None,
        size=record.size if record else None,
        state=f"{state}, pinned" if view.pinned else state,
    )
    row["committed at"] = record.created_at if record else None
    row["metrics"] = _metrics(record.metrics) if record else None
    return row


def _metrics(metrics: Mapping[str, Number]) -> str:
    shown = sorted(metrics.items())[:_SHOWN_METRICS]
    more = ", ..." if len(metrics) > len(shown) else ""
    return ", ".join(f"{key} {float(value):.4g}" for key, value in shown) + more


def _attempt(
    attempt: AttemptView, checkpoints: Sequence[CheckpointView], replay: Replay | None
) -> Row:
    claim, resumed = attempt.claim, attempt.resumed
    own = [c for c in map(_parsed, checkpoints) if c.attempt == attempt.number]
    why = resumed.why if resumed else "it never came to training"
    passed = (
        "".join(f"; not {p.checkpoint}: {p.why}" for p in resumed.passed_over[:3])
        if resumed
        else ""
    )
    return {
        "attempt": attempt.number,
        "resumed from": (resumed.checkpoint or "the beginning") if resumed else None,
        "checkpoints": len(own),
        "up to step": max((c.step for c in own), default=None),
        "claimed at": claim.claimed_at if claim else None,
        "host": f"{claim.process.host} (pid {claim.process.pid})" if claim else None,
        "why": f"{why}{passed}",
        "replay": str(replay) if replay is not None else None,
    }


def _parsed(view: CheckpointView) -> CheckpointId:
    return CheckpointId.parse(view.id)


def _markdown(view: RunView, url: str, checkpoints: list[Row], attempts: list[Row]) -> str:
    done = view.completed
    status = f"complete at {done.position}" if done else "not complete"
    newest = view.newest.id if view.newest else "none"
    return "\n".join(
        [
            f"# Training run {markdown_code(view.run.run)}",
            "",
            f"**{status}**, {len(view.attempts)} attempt(s), {len(view.checkpoints)} "
            f"checkpoint(s), newest valid: `{newest}`",
            "",
            f"Store: {markdown_code(url)}, uid `{view.run.uid}`",
            "",
            "## Attempts",
            "",
            markdown_table(attempts),
            *_left_out(len(view.attempts), "earlier attempts"),
            "",
            "## Checkpoints",
            "",
            markdown_table(checkpoints),
            *_left_out(len(view.checkpoints), "older checkpoints: `ckpt-tasks ls` shows them"),
            "",
        ]
    )


def _left_out(rows: int, what: str) -> list[str]:
    return ["", f"and {rows - _SHOWN_ROWS} {what}"] if rows > _SHOWN_ROWS else []
