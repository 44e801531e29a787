"""A caller that is interrupted is still told how the training that it launched ended."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.launches import TOY
from support.toy_runs import toy_spec

from ckpt_tasks.events import AttemptEnded, CheckpointCommitted, Event
from ckpt_tasks.training.launch import launch
from ckpt_tasks.types import EXIT_STOPPED


class Cancelled(BaseException):
    """What an orchestrator raises in the thread of a task that it cancels."""


class Sink:
    """Keeps all events; fails from the first commit on, at each."""

    def __init__(self, error: BaseException) -> None:
        self.events: list[Event] = []
        self._error = error

    def __call__(self, event: Event) -> None:
        self.events.append(event)
        if any(isinstance(event, CheckpointCommitted) for event in self.events):
            raise self._error


@pytest.mark.parametrize("error", [Cancelled(), OSError("the orchestrator is away")], ids=repr)
def test_the_end_is_relayed_to_a_caller_that_is_interrupted(
    error: BaseException, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The save that the interruption caused and the end come through,
    although the sink fails at each of them; what is raised is the interruption.
    """
    monkeypatch.setenv("TOY_STEP_SECONDS", "0.2")
    sink = Sink(error)
    with pytest.raises(type(error)) as caught:
        launch(toy_spec(root, entrypoint=f"{TOY}:train"), sink)
    assert caught.value is error
    commits = [event for event in sink.events if isinstance(event, CheckpointCommitted)]
    assert [commit.trigger for commit in commits][1:] == ["signal"]
    (ended,) = [event for event in sink.events if isinstance(event, AttemptEnded)]
    assert ended.code == EXIT_STOPPED
    assert commits[-1].position == ended.position
