"""Checkpoints of each format stay readable: every value, digest and record of a committed run.

``format-1`` was made by ``make_format_1.py``. A change that breaks these tests breaks the
checkpoints that users have.
"""

from __future__ import annotations

import random
import shutil
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from golden.golden_state import loop_state, seed_generators, trained
from safetensors.torch import load_file
from support.made_runs import MadeRun

from ckpt_tasks.checkpointer.catalog import view_run
from ckpt_tasks.checkpointer.reader import load_checkpoint, read_commit, read_index
from ckpt_tasks.checkpointer.verify import state_digest, verify_checkpoint
from ckpt_tasks.errors import UnsupportedFormatError
from ckpt_tasks.fencing.attempts import read_attempts
from ckpt_tasks.format.codec import decode
from ckpt_tasks.format.digest import digest
from ckpt_tasks.format.layout import RunLayout
from ckpt_tasks.format.records import Heartbeat, RegistryRunIds
from ckpt_tasks.recovery.recover import preview_recovery
from ckpt_tasks.state.rng import restore_rng
from ckpt_tasks.state.tracked import TrackedItems
from ckpt_tasks.store import Store, open_store
from ckpt_tasks.training.restore import restored_values
from ckpt_tasks.types import CheckpointId, Position

FORMAT_1 = Path(__file__).parent / "format-1"
RUN = "digits/ü 1"
LAYOUT = RunLayout(RUN)
OLDER, NEWEST = "step-00000004-a1-s1", "step-00000008-a2-s1"
STEPS = {OLDER: 4, NEWEST: 8}
BYTES = "9cd602b841fb9ca23f4aeb450eb12689ddbfe0ad4c89eb9fc0f3a9443d122c22"
STATES = {
    OLDER: "d593e621094df57c2058d23f974e0d0a516cde44ddcf3334144ddbeced4e74b5",
    NEWEST: "def19a0b5b1af267246e1f26817dee7ece2792b4e013c54be2e205b7d3863298",
}


@pytest.fixture
def golden() -> Store:
    """The committed store, to be read only."""
    return open_store(str(FORMAT_1))


@pytest.fixture
def copy(tmp_path: Path) -> Store:
    """The same in a place of this test's own."""
    shutil.copytree(FORMAT_1, tmp_path / "store")
    return open_store(str(tmp_path / "store"))


def test_git_has_kept_every_byte(golden: Store) -> None:
    """What was checked out is what was committed: no line ending was touched, no file is lost."""
    objects = [info.path for info in golden.list_objects("")]
    contents = b"".join(path.encode() + digest(golden.read(path)).encode() for path in objects)
    assert digest(contents) == BYTES


@pytest.mark.parametrize("checkpoint", [OLDER, NEWEST])
def test_verifies(golden: Store, checkpoint: str) -> None:
    """Every digest holds, and the digest of the state is what it was when it was saved."""
    report = verify_checkpoint(golden, RUN, checkpoint)
    assert (report.ok, report.problem) == (True, None)
    assert state_digest(golden, RUN, checkpoint) == STATES[checkpoint]


@pytest.mark.parametrize("checkpoint", [OLDER, NEWEST])
def test_every_value_comes_back(golden: Store, checkpoint: str) -> None:
    """Restored into objects that hold something else, the state is what was saved, bit by bit:
    types, keys and order of plain values, ties of tensors, and the generators' next numbers.
    """
    steps = STEPS[checkpoint]
    model, optimizer = trained(1)
    state = dict.fromkeys(loop_state(0)) | {"best": torch.zeros(())}
    tracked = TrackedItems()
    for name, item in {"model": model, "optimizer": optimizer, "state": state}.items():
        tracked.add(name, item)
    record = read_commit(golden, LAYOUT, CheckpointId.parse(checkpoint))
    values = restored_values(load_checkpoint(golden, LAYOUT, record), ["model", "ckpt_tasks.rng"])
    tracked.restore(values)
    expected_model, expected_optimizer = trained(steps)
    assert_same(model.state_dict(), expected_model.state_dict())
    assert model.head.weight is model.embedding.weight
    assert_same(optimizer.state_dict(), expected_optimizer.state_dict())
    assert_same(state, loop_state(steps))
    assert state["transposed"].stride() == (1, 3)
    assert restore_rng(values["ckpt_tasks.rng"]) == []
    drawn = draw()
    seed_generators(steps)
    assert drawn == draw()


def draw() -> tuple[float, float, float]:
    return random.random(), float(np.random.rand()), float(torch.rand(()))  # noqa: S311


def assert_same(found: Any, expected: Any) -> None:
    """Equal in type, order and bits, at any depth; NaN equals NaN."""
    assert type(found) is type(expected)
    if isinstance(expected, torch.Tensor):
        assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
        assert torch.equal(found, expected)
    elif isinstance(expected, dict):
        assert list(found) == list(expected)
        for key in expected:
            assert_same(found[key], expected[key])
    elif isinstance(expected, list | tuple):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert_same(one, other)
    else:
        assert repr(found) == repr(expected)


