"""A training that goes on in a new process ends in the same bits as one that never stopped."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors import safe_open

CASES_FILE = Path(__file__).with_name("training_cases.py")


def _load_cases() -> ModuleType:
    spec = importlib.util.spec_from_file_location("training_cases", CASES_FILE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["training_cases"] = module
    spec.loader.exec_module(module)
    return module


cases = _load_cases()
SCENARIOS = [f"{name}-{after}" for name, after in cases.scenarios()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture(scope="module")
def uninterrupted(folder: Path) -> dict[str, str]:
    """Digests of trainings that never stopped; they leave their checkpoints in `folder`."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return {
            f"{name}-{after}": cases.start_and_save(name, folder / f"{name}-{after}", after)
            for name, after in cases.scenarios()
        }
    finally:
        torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def resumed(folder: Path, uninterrupted: dict[str, str]) -> dict[str, str]:
    """Digests of the same trainings, gone on with from `folder` by one new process."""
    done = subprocess.run(
        [sys.executable, str(CASES_FILE), str(folder)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads((folder / "digests.json").read_text())


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_resumed_training_ends_in_the_same_bits(
    scenario: str, uninterrupted: dict[str, str], resumed: dict[str, str]
) -> None:
    """State and random numbers restored in a new process give the uninterrupted run's end."""
    assert resumed[scenario] == uninterrupted[scenario]


def test_the_digest_tells_trainings_apart(uninterrupted: dict[str, str]) -> None:
    """Different trainings have different digests, so equal ones mean something."""
    finals = {key: value for key, value in uninterrupted.items() if not key.endswith("-0")}
    assert len(set(finals.values())) == len(finals)


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_files_open_with_the_safetensors_library(
    scenario: str, folder: Path, uninterrupted: dict[str, str]
) -> None:
    """Every file of a checkpoint is one that the safetensors library reads."""
    values = cases.load(folder / scenario)
    with safe_open(folder / scenario / f"{_module_of(scenario)}.safetensors", "pt") as file:
        weights = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    saved = values[_module_of(scenario)]
    assert weights
    for key, tensor in weights.items():
        assert torch.equal(tensor, saved[key])


def _module_of(scenario: str) -> str:
    return "critic" if scenario.startswith("several") else "model"


def test_tied_weights_are_stored_once(folder: Path, uninterrupted: dict[str, str]) -> None:
    """Two names of one weight share one entry of the file, and come back as one tensor."""
    scenario = f"tied_weights-{cases.SAVED_AFTER}"
    with safe_open(folder / scenario / "model.safetensors", "pt") as file:
        assert list(file.keys()) == ["embedding.weight"]
    model = cases.load(folder / scenario)["model"]
    assert model["embedding.weight"] is model["output.weight"]
