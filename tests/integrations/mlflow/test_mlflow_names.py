"""Names and notes as MLflow accepts them: properties, against MLflow's own validation."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from mlflow.entities import Param
from mlflow.utils import validation

from ckpt_tasks.integrations.mlflow import names
from ckpt_tasks.integrations.mlflow.note import merged_note

anything = st.text(max_size=400)
hostile = st.sampled_from(
    ["", ".", "..", "../x", "/", "/x", "x/", "a//b", "a/./b", "a/../b", "latest", "v1", "V12", " "]
)
readable = st.text(alphabet="abcXYZ019_-", min_size=1, max_size=60)


@given(anything | hostile)
def test_keys_are_accepted(name: str) -> None:
    """Any text becomes a key that MLflow takes for a metric, a param and a tag."""
    key = names.key(name)
    validation._validate_metric(key, 1.0, 1, 1)
    validation._validate_param(key, "value")
    validation._validate_tag(f"ckpt.metric/{key}", "value")


@given(anything | hostile)
@example("latest")
def test_aliases_are_accepted(name: str) -> None:
    """Any text becomes an alias that MLflow takes and does not reserve."""
    alias = names.alias(name)
    validation._validate_model_alias_name(alias)
    validation._validate_model_alias_name_reserved(alias)
    assert alias.isascii()


@given(anything | hostile)
def test_registered_models_are_accepted(name: str) -> None:
    """Any text becomes the name of a registered model, short enough for its column."""
    model = names.registered_model(name)
    validation._validate_model_name(model)
    assert len(model) <= 256


@given(readable.filter(lambda name: name.lower() != "latest" and not name[1:].isdigit()))
def test_plain_names_stay(name: str) -> None:
    """What MLflow accepts is not changed."""
    assert names.key(name) == names.alias(name) == names.registered_model(name) == name


@given(st.tuples(anything | hostile, anything | hostile))
@example(("a b", "a_b"))
@example(("loss(", "loss["))
@example(("x" * 300, "x" * 301))
def test_different_names_stay_different(pair: tuple[str, str]) -> None:
    """Two names never become one key or one alias."""
    one, other = pair
    if one != other:
        assert names.key(one) != names.key(other)
        assert names.alias(one) != names.alias(other)


@given(st.text(min_size=1, max_size=40), st.integers(1, 400))
def test_values_are_cut_and_stay_different(text: str, times: int) -> None:
    """A value fits its limit; values that differ only behind the cut stay different."""
    first, second = text * times + "a", text * times + "b"
    cut = names.text_value(first, 100)
    assert len(cut) <= 100
    assert cut != names.text_value(second, 100)
    validation._validate_param(Param("x", cut).key, cut)


@given(st.text(), st.text(max_size=2000), st.text(max_size=2000))
def test_note_keeps_what_people_wrote(people: str, first: str, second: str) -> None:
    """Our part is replaced, and all other text stays, whatever it is."""
    people = people.replace("<!--", "")
    once = merged_note(people, first)
    assert merged_note(once, first) == once
    twice = merged_note(once, second)
    assert merged_note(once + "\n\nadded", second) == twice + "\n\nadded"
    assert twice.startswith(people.rstrip())
    assert len(twice) <= 8000


def test_note_is_cut_at_a_line() -> None:
    """A story that is too long ends at a line's end and says that it was cut."""
    note = merged_note("mine", "\n".join(f"line {n}" for n in range(3000)))
    assert len(note) <= 8000
    assert note.startswith("mine\n\n<!-- ckpt-tasks: begin -->")
    assert "shortened" in note
    assert note.endswith("<!-- ckpt-tasks: end -->")


def test_note_of_people_is_never_cut() -> None:
    """Where people's own text leaves no room, the note stays as it is."""
    mine = "x" * 7990
    assert merged_note(mine, "story") == mine


@pytest.mark.parametrize(
    "broken",
    [
        "before <!-- ckpt-tasks: begin --> someone removed the end, then wrote this",
        "someone removed the begin <!-- ckpt-tasks: end --> after",
    ],
)
def test_broken_markers_lose_nothing(broken: str) -> None:
    """Where somebody removed one of the markers, their text stays and the note does not grow."""
    once = merged_note(broken, "story")
    assert once.startswith(broken)
    assert merged_note(once, "story") == once
