"""What an export is asked for and given, whichever form it writes."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import msgspec

from ckpt_tasks.errors import ConfigError
from ckpt_tasks.format.layout import RunLayout
from ckpt_tasks.format.records import CommitRecord
from ckpt_tasks.store import Store
from ckpt_tasks.suggest import did_you_mean

__all__ = [
    "ExportRequest",
    "ExportSource",
    "Exporter",
    "ServedModel",
    "chosen_names",
    "module_names",
]


class ServedModel(msgspec.Struct, frozen=True, kw_only=True):
    """How the module is built whose weights are exported.

    Parameters
    ----------
    entrypoint
        ``MODULE:FUNCTION`` or ``path/to/file.py:FUNCTION`` of a function that returns it.
    params
        Arguments for the function; of others that it takes, the run's hyperparameters of the same
        name are passed.
    example
        A ``.npy`` file with inputs, from which the model's signature is made.
    requirements
        What its environment needs beside this package, torch, numpy and mlflow, as pip takes it.
    """

    entrypoint: str
    params: dict[str, Any] = {}
    example: str | None = None
    requirements: list[str] = []


class ExportRequest(msgspec.Struct, frozen=True, kw_only=True):
    """What is to be exported.

    Parameters
    ----------
    only
        Tracked names; default: for ``torch`` all of them, else those of modules.
    model
        Only for forms that have a module in them.
    """

    only: list[str] = []
    model: ServedModel | None = None


class ExportSource(msgspec.Struct, frozen=True, kw_only=True):
    """The checkpoint that is exported."""

    store: Store
    layout: RunLayout
    record: CommitRecord

    @property
    def described(self) -> dict[str, str]:
        """What an exported file says of where it comes from."""
        record = self.record
        return {
            "run": self.layout.run,
            "uid": record.uid,
            "checkpoint": record.id,
            "step": str(record.position.step),
            "epoch": str(record.position.epoch),
        }


Exporter = Callable[[ExportSource, ExportRequest, Path], list[str]]
"""Makes the file or folder at a path where nothing is yet, and returns the tracked names in it.

It raises what it raises: what it has made is removed then.
"""


def module_names(trees: Mapping[str, Any]) -> list[str]:
    """Tracked names of modules, by the form that only a module's state dict has."""
    return [name for name, tree in trees.items() if isinstance(tree, dict) and _is_state_dict(tree)]


def _is_state_dict(tree: Mapping[str, Any]) -> bool:
    return tree.get("$") == "state_dict"


def chosen_names(
    record: CommitRecord, tracked: Collection[str], only: Collection[str], default: Collection[str]
) -> list[str]:
    """The names asked for, else the default.

    Raises `ConfigError` for names that were not tracked, and where there is no default.
    """
    for name in only:
        if name not in tracked:
            hint = did_you_mean(name, tracked, what="tracked names")
            raise ConfigError(f"{record.id} has nothing tracked as {name!r}; {hint}")
    if not only and not default:
        raise ConfigError(
            f"{record.id} has no module; say what to export: --only NAME, of {', '.join(tracked)}"
        )
    return list(dict.fromkeys(only or default))
