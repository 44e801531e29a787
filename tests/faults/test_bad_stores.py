"""Stores that cannot be used as asked: one clear line, in bounded time, and nothing lost."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from support.attempt_forks import AttemptForks, Kill
from support.s3_servers import CREDENTIALS, S3Server, free_port
from support.shell import Answer, ckpt_tasks, contents
from support.small_disk import SmallDisk
from support.toy_runs import toy_spec

from ckpt_tasks.training.spec import TrainSpec
from ckpt_tasks.types import EXIT_FAILED, EXIT_USAGE

TOY = "support.toy_training:train"


def _train(store: str, folder: Path, *arguments: str, **environment: str) -> Answer:
    command = ["train", TOY, "--run", "toy", "--store", store, *arguments]
    return ckpt_tasks(*command, folder=folder, environment=environment)


@pytest.mark.parametrize(
    ("store", "expected"),
    [
        ("nosuch://bucket/runs", "cannot open the store nosuch://bucket/runs: Protocol not known"),
        ("in_the_way/store", "cannot be written: Not a directory"),
    ],
)
def test_a_store_that_cannot_be_is_refused(tmp_path: Path, store: str, expected: str) -> None:
    """An unknown protocol, or a file where a folder should be, exits with 2 and one line."""
    (tmp_path / "in_the_way").write_text("not a folder")
    answer = _train(store, tmp_path)
    assert answer.code == EXIT_USAGE
    assert expected in answer.error
    assert answer.said == [answer.error]
    assert contents(tmp_path) == {"in_the_way": b"not a folder"}


def test_a_read_only_store_is_left_as_it_is(
    disk: SmallDisk,
    forks: AttemptForks,
    tmp_path: Path,
    finish: Callable[[TrainSpec], None],
) -> None:
    """On a read-only file system training exits with 2; once writable, the run goes on."""
    root = disk.path / "store"
    spec = toy_spec(root)
    assert forks.run(spec, kill=Kill(step=13)).killed
    before = contents(root)
    disk.remount("ro")
    answer = _train(str(root), tmp_path)
    assert answer.code == EXIT_USAGE
    assert f"the store {root} lies on a read-only file system" in answer.error
    assert ckpt_tasks("verify", "toy", "--store", str(root), folder=tmp_path).code == 0
    assert contents(root) == before
    disk.remount("rw")
    finish(spec)


# -- S3 ------------------------------------------------------------------------------------------


def _s3_config(folder: Path, endpoint: str) -> tuple[str, str]:
    (folder / "s3.toml").write_text(f'[store.options]\nendpoint_url = "{endpoint}"\n')
    return "--config", "s3.toml"


def test_missing_credentials_are_asked_for(tmp_path: Path) -> None:
    """Without credentials training exits with 2, and says which variables to set."""
    config = _s3_config(tmp_path, f"http://127.0.0.1:{free_port()}")
    answer = _train("s3://bucket/runs", tmp_path, *config)
    assert answer.code == EXIT_USAGE
    assert "no credentials for s3://bucket/runs" in answer.error
    assert "Set AWS_ACCESS_KEY_ID" in answer.error
    assert answer.said == [answer.error]


def test_a_bucket_that_is_not_there_is_named(tmp_path: Path, moto_server: S3Server) -> None:
    """A wrong bucket exits with 2, and names the bucket and the endpoint."""
    config = _s3_config(tmp_path, moto_server.endpoint)
    command = ["runs", "--store", "s3://buckett/runs", *config]
    answer = ckpt_tasks(*command, folder=tmp_path, environment=CREDENTIALS)
    assert answer.code == EXIT_USAGE
    assert f"there is no bucket 'buckett' at {moto_server.endpoint}" in answer.error


def test_an_endpoint_that_does_not_answer_is_worth_a_retry(tmp_path: Path) -> None:
    """A server that is not there exits with 1 after a few tries, and names itself."""
    config = _s3_config(tmp_path, f"http://127.0.0.1:{free_port()}")
    answer = ckpt_tasks(
        "runs", "--store", "s3://bucket/runs", *config, folder=tmp_path, environment=CREDENTIALS
    )
    assert answer.code == EXIT_FAILED
    assert "cannot reach s3://bucket/runs" in answer.error
