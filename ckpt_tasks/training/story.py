"""The story of a run in Markdown: its attempts, what each resumed from, why, and how it ended."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ckpt_tasks.checkpointer.catalog import RunView, view_run
from ckpt_tasks.escaping import markdown_code, markdown_text
from ckpt_tasks.fencing.attempts import AttemptView
from ckpt_tasks.fencing.heartbeat import read_heartbeat
from ckpt_tasks.format.layout import RunLayout
from ckpt_tasks.replay import Replay
from ckpt_tasks.store.base import Store

__all__ = ["read_replays", "tell_replays", "tell_story"]

_HEAD = "| attempt | began | started from | checkpoints | why | ended |"
_SHOWN_ATTEMPTS = 30
_SHOWN_PASSED_OVER, _SHOWN_REASON = 3, 200
_SHOWN_REPLAYS = 5
_NOT_DETERMINISTIC = (
    "**The training is not deterministic.** Its state and the order of its data were restored "
    "exactly; what it computed from them came out differently."
)


def tell_story(store: Store, layout: RunLayout, replays: Mapping[int, Replay] | None = None) -> str:
    """What a person who opens the run wants to know; `replays` as `read_replays` returns them."""
    view = view_run(store, layout.run)
    newest = view.newest
    lines = [f"**Training run {markdown_code(layout.run)}** in {markdown_code(store.url)}", ""]
    if view.completed is not None:
        lines.append(f"Complete: {view.completed.position}, after {_attempts(view)}.")
    elif newest is not None and newest.record is not None:
        lines.append(
            f"Newest checkpoint: `{newest.id}`, {newest.record.position}; {_attempts(view)}."
        )
    else:
        lines.append(f"No checkpoint yet; {_attempts(view)}.")
    lines += _replay_lines(replays or {})
    lines += ["", _HEAD, "|---|---|---|---|---|---|"]
    for attempt in view.attempts[-_SHOWN_ATTEMPTS:]:
        lines.append(_row(view, attempt, _end(store, layout, view, attempt)))
    return "\n".join(lines)


def read_replays(
    store: Store, layout: RunLayout, attempts: Sequence[AttemptView]
) -> dict[int, Replay]:
    """What the newest of `attempts` have found of the steps they did again, by their numbers."""
    replays = {}
    for attempt in attempts[-_SHOWN_ATTEMPTS:]:
        if attempt.resumed is None or attempt.number == 1:
            continue
        beat = read_heartbeat(store, layout, attempt.number)
        if beat is not None and beat.replay is not None:
            replays[attempt.number] = beat.replay
    return replays


def tell_replays(replays: Mapping[int, Replay]) -> str:
    """All that attempts have found, in a few words, which begin with the one that people search."""
    diverged = {number: replay for number, replay in replays.items() if replay.has_diverged}
    told = [f"attempt {number} {replay}" for number, replay in (diverged or replays).items()]
    more = f"; {len(told) - _SHOWN_REPLAYS} attempts more" if len(told) > _SHOWN_REPLAYS else ""
    word = "diverged" if diverged else "identical"
    return f"{word}: {'; '.join(told[-_SHOWN_REPLAYS:])}{more}"


def _replay_lines(replays: Mapping[int, Replay]) -> list[str]:
    if not replays:
        return []
    diverged = any(replay.has_diverged for replay in replays.values())
    lines = ["", _NOT_DETERMINISTIC] if diverged else []
    shown = sorted(replays.items())[-_SHOWN_REPLAYS:]
    return [
        *lines,
        "",
        *(f"- Attempt {number} {markdown_text(str(replay))}." for number, replay in shown),
    ]


def _attempts(view: RunView) -> str:
    count = len(view.attempts)
    return f"{count} attempt{'s' if count != 1 else ''}"


def _end(store: Store, layout: RunLayout, view: RunView, attempt: AttemptView) -> str:
    """How an attempt ended, as its last heartbeat tells; empty for one that is under way."""
    is_last = attempt.number == view.attempts[-1].number
    if is_last and view.completed is not None:
        return "complete"
    beat = read_heartbeat(store, layout, attempt.number)
    if beat is not None and beat.failure is not None:
        return f"{beat.failure.kind[:_SHOWN_REASON]}, step {beat.failure.step}"
    if is_last:
        return ""
    return "stopped" if beat is not None and beat.ended else "lost"


def _row(view: RunView, attempt: AttemptView, end: str) -> str:
    prefix = f"-a{attempt.number}-s"
    committed = sum(prefix in checkpoint.id for checkpoint in view.checkpoints)
    claim, resumed = attempt.claim, attempt.resumed
    began = claim.claimed_at if claim else "?"
    start = (resumed.checkpoint or "the beginning") if resumed else None
    why = "" if resumed is None else markdown_text(resumed.why)
    passed_over = [] if resumed is None else resumed.passed_over
    for passed in passed_over[:_SHOWN_PASSED_OVER]:
        reason = markdown_text(passed.why[:_SHOWN_REASON])
        why += f"; not {markdown_code(passed.checkpoint)}: {reason}"
    cells = [
        str(attempt.number),
        markdown_text(began),
        markdown_code(start) if start else "never trained",
        str(committed),
        why,
        markdown_text(end),
    ]
    return f"| {' | '.join(cells)} |"
