"""Bad input and bad places: one clear message, the right exit code, nothing lost."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest
from support.attempt_forks import AttemptForks, Fork, StoreFault
from support.launches import TOY, launched
from support.run_checks import check_run, leftovers, temporary_files
from support.s3_servers import S3Server
from support.toy_runs import STEPS, toy_spec

from ckpt_tasks.config import StoreConfig
from ckpt_tasks.events import CheckpointCommitted, SaveFailed
from ckpt_tasks.training.spec import TrainOutcome, TrainSpec
from ckpt_tasks.types import EXIT_DONE, EXIT_FAILED, EXIT_USAGE

Finish = Callable[[TrainSpec], None]


def _refused(spec: TrainSpec) -> TrainOutcome:
    """Launch what cannot work: a usage error in one line, and no traceback."""
    with launched(spec) as attempt:
        outcome = attempt.outcome()
        assert outcome.code == EXIT_USAGE, attempt.output
        assert "Traceback" not in attempt.output
        assert "\n" not in outcome.message
    return outcome


def test_wrong_hyperparameter_name(root: Path) -> None:
    """A hyperparameter that the function has not is named, with the nearest one it has."""
    spec = toy_spec(root, entrypoint=f"{TOY}:train", params={"epoch": 3})
    message = _refused(spec).message
    assert "'epoch'" in message
    assert "epochs" in message
    assert not list(root.rglob("*.json"))


def test_wrong_entrypoint(root: Path) -> None:
    """A function that is not there is named, with the nearest that is."""
    message = _refused(toy_spec(root, entrypoint=f"{TOY}:trian")).message
    assert "'trian'" in message
    assert "train" in message
    assert not list(root.rglob("*.json"))


def test_unwritable_store(root: Path) -> None:
    """A store that cannot be a folder is refused by its name."""
    root.write_text("a file, not a folder")
    message = _refused(toy_spec(root / "below", entrypoint=f"{TOY}:train")).message
    assert str(root) in message
    assert root.read_text() == "a file, not a folder"


def test_missing_s3_credentials(
    moto_server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without credentials, the message says that it is those that are missing."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    bucket, prefix = moto_server.new_place()
    store = StoreConfig(
        url=f"s3://{bucket}/{prefix}", options={"endpoint_url": moto_server.endpoint}
    )
    spec = toy_spec("unused", entrypoint=f"{TOY}:train")
    config = msgspec.structs.replace(spec.config, store=store)
    message = _refused(msgspec.structs.replace(spec, config=config)).message
    assert "credentials" in message.lower()


def test_saves_that_fail_for_too_long_end_the_attempt(
    spec: TrainSpec, forks: AttemptForks, finish: Finish
) -> None:
    """Training goes on while saves fail, until it has been unprotected for too long."""
    attempt = msgspec.structs.replace(spec.config.attempt, max_unprotected=0.2)
    config = msgspec.structs.replace(spec.config, attempt=attempt)
    fork = forks.run(
        msgspec.structs.replace(spec, config=config),
        faults=[StoreFault(at=3, times=10_000)],
        counted=["write"],
        environment={"TOY_STEP_SECONDS": "0.05"},
    )
    assert fork.outcome.code == EXIT_FAILED
    assert "no new checkpoint" in fork.outcome.message
    assert fork.outcome.position is not None
    assert 5 < fork.outcome.position.step < STEPS
    assert fork.events_of(SaveFailed)
    finish(spec)
    check_run(spec, steps=STEPS)


@pytest.fixture
def small_disk(root: Path) -> Iterator[Callable[[str], None]]:
    """Gives the store's root a size; called again, another one."""
    if os.geteuid() != 0:
        pytest.skip("mounting a file system needs root")
    root.mkdir()

    def resize(size: str) -> None:
        option = f"remount,size={size}" if os.path.ismount(root) else f"size={size}"
        command = ["mount", "-t", "tmpfs", "-o", option, "none", str(root)]
        done = subprocess.run(command, check=False, capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"no file system can be mounted here: {done.stderr.strip()}")

    yield resize
    if os.path.ismount(root):
        subprocess.run(["umount", "--lazy", str(root)], check=True)


def _check_disk_full(spec: TrainSpec, fork: Fork) -> None:
    assert fork.outcome.code == EXIT_FAILED
    assert "could not be saved" in fork.outcome.message
    failed = fork.events_of(SaveFailed)
    assert failed
    assert all("space" in event.why for event in failed if isinstance(event, SaveFailed))
    # Training went on to its end, whose save is the one that must not fail.
    assert fork.outcome.position is not None
    assert fork.outcome.position.step == STEPS
    check_run(spec)
    assert leftovers(spec) == set()
    assert temporary_files(Path(spec.config.store.url)) == []


@pytest.mark.parametrize(("size", "some"), [("100k", False), ("400k", True)])
def test_disk_full(
    size: str,
    some: bool,
    spec: TrainSpec,
    forks: AttemptForks,
    small_disk: Callable[[str], None],
    finish: Finish,
) -> None:
    """A disk that is full from the first or a later save on costs no earlier checkpoint."""
    small_disk(size)
    fork = forks.run(spec)
    assert bool(fork.events_of(CheckpointCommitted)) == some
    _check_disk_full(spec, fork)
    small_disk("50m")
    finish(spec)
    check_run(spec, steps=STEPS)


def test_a_failed_attempt_is_followed_by_a_good_one(
    root: Path, forks: AttemptForks, finish: Finish, spec: TrainSpec
) -> None:
    """A training function that raises is a failure worth retrying, and costs the run nothing."""
    crashing = msgspec.structs.replace(spec, entrypoint="support.toy_training:crash", params={})
    fork = forks.run(crashing)
    assert fork.outcome.code == EXIT_FAILED
    assert "this training always fails" in fork.outcome.message
    finish(spec)
    assert forks.run(spec).outcome.code == EXIT_DONE
    check_run(spec, steps=STEPS)
