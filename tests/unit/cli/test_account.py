"""The live account of an attempt: events as lines, progress on one line."""

from __future__ import annotations

import io

from support.replays import DIVERGED

from ckpt_tasks import events
from ckpt_tasks.cli.account import Account
from ckpt_tasks.types import Position

SAVED = events.CheckpointCommitted(
    checkpoint="step-00000010-a1-s1",
    position=Position(epoch=0, step=10),
    trigger="steps",
    reason="every 10 steps",
    size=2**20,
    seconds=0.25,
)


class Terminal(io.StringIO):
    """Takes escape codes."""

    def isatty(self) -> bool:
        return True


def _progress(step: int) -> events.Progress:
    return events.Progress(position=Position(epoch=1, step=step), epochs=5)


def test_a_resume_tells_from_where_and_what_was_lost() -> None:
    """The line names checkpoint, position, lost steps and the reason for the choice."""
    stream = io.StringIO()
    Account(stream)(
        events.AttemptResumed(
            attempt=2,
            checkpoint="step-00000010-a1-s1",
            position=Position(epoch=0, step=10),
            why="newest valid checkpoint",
            lost_steps=3,
        )
    )
    assert stream.getvalue() == (
        "attempt 2 resumed from step-00000010-a1-s1, step 10 (in epoch 0), lost 3 steps: "
        "newest valid checkpoint\n"
    )


def test_progress_overwrites_one_line_on_a_terminal() -> None:
    """Progress stays on its line; another event clears it first."""
    stream = Terminal()
    account = Account(stream)
    account(_progress(7))
    account(_progress(8))
    account(SAVED)
    account.close()
    assert stream.getvalue() == (
        "\r\x1b[K  epoch 2 of 5, step 7\r\x1b[K  epoch 2 of 5, step 8\r\x1b[K"
        "saved step-00000010-a1-s1, 1.05 MB, waited 0.25 s (steps: every 10 steps)\n"
    )


def test_a_progress_line_left_open_is_ended() -> None:
    """What is printed after the account begins on a line of its own."""
    stream = Terminal()
    account = Account(stream)
    account(_progress(7))
    account.close()
    account.close()
    assert stream.getvalue().endswith("step 7\n")


def test_progress_in_a_log_is_rare() -> None:
    """Without a terminal, progress is printed at most every ten seconds."""
    times = iter([0.0, 1.0, 9.9, 10.0])
    stream = io.StringIO()
    account = Account(stream, clock=lambda: next(times))
    for step in (1, 2, 3, 4):
        account(_progress(step))
    assert [line.split()[-1] for line in stream.getvalue().splitlines()] == ["1", "4"]


def test_links_are_shown_once_per_kind() -> None:
    """The page of the run is not repeated with every registered version."""
    stream = io.StringIO()
    account = Account(stream)
    for version in ("1", "2"):
        account(
            events.CheckpointRegistered(
                checkpoint="step-00000010-a1-s1",
                registered_model="digits",
                version=version,
                model_id="m-1",
                links={"run": "http://h/run", "version": f"http://h/{version}"},
            )
        )
    lines = stream.getvalue().splitlines()
    assert lines.count("  run: http://h/run") == 1
    assert "registered step-00000010-a1-s1 as digits version 2" in lines


def test_trouble_is_marked_and_masked() -> None:
    """Warnings and errors stand out, and no credential is printed."""
    stream = io.StringIO()
    account = Account(stream)
    account(
        events.SaveFailed(
            run="toy", checkpoint="c", why="s3://a:hunter2@b is full", unprotected=61.0
        )
    )
    account(events.RegistryUnavailable(why="refused", queued=4))
    account(events.CheckpointQuarantined(checkpoint="c", why="bad digest"))
    account(events.Warned(message="data order only"))
    account(events.MetricsReplayed(run="toy", attempt=2, replay=DIVERGED))
    text = stream.getvalue()
    assert [line.partition(":")[0] for line in text.splitlines()] == [
        *("WARNING", "WARNING", "ERROR", "WARNING", "WARNING")
    ]
    assert "hunter2" not in text
    assert "61 s without a durable checkpoint" in text


def test_the_users_output_goes_to_its_own_stream() -> None:
    """Lines that the training printed are passed on unchanged, below a cleared progress line."""
    stream, output = Terminal(), io.StringIO()
    account = Account(stream, output=output)
    account(_progress(7))
    account(events.OutputLine(text="loss 0.5"))
    assert output.getvalue() == "loss 0.5\n"
    assert stream.getvalue().endswith("step 7\r\x1b[K")


def test_what_is_of_no_interest_is_not_printed() -> None:
    """Metrics and starts of saves leave no line; nor does the end, which the command itself
    tells.
    """
    stream = io.StringIO()
    account = Account(stream)
    account(events.MetricsLogged(rows=[("loss", 0.5, 1, 1)]))
    account(events.SaveStarted(checkpoint="c", trigger="steps", reason="r"))
    account(events.AttemptEnded(attempt=1, code=0, message="done"))
    assert stream.getvalue() == ""
