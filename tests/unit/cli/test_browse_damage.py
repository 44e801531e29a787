"""``runs``, ``ls``, ``show`` and ``verify`` on stores that are missing, empty or damaged."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from support.made_runs import MadeRun
from support.shell import contents

from ckpt_tasks.format.digest import digest

EXIT_USAGE, EXIT_NOT_FOUND = 2, 4
ON_A_RUN = ("ls", "show", "verify")


def _assert_one_line(answer, *expected: str) -> None:
    assert answer.err.startswith("error: ")
    assert answer.err.count("\n") == 1
    assert answer.out == ""
    for text in expected:
        assert text in answer.err


@pytest.mark.parametrize("form", [[], ["--json"]])
def test_a_store_without_runs(call, store_path, form):
    """Empty, it has no runs to list, and no run of any name."""
    Path(store_path).mkdir()
    answer = call("runs", "--store", store_path, *form)
    assert answer.code == 0
    assert answer.json == [] if form else f"no runs in file://{store_path}" in answer.out
    for command in ON_A_RUN:
        answer = call(command, "digits", "--store", store_path, *form)
        assert answer.code == EXIT_NOT_FOUND
        _assert_one_line(answer, "no run 'digits'", store_path)


@pytest.mark.parametrize("command", [["runs"], *([command, "digits"] for command in ON_A_RUN)])
@pytest.mark.parametrize("form", [[], ["--json"]])
def test_a_store_that_is_not_there_is_a_mistake(call, store_path, command, form):
    """A mistyped path must not look like a store without runs; nothing is made."""
    answer = call(*command, "--store", store_path, *form)
    assert answer.code == EXIT_USAGE
    _assert_one_line(answer, f"there is no store at {store_path}")
    assert not Path(store_path).exists()


@pytest.mark.parametrize("command", ON_A_RUN)
@pytest.mark.parametrize("form", [[], ["--json"]])
def test_an_unknown_run_is_named_with_the_nearest(call, store_path, stored, command, form):
    """Also with --json an error is one line on standard error, and nothing on the other."""
    answer = call(command, "digits cn", "--store", store_path, *form)
    assert answer.code == EXIT_NOT_FOUND
    _assert_one_line(answer, "no run 'digits cn'", "did you mean 'digits cnn'?")


@pytest.mark.parametrize("command", ["show", "verify"])
@pytest.mark.parametrize("form", [[], ["--json"]])
def test_an_unknown_checkpoint_is_named_with_the_run(call, store_path, stored, command, form):
    """An id that the run does not have exits with 4."""
    answer = call(command, "digits cnn@step-00000007-a9-s1", "--store", store_path, *form)
    assert answer.code == EXIT_NOT_FOUND
    _assert_one_line(answer, "no checkpoint step-00000007-a9-s1 in digits cnn")


def test_a_store_that_is_a_file_is_named(call, tmp_path):
    """A file where the store should be is none, and is left alone."""
    file = tmp_path / "store"
    file.write_text("precious")
    answer = call("ls", "digits", "--store", str(file))
    assert answer.code == EXIT_USAGE
    _assert_one_line(answer, f"there is no store at {file}")
    assert file.read_text() == "precious"


# -- one damaged run among good ones ---------------------------------------------------------------


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-30])


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 4
    path.write_bytes(data)


def _empty(path: Path) -> None:
    path.write_bytes(b"")


def _from_the_future(path: Path) -> None:
    body = b'{\n "format": 99'
    path.write_bytes(body + b',\n "checksum": "%s"\n}\n' % digest(body).encode())


def _a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()
    (path / "inside").write_bytes(b"x")


@pytest.fixture
def other(store_path, stored) -> Path:
    """A second run of the store, complete, with a mark; the folder in which it lies."""
    run = MadeRun(stored.run.store, "other")
    run.complete(run.begin().commit(10))
    return Path(store_path) / "other"


@pytest.mark.parametrize("spoil", [_truncate, _flip, _empty, _from_the_future, _a_folder])
@pytest.mark.parametrize(
    "name",
    [
        "run.json",
        "attempts/0001.json",
        "attempts/0001.resumed.json",
        "commits/step-00000010-a1-s1.json",
        "marks/completed.json",
    ],
)
def test_a_damaged_run_hides_no_other(
    call, store_path, stored, other: Path, name: str, spoil: Callable[[Path], None]
):
    """Whatever record of one run is spoilt: the list holds both, the good one stays as it was."""
    good = call("show", "digits cnn", "--store", store_path, "--json").json
    spoil(other / name)
    before = contents(Path(store_path))
    for form in ([], ["--json"]):
        answer = call("runs", "--store", store_path, *form)
        assert answer.code == 0, answer
        assert "digits cnn" in answer.out
        assert "other" in answer.out
    names = [run["name"] for run in call("runs", "--store", store_path, "--json").json]
    assert names == ["digits cnn", "other"]
    assert call("show", "digits cnn", "--store", store_path, "--json").json == good
    assert call("verify", "digits cnn", "--store", store_path).code == 0
    _assert_told(call, store_path)
    after = contents(Path(store_path))
    assert {path: data for path, data in after.items() if "/marks/verified/" not in path} == before


def _assert_told(call, store_path: str) -> None:
    """The damaged run itself: valid JSON or one line, and never a surprise."""
    for command in ON_A_RUN:
        answer = call(command, "other", "--store", store_path, "--json")
        assert "unexpected" not in answer.err
        if answer.code == 0:
            assert isinstance(answer.json, dict | list)
        elif not answer.out:
            _assert_one_line(answer)
        else:
            assert command == "verify"
            assert answer.json[0]["ok"] is False


@pytest.mark.parametrize("form", [[], ["--json"]])
def test_a_checkpoint_of_a_later_version_keeps_no_other_unverified(
    call, store_path, stored, form: list[str]
):
    """All others are verified and listed; then the one that cannot be is told, with code 2."""
    _from_the_future(Path(store_path) / "digits%20cnn" / _commit(stored.zombie))
    answer = call("verify", "digits cnn", "--all", "--store", store_path, *form)
    assert answer.code == 2
    assert stored.zombie in answer.err
    assert "upgrade ckpt-tasks" in answer.err
    for checkpoint in (stored.first, stored.newest):
        assert checkpoint in answer.out


def _commit(checkpoint: str) -> str:
    return f"commits/{checkpoint}.json"
