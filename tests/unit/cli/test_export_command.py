"""``export``: what it says, and what it takes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest


def test_export_tells_what_it_has_written(
    call: Any, store_path: str, stored: Any, tmp_path: Path
) -> None:
    """The newest checkpoint's, or that of an id; for people and for programs."""
    common = ("export", "--store", store_path, "--to", "safetensors", "--only", "model")
    answer = call(*common, "digits cnn", "--output", str(tmp_path / "one"))
    assert answer.code == 0, answer.err
    assert answer.out.startswith(f"exported model of {stored.newest} to {tmp_path / 'one'} (")

    answer = call(*common, f"digits cnn@{stored.first}", "--output", str(tmp_path / "2"), "--json")
    report = json.loads(answer.out)
    assert (report["checkpoint"], report["step"]) == (stored.first, 100)
    assert [file["path"] for file in report["files"]] == ["model.json"]
    assert json.loads((tmp_path / "2" / "model.json").read_bytes())["state"] == {"weight": 0}


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("digits cn", "--to", "safetensors"), 4, "did you mean 'digits cnn'"),
        (("digits cnn", "--to", "safetensors"), 2, "has no module; say what to export: --only"),
        (("digits cnn@step-00000100-a1-s9", "--to", "torch"), 4, "did you mean 'step-00000100"),
        (("digits cnn", "--to", "torch", "-p", "a=1"), 2, "are about a --model"),
        (("digits cnn", "--to", "onnx"), 2, "'onnx' is not one of"),
    ],
)
def test_mistakes_are_told(
    call: Any,
    store_path: str,
    stored: Any,
    tmp_path: Path,
    arguments: tuple[str, ...],
    code: int,
    message: str,
) -> None:
    """With the nearest name there is, and nothing written."""
    answer = call("export", *arguments, "--store", store_path, "--output", str(tmp_path / "out"))
    assert (answer.code, message in answer.err) == (code, True), answer.err
    assert not (tmp_path / "out").exists()
