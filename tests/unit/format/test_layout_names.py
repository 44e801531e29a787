"""Paths of a store: any text becomes one safe name, and no path leads out of the store."""

from __future__ import annotations

import os.path
import string

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from ckpt_tasks.errors import ConfigError
from ckpt_tasks.format.layout import (
    MARK_KINDS,
    RunLayout,
    check_relative,
    decode_name,
    encode_name,
)
from ckpt_tasks.types import CheckpointId

SAFE = set(string.ascii_letters + string.digits + "_-.%")
UNICODE = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=15)
PATHLIKE = st.text("./\\ab\0 ~%", max_size=12)


@given(UNICODE)
@example("..")
@example(".")
@example(".hidden")
@example("a/b\\c")
@example("with space")
@example("%41")
@example("größe/模型/🚀")
@example("line\nbreak\0nul")
def test_any_text_becomes_one_safe_name(name: str) -> None:
    """A run may be named anything: the component is plain ASCII, never hidden, and reversible."""
    component = encode_name(name)
    assert set(component) <= SAFE
    assert not component.startswith(".")
    assert os.path.basename(component) == component
    assert decode_name(component) == name
    assert check_relative(component) == component


@given(UNICODE, UNICODE)
def test_two_names_never_share_a_component(one: str, other: str) -> None:
    """Different names lie in different folders."""
    assume(one != other)
    assert encode_name(one) != encode_name(other)


@given(st.text(max_size=20) | st.text("%ABCDEFabcdef0123456789./", max_size=12))
@example("%2e")
@example("%41")
@example("%FF")
@example(".x")
@example("a\n")
def test_decode_accepts_only_what_encode_makes(component: str) -> None:
    """Every name has one spelling; all else is no run's folder."""
    try:
        name = decode_name(component)
    except ValueError:
        return
    assert encode_name(name) == component


@pytest.mark.parametrize(
    ("name", "says"),
    [("", "empty"), ("x" * 181, "181 bytes"), ("ü" * 31, "186"), ("\ud800", "unicode")],
)
def test_impossible_names_are_refused(name: str, says: str) -> None:
    """A name that fits no file name is refused at once, saying why."""
    with pytest.raises(ConfigError, match=says):
        encode_name(name)


def test_longest_name_fits_a_file_name() -> None:
    """The longest accepted name leaves room for the longest ending within 255 bytes."""
    assert len(RunLayout.tensors_name("x" * 180, 9999)) <= 255


@given(PATHLIKE | st.lists(PATHLIKE, max_size=4).map("/".join) | st.text(max_size=12))
@example("a/../../b")
@example("/etc/passwd")
@example("a//b")
@example("a/.")
@example("..")
@example("a\\..\\b")
def test_accepted_paths_stay_below_the_root(path: str) -> None:
    """What `check_relative` lets pass is normal, relative, and lies below the root."""
    try:
        accepted = check_relative(path)
    except ValueError:
        return
    assert accepted == path
    assert os.path.normpath(path) == path
    full = os.path.normpath(os.path.join("/the/store", path))
    assert full.startswith("/the/store/")
    assert "\0" not in path
    assert RunLayout("run").in_run(path) == f"run/{path}"


@given(st.integers(1, 999_999_999))
def test_attempt_number_is_read_back(number: int) -> None:
    """A claim's path tells its attempt."""
    assert RunLayout.attempt_number(RunLayout("r").attempt(number)) == number


@pytest.mark.parametrize(
    "name",
    ["0000.json", "00012.json", "12.json", "0001.resumed.json", "0001.heartbeat", "x", "-001.json",
     "\u0660\u0660\u0660\u0661.json", "0001.json\n"],
)  # fmt: skip
def test_other_files_claim_no_attempt(name: str) -> None:
    """Only the one spelling of a claim counts: not its companions, zero, or extra digits."""
    assert RunLayout.attempt_number(f"run/attempts/{name}") is None


@given(st.integers(0, 10**15 - 1), st.integers(1, 999_999_999), st.integers(1, 999_999_999))
def test_checkpoint_id_is_read_back(step: int, attempt: int, sequence: int) -> None:
    """Commit and marks of a checkpoint tell its id, and ids sort by step."""
    layout = RunLayout("some run")
    checkpoint = CheckpointId(step, attempt, sequence)
    assert CheckpointId.parse(str(checkpoint)) == checkpoint
    assert RunLayout.checkpoint_id(layout.commit(checkpoint)) == checkpoint
    for kind in MARK_KINDS:
        assert RunLayout.checkpoint_id(layout.mark(kind, checkpoint)) == checkpoint


@pytest.mark.parametrize(
    "text",
    ["", "step-1-a1-s1", "step-00000001-a0-s1", "step-00000001-a01-s1", "step-000000001-a1-s1",
     "step-00000001-a1-s1 ", "step-00000001-a1-s1\n", "step-\u0660\u0660\u0660\u06600001-a1-s1"],
)  # fmt: skip
def test_other_texts_are_no_checkpoint_id(text: str) -> None:
    """An id has one spelling."""
    with pytest.raises(ValueError, match="is not a checkpoint id"):
        CheckpointId.parse(text)
    assert RunLayout.checkpoint_id(f"run/commits/{text}.json") is None


def test_every_path_lies_in_the_runs_folder() -> None:
    """All paths of a run begin with its own encoded name."""
    layout = RunLayout("a/b ..")
    checkpoint = CheckpointId(1200, 2, 7)
    paths = [
        layout.run_record,
        layout.registry_ids("mlflow"),
        layout.attempt(2),
        layout.resumed(2),
        layout.heartbeat(2),
        layout.commit(checkpoint),
        layout.mark("pins", checkpoint),
        layout.completed,
        layout.in_run("data/w-1/rank0000.index.json"),
    ]
    assert layout.root == "a%2Fb%20.."
    assert all(check_relative(path).startswith(f"{layout.root}/") for path in paths)
    assert len(set(paths)) == len(paths)
    assert layout.commit(checkpoint) == "a%2Fb%20../commits/step-00001200-a2-s7.json"
