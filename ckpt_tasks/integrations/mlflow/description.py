"""What people read about a checkpoint in MLflow: params, tags, and a description in Markdown."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from ckpt_tasks.escaping import markdown_code, printable
from ckpt_tasks.format.digest import digest
from ckpt_tasks.format.records import CommitRecord
from ckpt_tasks.integrations.mlflow import names
from ckpt_tasks.sizes import readable_size
from ckpt_tasks.types import CheckpointId, Number, Scalar

__all__ = [
    "checkpoint_description",
    "logged_model_name",
    "logged_model_params",
    "version_tags",
]

_SHOWN_HYPERPARAMETERS = 3
_SHORT = 40
_MAX_DESCRIPTION = 5000


def logged_model_name(checkpoint: CheckpointId) -> str:
    """``step-00001200``: short enough for a chip; the whole id is a param."""
    return f"step-{checkpoint.step:08d}"


def logged_model_params(record: CommitRecord, *, uri: str, manifest: bytes) -> dict[str, str]:
    """Params of the logged model: its page shows these, and no tags.

    A hyperparameter whose name is one of ours is told apart by ``hparam.``.
    """
    own: dict[str, Scalar] = {
        "epoch": record.position.epoch,
        "step": record.position.step,
        "size": readable_size(record.size),
        "trigger": record.trigger,
        "committed_at": record.created_at,
        "checkpoint": record.id,
        "position": str(record.position),
        "bytes": record.size,
        "digest": digest(manifest),
        "uri": uri,
    }
    params = {key: names.text_value(value, names.MAX_PARAM) for key, value in own.items()}
    for name, value in record.hyperparameters.items():
        key = names.key(f"hparam.{name}" if name in own else name)
        params[key] = names.text_value(value, names.MAX_PARAM)
    return params


def version_tags(
    record: CommitRecord, *, run: str, hyperparameters: Sequence[str] | None
) -> dict[str, str]:
    """Tags of the registered version, few and short: the table stacks them as chips.

    Parameters
    ----------
    record
        The checkpoint's commit record.
    run
        The run's name; the table has no column for it.
    hyperparameters
        Which ones become tags; ``None`` for the first few. One that the run lacks is left out.
    """
    chosen = hyperparameters
    if chosen is None:
        chosen = list(record.hyperparameters)[:_SHOWN_HYPERPARAMETERS]
    tags: dict[str, object] = {
        "ckpt.run": run,
        "ckpt.epoch": record.position.epoch,
        "ckpt.step": record.position.step,
        "ckpt.trigger": record.trigger,
    }
    for name in chosen:
        if name in record.hyperparameters:
            tags[names.key(f"hparam.{name}")] = _short(record.hyperparameters[name])
    return {key: names.text_value(value, names.MAX_TAG) for key, value in tags.items()}


def checkpoint_description(record: CommitRecord, *, run: str, uri: str, manifest: bytes) -> str:
    """What a checkpoint is, in Markdown, for the pages of the logged model and the version.

    Lists, for MLflow shows tables without any space between columns. The first words are
    what the table of versions shows, beside tags that tell epoch and step.
    """
    parts = [
        f"{readable_size(record.size)}, {record.position}, of **{_plain(run)}**",
        *_warnings(record),
        _list(
            "",
            {
                "Size": f"{readable_size(record.size)} ({record.size:,} bytes)",
                "Committed": record.created_at,
                "Why": _plain(record.reason or record.trigger),
                "Checkpoint": markdown_code(record.id),
                "Manifest": markdown_code(uri),
                "Digest": markdown_code(digest(manifest)),
            },
        ),
        _list("Metrics", {name: _number(record.metrics[name]) for name in sorted(record.metrics)}),
        _list(
            "Hyperparameters",
            {name: _plain(str(value)) for name, value in record.hyperparameters.items()},
        ),
    ]
    return _joined([part for part in parts if part])


def _warnings(record: CommitRecord) -> list[str]:
    warnings = []
    if record.nonfinite:
        shown = ", ".join(_plain(name) for name in record.nonfinite)
        warnings.append(f"**Not finite, so no retry starts from it:** {shown}")
    if not record.exact:
        warnings.append("Restores the order of the data, not the random numbers of its workers.")
    return warnings


def _joined(parts: Sequence[str]) -> str:
    """As many whole parts as fit."""
    text = parts[0][:_MAX_DESCRIPTION]
    for part in parts[1:]:
        if len(text) + 2 + len(part) <= _MAX_DESCRIPTION:
            text = f"{text}\n\n{part}"
    return text


def _list(title: str, rows: Mapping[str, str]) -> str:
    if not rows:
        return ""
    lines = [f"- {_plain(name)}: {value}" for name, value in rows.items()]
    return "\n".join([f"**{title}**\n", *lines] if title else lines)


def _short(value: Scalar) -> str:
    text = str(value)
    return text if len(text) <= _SHORT else f"{text[: _SHORT - 3]}..."


def _number(value: Number) -> str:
    number = float(value)
    return f"{number:.6g}" if math.isfinite(number) else f"**{number}**"


def _plain(text: str) -> str:
    """Text that Markdown shows as it is, on one line."""
    text = " ".join(printable(text).split())
    return "".join(f"\\{char}" if char in r"\`*_{}[]<>()#!|~" else char for char in text)
