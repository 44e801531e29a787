"""The story of a run in Markdown: its attempts, what each resumed from, why, and how it ended."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

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
    """What attempts have found, for a tag, of which a page shows little more than the beginning."""
    diverged = {number: replay for number, replay in replays.items() if replay.has_diverged}
    steps = _steps(sum(replay.steps for replay in replays.values()))
    if not diverged:
        return f"identical: {steps}, {_numbers(replays)}"
    found = [one for replay in diverged.values() for one in (replay.first, replay.largest) if one]
    first = min(found, key=lambda one: one.step)
    largest = max(found, key=lambda one: one.absolute)
    count = sum(replay.diverged_steps for replay in diverged.values())
    return (
        f"diverged: {count} of {steps}, {_numbers(diverged)}; first step {first.step} "
        f"({first.key}); largest difference {largest.absolute:.3g} ({largest.key}, step "
        f"{largest.step})"
    )


def _steps(count: int) -> str:
    return f"{count} step{'s' if count != 1 else ''}"


def _numbers(attempts: Iterable[int]) -> str:
    numbers = [str(number) for number in sorted(attempts)]
    more = ["..."] if len(numbers) > _SHOWN_REPLAYS else []
    shown = ", ".join([*more, *numbers[-_SHOWN_REPLAYS:]])
    return f"attempt{'s' if len(numbers) > 1 else ''} {shown}"


def _replay_lines(replays: Mapping[int, Replay]) -> list[str]:
    """First what is shown of a note that is folded."""
    if not replays:
        return []
    count = sum(replay.diverged_steps for replay in replays.values())
    steps = _steps(sum(replay.steps for replay in replays.values()))
    diverged = (
        f"**Not deterministic:** {count} of {steps} that were done again came out differently, "
        "although the state and the order of the data were restored exactly."
    )
    shown = sorted(replays.items())[-_SHOWN_REPLAYS:]
    told = [f"- Attempt {number} {markdown_text(str(replay))}." for number, replay in shown]
    return [*(["", diverged] if count else []), "", *told]


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
