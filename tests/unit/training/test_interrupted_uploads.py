"""What earlier attempts were uploading when they died is removed; nothing else is."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NoReturn

from ckpt_tasks.errors import StoreError
from ckpt_tasks.events import Event, Warned
from ckpt_tasks.format.layout import RunLayout
from ckpt_tasks.store.local import LocalStore
from ckpt_tasks.training.registration.interrupted import abort_interrupted

LAYOUT = RunLayout("toy")


def test_only_earlier_attempts_uploads_go(tmp_path: Path) -> None:
    """Of any age; the attempt's own stay, a later one's, whatever is whole, and what no attempt of
    ours has made.
    """
    names = [f"toy/data/a{number:04d}-s0001-0a/.tmp-x" for number in (1, 2, 3, 4)]
    others = [
        "toy/data/a0001-s0001-0a/model.rank0000.safetensors",
        "toy/attempts/0001.json",
        "toy/data/.notes/.tmp-x",
    ]
    for name in (*names, *others):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    events: list[Event] = []

    thread = abort_interrupted(LocalStore(str(tmp_path)), LAYOUT, 3, events.append)

    assert thread is not None
    thread.join()
    assert [name for name in names if (tmp_path / name).exists()] == names[2:]
    assert all((tmp_path / name).exists() for name in others)
    assert events == []


def test_a_first_attempt_looks_for_none(tmp_path: Path) -> None:
    """There is nobody who could have left any."""
    assert abort_interrupted(_Refusing(str(tmp_path)), LAYOUT, 1, lambda event: None) is None


def test_what_cannot_be_removed_is_told(tmp_path: Path) -> None:
    """Some accounts may not list uploads: the attempt goes on, and its log says so."""
    events: list[Event] = []
    thread = abort_interrupted(_Refusing(str(tmp_path)), LAYOUT, 2, events.append)
    assert thread is not None
    thread.join()
    (warned,) = events
    assert isinstance(warned, Warned)
    assert "ListBucketMultipartUploads" in warned.message
    assert "ckpt-tasks collect" in warned.message


class _Refusing(LocalStore):
    """As an account that may not."""

    def abort_uploads(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise StoreError("s3:ListBucketMultipartUploads is denied")