def test_weights_open_with_the_safetensors_library(golden: Store) -> None:
    """No code of this package is needed to read them."""
    record = read_commit(golden, LAYOUT, CheckpointId.parse(NEWEST))
    (model,) = [
        file.path
        for file in read_index(golden, LAYOUT, record.indexes[0]).files
        if "/model." in file.path
    ]
    tensors = load_file(FORMAT_1 / LAYOUT.in_run(model))
    expected = trained(8)[0].state_dict()
    assert {*tensors, "head.weight"} == set(expected)
    for name, tensor in tensors.items():
        assert_same(tensor, expected[name])


def test_records_tell_the_runs_story(golden: Store) -> None:
    """Attempts, lineage, positions, metrics, journal, marks and the registry's ids."""
    view = view_run(golden, RUN)
    assert [a.resumed.checkpoint for a in view.attempts if a.resumed] == [None, OLDER]
    assert [a.claim.process.host for a in view.attempts if a.claim] == ["trainer", "trainer"]
    assert [(c.id, c.standing, c.pin) for c in view.checkpoints] == [
        (NEWEST, "valid", None),
        (OLDER, "valid", "for the paper (ada)"),
    ]
    newest = view.checkpoints[0].record
    assert newest is not None
    assert newest.position == Position(epoch=1, step=8, phase="epoch_done")
    assert [(e.attempt, e.resumed_from) for e in newest.lineage] == [(2, OLDER), (1, None)]
    assert newest.metrics == {"loss": 0.125, "worst": "nan"}
    assert newest.hyperparameters == {"lr": 0.1}
    journal = read_index(golden, LAYOUT, newest.indexes[0]).metrics
    assert journal == [("loss", 0.125, 8, 1_700_000_000_008), ("worst", "nan", 8, 1)]
    assert view.completed is not None
    assert view.completed.checkpoint == NEWEST
    path = LAYOUT.registry_ids("mlflow")
    assert decode(golden.read(path), RegistryRunIds, path=path).experiment == "digits"
    path = LAYOUT.heartbeat(1)
    failure = decode(golden.read(path), Heartbeat, path=path).failure
    assert failure is not None
    assert failure.kind == "RuntimeError: out of memory"


def test_a_new_attempt_goes_on_from_it(copy: Store) -> None:
    """The next attempt starts from the newest checkpoint, and commits behind it."""
    run = MadeRun(copy, RUN)
    attempt = run.begin("flow-run-1")
    assert (attempt.number, attempt.start) == (3, NEWEST)
    attempt.save(12)
    assert [a.number for a in read_attempts(copy, LAYOUT)] == [1, 2, 3]


from_the_future = pytest.mark.parametrize(
    ("change", "says"),
    [({"format": 2}, "format 2"), ({"required_features": ["sharded"]}, "features ['sharded']")],
)


def rewrite(store: Store, path: str, change: dict[str, Any]) -> None:
    """The record as a later version writes it, with a checksum that fits."""
    record = {**msgspec.json.decode(store.read(path)), **change}
    del record["checksum"]
    body = msgspec.json.encode(record).removesuffix(b"}")
    store.put(path, body + b',\n "checksum": "%s"\n}\n' % digest(body).encode("ascii"))


@from_the_future
def test_a_checkpoint_of_a_later_format_is_refused(
    copy: Store, change: dict[str, Any], says: str
) -> None:
    """An unknown format or feature is neither read, verified, resumed from nor called damage."""
    newest = CheckpointId.parse(NEWEST)
    rewrite(copy, LAYOUT.commit(newest), change)
    run, attempts = view_run(copy, RUN).run, read_attempts(copy, LAYOUT)
    for use in (
        lambda: read_commit(copy, LAYOUT, newest),
        lambda: verify_checkpoint(copy, RUN, newest),
        lambda: state_digest(copy, RUN, newest),
        lambda: preview_recovery(copy, LAYOUT, run, attempts),
        lambda: MadeRun(copy, RUN).begin("flow-run-1"),
    ):
        with pytest.raises(UnsupportedFormatError) as refused:
            use()
        assert says in str(refused.value)
        assert "upgrade ckpt-tasks" in str(refused.value)
    assert copy.list_objects(LAYOUT.marks("quarantined")) == []


@pytest.mark.parametrize("name", ["run.json", "attempts/0002.json", "attempts/0002.resumed.json"])
def test_a_run_of_a_later_format_is_refused(copy: Store, name: str) -> None:
    """Nobody trains on in a run whose other records a later version wrote."""
    rewrite(copy, f"{LAYOUT.root}/{name}", {"format": 2})
    with pytest.raises(UnsupportedFormatError, match="format 2"):
        MadeRun(copy, RUN).begin("flow-run-1")
