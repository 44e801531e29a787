"""What a launched training prints reaches the caller, line by line and whole."""

from __future__ import annotations

from pathlib import Path

import pytest

from ckpt_tasks.config import CheckpointConfig, StoreConfig
from ckpt_tasks.errors import ConfigError
from ckpt_tasks.training.launch import _LineReader, launch
from ckpt_tasks.training.spec import TrainSpec


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A file that grows."""
    return tmp_path / "output"


def _append(file: Path, data: bytes) -> None:
    with file.open("ab") as stream:
        stream.write(data)


def test_lines_come_once_they_are_whole(file: Path) -> None:
    """Half a line waits for its other half; nothing comes twice."""
    reader = _LineReader(file)
    assert list(reader.read()) == []
    _append(file, b"one\ntw")
    assert list(reader.read()) == ["one"]
    _append(file, b"o\n\nthree\n")
    assert list(reader.read()) == ["two", "three"]
    assert list(reader.read()) == []


def test_the_last_line_needs_no_end(file: Path) -> None:
    """What was printed last before the end is relayed, also without a line break."""
    reader = _LineReader(file)
    _append(file, b"dying words")
    assert list(reader.read()) == []
    assert list(reader.read(ended=True)) == ["dying words"]


def test_progress_bars_show_their_last_state(file: Path) -> None:
    """A line rewritten by carriage returns is what a person would see of it."""
    reader = _LineReader(file)
    _append(file, b"\r10%\r50%\r100%\nrest\r\n")
    assert list(reader.read()) == ["100%", "rest"]


def test_a_line_without_end_is_cut(file: Path) -> None:
    """Endless output without a line break is relayed in pieces, and held in memory as such."""
    reader = _LineReader(file)
    _append(file, b"x" * 200_000)
    pieces = list(reader.read())
    assert len(pieces) == 3
    assert "".join([*pieces, *reader.read(ended=True)]) == "x" * 200_000


def test_bytes_that_are_no_text(file: Path) -> None:
    """Binary output is shown as well as it can be."""
    reader = _LineReader(file)
    _append(file, b"\xff\xfe ok\n")
    assert list(reader.read()) == ["\N{REPLACEMENT CHARACTER}\N{REPLACEMENT CHARACTER} ok"]


def test_an_interpreter_that_is_not_there(tmp_path: Path) -> None:
    """The interpreter asked for is named; nothing is made in the store."""
    spec = TrainSpec(
        entrypoint="toy:train",
        run="toy",
        config=CheckpointConfig(store=StoreConfig(url=str(tmp_path / "store"))),
        invocation="flow-run-1",
        python=str(tmp_path / "no-python"),
    )
    with pytest.raises(ConfigError, match="no-python"):
        launch(spec)
    assert not (tmp_path / "store").exists()
