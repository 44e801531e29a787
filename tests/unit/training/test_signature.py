"""Annotations, defaults and docstrings of training functions, read from their source."""

from __future__ import annotations

import ast
from typing import Any, Literal

import pytest

from ckpt_tasks.training.entrypoints.docstrings import describe_parameters, summary_of
from ckpt_tasks.training.entrypoints.signature import resolve_annotation, signature_of


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("int", int),
        ("builtins.float", float),
        ("None", type(None)),
        ("int | None", int | None),
        ("Optional[str]", str | None),
        ("typing.Union[int, str]", int | str),
        ("Literal['adam', 'sgd']", Literal["adam", "sgd"]),
        ("t.Literal[1, None]", Literal[1, None]),
        ("list[int]", list[int]),
        ("List[float]", list[float]),
        ("dict[str, int | None]", dict[str, int | None]),
        ("tuple[float, float]", tuple[float, float]),
        ("tuple[int, ...]", tuple[int, ...]),
        ("list", list),
        ("Annotated[int, 'batch size']", int),
        ("'int | str'", int | str),
        ("Any", Any),
        ("Path", Any),
        ("torch.device | None", Any),
        ("Callable[[int], int]", Any),
        ("list[int, int]", Any),
        ("'not a type ('", Any),
    ],
)
def test_plain_annotations_are_resolved_others_are_any(text: str, expected: object) -> None:
    """Types that a form can show are resolved, everything else becomes Any."""
    assert resolve_annotation(ast.parse(text, mode="eval").body) == expected


def _signature(source: str):  # type: ignore[no-untyped-def]
    node = ast.parse(source).body[0]
    assert isinstance(node, ast.FunctionDef)
    return signature_of(node, "m:train")


def test_parameters_behind_the_run_are_read_in_order() -> None:
    """Positional and keyword-only parameters are hyperparameters, the first is the run."""
    signature = _signature(
        "def train(run, lr: float, n=3, *, wd: float = -1e-2, sched=make(), flag=False): ..."
    )
    shown = [
        (p.name, p.annotation, p.required, p.default, p.default_known)
        for p in signature.hyperparameters
    ]
    assert shown == [
        ("lr", float, True, None, False),
        ("n", int, False, 3, True),
        ("wd", float, False, -0.01, True),
        ("sched", Any, False, None, False),
        ("flag", bool, False, False, True),
    ]
    assert signature.takes_run
    assert not signature.accepts_any


def test_a_function_without_parameters_takes_no_run() -> None:
    """Keyword arguments alone leave no place for the run."""
    signature = _signature("def train(*, lr=1, **rest): ...")
    assert not signature.takes_run
    assert signature.accepts_any


NUMPY = '''def train(run, lr, wd, epochs):
    """Train a digits classifier
    to convergence.

    More about it.

    Parameters
    ----------
    run
        The run.
    lr, wd : float
        Learning rate and
        weight decay.
    epochs : int, optional
        How often: all of it.

    Returns
    -------
    epochs
        Not this.
    """
'''
GOOGLE = '''def train(run, lr, wd, epochs):
    """Train a digits classifier to convergence.

    Args:
        run: The run.
        lr (float): Learning rate and
            weight decay.
        wd: Learning rate and weight decay.
        epochs (int, optional): How often: all of it.

    Returns:
        epochs: Not this.
    """
'''
SPHINX = '''def train(run, lr, wd, epochs):
    """Train a digits classifier to convergence.

    :param lr: Learning rate and
        weight decay.
    :param float wd: Learning rate and weight decay.
    :param epochs: How often: all of it.
    :returns: Not this.
    """
'''


@pytest.mark.parametrize("source", [NUMPY, GOOGLE, SPHINX], ids=["numpy", "google", "sphinx"])
def test_docstrings_describe_parameters(source: str) -> None:
    """The three common styles give the same summary and descriptions."""
    signature = _signature(source)
    assert signature.summary == "Train a digits classifier to convergence."
    assert {p.name: p.description for p in signature.hyperparameters} == {
        "lr": "Learning rate and weight decay.",
        "wd": "Learning rate and weight decay.",
        "epochs": "How often: all of it.",
    }


def test_a_docstring_without_sections_describes_nothing() -> None:
    """Prose, or none at all, gives no descriptions and does not fail."""
    assert describe_parameters("Just prose: with a colon.\n\n    and code: here") == {}
    assert describe_parameters("") == {}
    assert summary_of("") == ""
