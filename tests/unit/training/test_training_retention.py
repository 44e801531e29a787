"""Retention while a training runs: after each commit, by the attempt itself."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import msgspec
from support.launches import TOY, launched
from support.toy_runs import STEPS, toy_spec

from ckpt_tasks.checkpointer.catalog import RunView, view_run
from ckpt_tasks.checkpointer.verify import verify_checkpoint
from ckpt_tasks.config import RetentionConfig, SaveConfig, StoreConfig
from ckpt_tasks.events import RetentionApplied, Warned
from ckpt_tasks.store import open_store
from ckpt_tasks.training.spec import TrainSpec
from ckpt_tasks.types import EXIT_DONE


def spec_with(root: Path, **retention: object) -> TrainSpec:
    spec = toy_spec(root, entrypoint=f"{TOY}:train")
    config = msgspec.structs.replace(
        spec.config,
        retention=RetentionConfig(**retention),  # type: ignore[arg-type]
        save=SaveConfig(asynchronous=False),  # so that no save is put off
    )
    return msgspec.structs.replace(spec, config=config)


def view_of(root: Path) -> RunView:
    with closing(open_store(StoreConfig(url=str(root)))) as store:
        view = view_run(store, "toy")
        for checkpoint in view.checkpoints:
            assert verify_checkpoint(store, "toy", checkpoint.id).ok
        return view


def test_what_is_no_longer_kept_is_marked_as_training_goes_on(tmp_path: Path) -> None:
    """Nothing is removed within the grace; the attempt tells what it has marked."""
    with launched(spec_with(tmp_path, latest=2)) as attempt:
        assert attempt.outcome().code == EXIT_DONE, attempt.output
        applied = attempt.of(RetentionApplied)
    view = view_of(tmp_path)
    valid = [c.id for c in view.checkpoints if c.standing == "valid"]
    expired = [c.id for c in view.checkpoints if c.standing == "expired"]
    assert len(valid) == 2
    assert view.checkpoints[0].record is not None
    assert view.checkpoints[0].record.position.step == STEPS
    assert sorted(one for event in applied for one in event.expired) == sorted(expired)
    assert expired
    assert not [one for event in applied for one in event.removed]


def test_what_has_expired_long_enough_is_removed(tmp_path: Path) -> None:
    """By the next attempt as well as by this one; what is left is whole, and resumed from."""
    with launched(spec_with(tmp_path, latest=1)) as attempt:
        assert attempt.outcome().code == EXIT_DONE, attempt.output
    longer = {"params": {"epochs": 4}, "resume": view_of(tmp_path).checkpoints[0].id}
    again = msgspec.structs.replace(
        spec_with(tmp_path, latest=1, grace=0.001), invocation="flow-run-2", **longer
    )
    with launched(again) as attempt:
        assert attempt.outcome().code == EXIT_DONE, attempt.output
        removed = [one for event in attempt.of(RetentionApplied) for one in event.removed]
        assert not [w for w in attempt.of(Warned) if "retention" in w.message]
    assert removed
    view = view_of(tmp_path)
    assert not {c.id for c in view.checkpoints} & set(removed)
    assert view.newest is not None
    assert view.newest.record is not None
    assert view.newest.record.position.step == STEPS + 8


def test_a_training_keeps_everything_unless_told(tmp_path: Path) -> None:
    """Without rules no mark is made."""
    with launched(spec_with(tmp_path)) as attempt:
        assert attempt.outcome().code == EXIT_DONE, attempt.output
        assert attempt.of(RetentionApplied) == []
    assert {c.standing for c in view_of(tmp_path).checkpoints} == {"valid"}
