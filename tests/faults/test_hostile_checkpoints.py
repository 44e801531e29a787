"""A checkpoint as an attacker would make it, every digest right: it is refused, or it is just
values. Nothing else is raised, and no memory is taken for what is not there.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.made_runs import MadeRun, save_request

from ckpt_tasks import load_uri, open_uri
from ckpt_tasks.errors import CkptTasksError
from ckpt_tasks.format import codec
from ckpt_tasks.format.digest import digest
from ckpt_tasks.state.capture import capture
from ckpt_tasks.state.restored import RestoredValues
from ckpt_tasks.store.local import LocalStore
from ckpt_tasks.types import CheckpointId

EXAMPLES = int(os.environ.get("CKPT_TASKS_FUZZ_EXAMPLES", "400"))
"""How many are tried; ``make fuzz`` tries many more."""

HOSTILE = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from([-1, 0, 1, 2**31, 2**40, 2**53, 2**63, 2**64, 10**30, 0.5, 1e308]),
    st.sampled_from(["", "..", "../../etc/passwd", "/etc/passwd", "file:///etc/passwd", "\0"]),
    st.sampled_from(["tensor", "sharded", "sparse", "odict", "dtype", "device", "state_dict"]),
    st.sampled_from(["meta", "cuda:9", "__class__", "x" * 100_000]),
    st.sampled_from([[], {}, [[]], {"$": "tensor", "v": 0}, {"$": "tensor", "v": {"index": 9}}]),
    st.sampled_from([{"$": "sparse", "v": []}, {"$": "sharded", "v": [{}, None]}, [0] * 100]),
    st.integers(2, 300).map(lambda depth: json.loads("[" * depth + "]" * depth)),
)


class Forged:
    """A checkpoint on disk whose records can be replaced, with digests that fit."""

    def __init__(self, root: Path) -> None:
        run = MadeRun(LocalStore(str(root)))
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
        optimizer = torch.optim.AdamW(model.parameters())
        model(torch.ones(4, 3)).sum().backward()
        optimizer.step()
        extra = {"sparse": torch.eye(3).to_sparse(), "strided": torch.ones(2, 3).t(), "n": 1}
        items = {"model": model, "optimizer": optimizer, "extra": extra}
        saved = run.begin().checkpointer.save(capture(items), save_request(10))
        checkpoint = CheckpointId.parse(saved.id)
        self.commit = root / run.layout.commit(checkpoint)
        self.index = root / run.index_path(checkpoint)
        self.record, self.trees = (_fields(path) for path in (self.commit, self.index))
        self.uri = self.commit.as_uri()

    def write(self, record: dict[str, Any], index: dict[str, Any]) -> None:
        data = _sealed(index)
        self.index.write_bytes(data)
        if isinstance(record.get("indexes"), list) and record["indexes"]:
            named = record["indexes"][0]
            if isinstance(named, dict):
                named.update(size=len(data), digest=digest(data))
        self.commit.write_bytes(_sealed(record))


@pytest.fixture(scope="module")
def forged(tmp_path_factory: pytest.TempPathFactory) -> Forged:
    return Forged(tmp_path_factory.mktemp("forged"))


def _fields(path: Path) -> dict[str, Any]:
    fields: dict[str, Any] = json.loads(path.read_bytes())
    del fields["checksum"]
    return fields


def _copy(value: Any) -> Any:
    return json.loads(json.dumps(value))


def _sealed(fields: dict[str, Any]) -> bytes:
    text = json.dumps(fields).encode()
    text = text[: text.rindex(b"}")]
    return text + codec._SEAL % digest(text).encode()


def _places(node: Any) -> Iterator[tuple[Any, Any]]:
    """Each container with each of its keys."""
    for key in list(node) if isinstance(node, dict) else range(len(node)):
        yield node, key
        if isinstance(node[key], dict | list):
            yield from _places(node[key])


@settings(
    max_examples=EXAMPLES,
    deadline=None,
    suppress_health_check=[
        HealthCheck.function_scoped_fixture,
        HealthCheck.data_too_large,
        HealthCheck.too_slow,
    ],
)
@given(data=st.data())
def test_hostile_checkpoints(forged: Forged, data: st.DataObject) -> None:
    """Some values anywhere in index or commit record are replaced, moved or left out."""
    record, index = _copy(forged.record), _copy(forged.trees)
    for _ in range(data.draw(st.integers(1, 3))):
        places = list(_places(record if data.draw(st.integers(0, 3)) == 0 else index))
        container, key = places[data.draw(st.integers(0, len(places) - 1))]
        change = data.draw(st.sampled_from(["replace", "replace", "remove", "swap"]))
        if change == "replace":
            container[key] = _copy(data.draw(HOSTILE))
        elif change == "remove":
            del container[key]
        else:
            other, where = places[data.draw(st.integers(0, len(places) - 1))]
            container[key] = _copy(other[where])
    forged.write(record, index)
    for read in (_load_all, _look_at_all):
        with contextlib.suppress(CkptTasksError):
            read(forged.uri)


def _load_all(uri: str) -> RestoredValues:
    return load_uri(uri, ["model", "optimizer", "extra"])


def _look_at_all(uri: str) -> None:
    with open_uri(uri) as checkpoint:
        for tensors in checkpoint.values():
            for tensor in tensors.values():
                tensor.numel()


def test_the_unchanged_checkpoint_is_read(forged: Forged) -> None:
    """What the others change is whole, and found so."""
    forged.write(forged.record, forged.trees)
    assert set(_load_all(forged.uri)) == {"model", "optimizer", "extra"}
    _look_at_all(forged.uri)
