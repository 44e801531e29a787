"""Secrets reach the training and nothing else: grepped for in everything a run leaves behind."""

from __future__ import annotations

import os
import stat
import tempfile
from pathlib import Path

import msgspec
import psutil
import pytest
from support.shell import contents

from ckpt_tasks.config import (
    CheckpointConfig,
    RegistryConfig,
    ScheduleConfig,
    SecretsConfig,
    StoreConfig,
)
from ckpt_tasks.events import CheckpointCommitted, CheckpointRegistered, Event
from ckpt_tasks.masking import MASK
from ckpt_tasks.training.launch import launch
from ckpt_tasks.training.spec import TrainSpec
from ckpt_tasks.types import EXIT_DONE

SECRET = "hunter2-and-more"  # noqa: S105 - of this test
USER_CODE = f"""
import time
from pathlib import Path

import torch


def train(
    run,
    api_key: str,
    database: dict,
    endpoints: list[str],
    license: str,
    shop: dict,
    go: str,
    hub_token: str = {SECRET!r},
) -> None:
    assert api_key == database["password"] == license == shop["main_dsn"] == {SECRET!r}
    print("connecting with", api_key, flush=True)
    model = torch.nn.Linear(2, 1)
    run.track(model=model)
    for epoch in run.epochs(3):
        run.log(loss=float(epoch))
        while epoch == 2 and not Path(go).exists():
            time.sleep(0.02)
        if epoch == 1 and go.endswith("fail"):
            raise ConnectionError("not accepted: " + hub_token)
"""


class _Onlooker:
    """Looks, at the first checkpoint, at what others can see of a run; then lets it go on."""

    def __init__(self, private: Path, go: Path) -> None:
        self._private = private
        self._go = go
        self.events: list[Event] = []
        self.command_lines: list[str] = []
        self.holders: dict[str, int] = {}
        """Files of the attempt's folder with the secret, and their modes."""
        self.folders: set[int] = set()
        """Modes of that folder."""

    def __call__(self, event: Event) -> None:
        self.events.append(event)
        if isinstance(event, CheckpointCommitted) and not self._go.exists():
            self._look()
            self._go.touch()

    def _look(self) -> None:
        for process in psutil.Process().children(recursive=True):
            self.command_lines.append(" ".join(process.cmdline()))
        self.folders = {stat.S_IMODE(path.stat().st_mode) for path in self._private.glob("ckpt-*")}
        for path in self._private.rglob("*"):
            if path.is_file() and SECRET.encode() in path.read_bytes():
                self.holders[path.name] = stat.S_IMODE(path.stat().st_mode)

    @property
    def kinds(self) -> set[type[Event]]:
        return {type(event) for event in self.events}


@pytest.fixture
def onlooker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> _Onlooker:
    """Beside a run whose temporary files lie in a folder of its own."""
    private = tmp_path / "private"
    private.mkdir()
    monkeypatch.setenv("TMPDIR", str(private))
    monkeypatch.setattr(tempfile, "tempdir", str(private))
    return _Onlooker(private, tmp_path / "go")


def test_secrets_are_found_nowhere(
    tmp_path: Path, onlooker: _Onlooker, capfd: pytest.CaptureFixture[str]
) -> None:
    """Not in store, MLflow, events, output or command lines; in 0600 files while it runs."""
    code = tmp_path / "code.py"
    code.write_text(USER_CODE)
    spec = TrainSpec(
        entrypoint=f"{code}:train",
        run="secretive",
        params={
            "api_key": SECRET,
            "database": {"url": f"postgres://user:{SECRET}@host/db", "password": SECRET},
            "endpoints": [f"https://host/x?api_key={SECRET}", f"https://host/#token={SECRET}"],
            "license": SECRET,
            "shop": {"main_dsn": SECRET},
            "go": str(tmp_path / "go"),
        },
        config=CheckpointConfig(
            store=StoreConfig(url=str(tmp_path / "store")),
            schedule=ScheduleConfig(every_epochs=1),
            registry=RegistryConfig(tracking_uri=f"sqlite:///{tmp_path}/mlflow.db"),
            secrets=SecretsConfig(names=["License", "shop.*_dsn"]),
        ),
        invocation="flow-run-1",
    )
    (tmp_path / "gofail").touch()
    failing = {**spec.params, "go": str(tmp_path / "gofail")}
    unregistered = msgspec.structs.replace(spec.config, registry=RegistryConfig())
    spec_that_fails = msgspec.structs.replace(spec, params=failing, config=unregistered)
    failed = launch(spec_that_fails, onlooker.events.append)
    assert failed.message.startswith(f"the training raised ConnectionError: not accepted: {MASK}")
    outcome = launch(spec, onlooker)
    assert outcome.code == EXIT_DONE, outcome
    assert onlooker.kinds >= {CheckpointCommitted, CheckpointRegistered}

    assert len(onlooker.command_lines) >= 3, "supervisor, trainer, registrar"
    assert not any(SECRET in line for line in onlooker.command_lines)
    assert onlooker.holders == {"spec.json": 0o600, "output.log": 0o600}
    assert onlooker.folders == {0o700}
    assert contents(tmp_path / "private") == {}

    captured = capfd.readouterr()
    told = msgspec.json.encode([*onlooker.events, failed, outcome]).decode()
    assert told.count(f"connecting with {MASK}") == 2
    assert f"ConnectionError: not accepted: {MASK}" in told, "the trace"
    assert SECRET not in captured.out + captured.err + told
    left = contents(tmp_path)
    holders = [name for name, data in left.items() if SECRET.encode() in data]
    assert holders == ["code.py"]
    # They were recorded, masked: else there would have been nothing to find.
    (claim,) = (data for name, data in left.items() if name.endswith("attempts/0001.json"))
    for name in ("api_key", "database.password", "hub_token", "license", "shop.main_dsn"):
        assert f'"{name}": "{MASK}"' in claim.decode()
    assert b"database.password" in left["mlflow.db"]
    assert f"postgres://{MASK}@host".encode() in left["mlflow.db"]
    assert os.listdir(tmp_path / "private") == []
