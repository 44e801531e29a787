"""`copy` and `adopt`: what they tell, and that the other commands work on a copy."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.commands import Call, Stored

from ckpt_tasks.types import EXIT_DONE, EXIT_FAILED, EXIT_NOT_FOUND, EXIT_USAGE


@pytest.fixture
def target(tmp_path: Path) -> str:
    """Where the copy lies."""
    return str(tmp_path / "other" / "store")


def test_copy_adopt_and_all_other_commands(
    call: Call, stored: Stored, store_path: str, target: str
) -> None:
    """A replica is listed, shown and verified; not changed; adopted, it is a run of its own."""
    name = stored.run.name
    copied = call("copy", name, "--to", target, "--store", store_path)
    assert copied.code == EXIT_DONE, copied.err
    assert [line.partition(":")[0] for line in copied.out.splitlines()[:-1]] == [
        stored.first, stored.zombie, stored.newest
    ]  # fmt: skip
    assert f"file://{target}: 3 checkpoints copied" in copied.out
    again = call("copy", name, "--to", target, "--store", store_path, "--json")
    report = json.loads(again.out)
    assert (report["copied"], report["size"], len(report["there"])) == ([], 0, 3)

    for command in (("ls", name), ("show", f"{name}@{stored.newest}"), ("verify", name, "--all")):
        here, there = (call(*command, "--store", store) for store in (store_path, target))
        assert (there.code, len(there.out.splitlines())) == (here.code, len(here.out.splitlines()))
    assert "incomplete, replica" in call("runs", "--store", target).out
    shown = call("show", name, "--store", target).out
    assert f"replica       a read-only replica of the one in file://{store_path}" in shown
    for command in (
        ("pin", f"{name}@{stored.first}"), ("expire", name, "--keep-latest", "1"), ("collect", name)
    ):  # fmt: skip
        refused = call(*command, "--store", target)
        assert (refused.code, "read-only replica" in refused.err) == (EXIT_USAGE, True)

    adopted = call("adopt", name, "--store", target)
    assert adopted.code == EXIT_DONE, adopted.err
    assert f"with the first 2 attempts of {stored.run.identity.uid}" in adopted.out
    shown = call("show", name, "--store", target).out
    assert f"inherited     attempts 1 to 2 of {stored.run.identity.uid}" in shown
    assert f"adopted from file://{store_path}" in shown
    assert call("pin", f"{name}@{stored.first}", "--store", target).code == EXIT_DONE
    assert call("verify", name, "--all", "--store", target).code == EXIT_DONE
    late = call("copy", name, "--to", target, "--store", store_path)
    assert (late.code, "goes its own way" in late.err) == (EXIT_USAGE, True)


def test_one_checkpoint_and_damage(
    call: Call, stored: Stored, store_path: str, target: str
) -> None:
    """@ID copies one; of several, a damaged one is told by the exit code, and the others come."""
    name, arguments = stored.run.name, ("--to", target, "--store", store_path)
    one = call("copy", f"{name}@{stored.first}", *arguments)
    assert (one.code, "1 checkpoint copied" in one.out) == (EXIT_DONE, True)
    stored.run.damage_tensors(stored.newest)
    some = call("copy", name, *arguments)
    assert some.code == EXIT_FAILED
    assert f"{stored.newest}: DAMAGED, not copied: " in some.out
    assert "1 checkpoint copied" in some.out
    assert call("copy", f"{name}@{stored.newest}", *arguments).code == EXIT_FAILED


@pytest.mark.parametrize(
    ("arguments", "code", "why"),
    [
        (("copy", "missing", "--to", "TARGET"), EXIT_NOT_FOUND, "no run 'missing'"),
        (("copy", "digits cnn", "--to", "STORE"), EXIT_USAGE, "name another store"),
        (("copy", "digits cnn"), EXIT_USAGE, "--to"),
        (("copy", "digits cnn", "--to", "TARGET", "--to-option", "x"), EXIT_USAGE, "NAME=VALUE"),
        (("copy", "digits cnn", "--to", "TARGET", "--to-option", "a=1"), EXIT_USAGE, "no options"),
        (("adopt", "digits cnn"), EXIT_USAGE, "is no replica"),
    ],
)
def test_mistakes(
    arguments: tuple[str, ...],
    code: int,
    why: str,
    call: Call,
    stored: Stored,
    store_path: str,
    target: str,
) -> None:
    """Each is one line, with a code that says not to try again."""
    places = {"TARGET": target, "STORE": store_path}
    answer = call(*(places.get(word, word) for word in arguments), "--store", store_path)
    assert answer.code == code
    assert why in answer.err
    assert len(answer.err.splitlines()) == 1
